"""What training state is safe: saves, restores and retires checkpoints of a run."""
