"""Finished shard sets: look into them, and move their sessions about."""
