"""Checkpoints of nothing but a few numbers, and damage to files."""

from __future__ import annotations

import time

import torch


def make_state(step=1, *, saved_at=None):
    model = {"weight": torch.arange(5000, dtype=torch.float32)}
    saved_at = time.time() if saved_at is None else saved_at
    rest = {"format_version": 1, "config": {}, "shapes": {}}
    return {**rest, "step": step, "saved_at": saved_at, "model": model}


def flip_a_bit(path):
    """Change one bit in the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path):
    path.write_bytes(b"")


def names_in(folder):
    return {path.name for path in folder.iterdir()}
