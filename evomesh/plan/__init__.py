"""Prediction of what a run holds and sends, without running it."""
