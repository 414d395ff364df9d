"""Offline job: validates sessions and builds shard sets from them; imports no torch."""
