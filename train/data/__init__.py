"""Turn shard sets and sessions into batches on the training device."""
