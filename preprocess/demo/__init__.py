"""The demo world: sessions of a small creature, made from a seed."""
