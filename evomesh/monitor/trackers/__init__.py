"""Trackers: services and files that get a run's figures, beside the log, ``metrics.jsonl`` and TensorBoard.

figures of a step -> TrackerGroup -> one queue and thread for each tracker -> adapter -> service
"""
