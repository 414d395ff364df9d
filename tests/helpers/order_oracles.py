"""A slow reference of the order of samples, written from its description."""

import hashlib

MASK = 2**64 - 1


def slow_hashes(text, count):
    """splitmix64 as its paper has it, on Python's whole numbers."""
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def slow_permutation(text, values):
    hashes = slow_hashes(text, len(values))
    return [value for _, value in sorted(zip(hashes, values, strict=True), key=lambda p: p[0])]


def slow_epoch(sizes, fingerprint, seed, epoch, block_shards):
    """Every (shard, row): shards permuted, taken in blocks, samples permuted inside a block."""
    basis = f"{fingerprint}/{seed}/{epoch}"
    shards = slow_permutation(f"{basis}/shards", list(range(len(sizes))))
    order = []
    for block, first in enumerate(range(0, len(shards), block_shards)):
        members = shards[first : first + block_shards]
        samples = [(s, r) for s in members for r in range(sizes[s])]
        order += slow_permutation(f"{basis}/block/{block}", samples)
    return order
