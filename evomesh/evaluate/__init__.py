"""Scores on benchmark tasks, by lm-evaluation-harness through the native model."""
