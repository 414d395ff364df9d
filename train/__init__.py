"""Trainer: streams shard sets, trains a MultiModalCreature, infers."""
