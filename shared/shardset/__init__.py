"""The shard set on disk: columns, indexes, manifest."""
