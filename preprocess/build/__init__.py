"""The shard job: scan, plan, build, commit."""
