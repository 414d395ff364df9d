"""Commands on finished shard sets: verify and describe them, and edit their sessions."""
