"""Benchmark scores: tasks of lm-evaluation-harness, run on the native model."""
