"""What a run tells: log lines, metrics, TensorBoard, progress."""
