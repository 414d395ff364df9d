"""What one asks of a configuration or a checkpoint, outside of training."""
