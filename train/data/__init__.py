"""From shard sets to batches on the training device."""
