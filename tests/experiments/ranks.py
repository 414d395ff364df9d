"""Train the same steps in one process and on several ranks, and print the differences.

    python tests/experiments/ranks.py                    2 and 4 ranks, a few minutes on two cores
    python tests/experiments/ranks.py --world-sizes 2

The first table compares each way on ranks (gloo on the CPU) with the same training in one process:
whether every global batch has the same keys, and the largest relative differences of losses, also
held-out ones, and of gradient norms of the whole model and of its parts. For the second table, each
way resumes the third step's checkpoint of each way; the steps after it are compared with the
undisturbed process.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import numpy as np
import torch
from helpers.rank_program import train_among_ranks, train_once
from helpers.sets import make_set

STEPS, SAVED_STEP = 6, 3
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Way:
    """One way to train, and the largest relative differences of ranks from one process."""

    name: str
    tolerance: float = TOLERANCE
    """Of losses."""
    norm_tolerance: float = TOLERANCE
    options: dict[str, Any] = field(default_factory=dict)


WAYS = [
    Way("float32"),
    Way("bf16", 1e-4, 1e-2, {"precision": "bf16"}),
    Way("fp16, scaled", 1e-5, 1e-3, {"precision": "fp16"}),
    Way("2 micro-batches", options={"accumulation_steps": 2}),
    Way("recomputing", options={"gradient_checkpointing": True}),
    Way("2 loader processes", options={"num_workers": 2}),
    Way("windows of 0.4 s", options={"window": {"duration_s": 0.4}}),
    Way("windows of 4 s", options={"window": {"duration_s": 4.0, "stride_s": 1.0}}),
]
"""Ranks add the same float32 numbers in another order. In half precision each rank rounds its own
sums, also those of weight gradients, to 2^-9 in bf16 and 2^-12 in fp16."""

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Compared:
    """Differences of ranks from one process."""

    has_same_batches: bool
    loss_deviation: float
    norm_deviation: float

    def is_good(self, way: Way) -> bool:
        """Return whether they are within the way's tolerances."""
        is_near = self.loss_deviation <= way.tolerance and self.norm_deviation <= way.norm_tolerance
        return self.has_same_batches and is_near


def compare(ranks: list[dict[str, Any]], alone: dict[str, Any], *, first: int = 0) -> Compared:
    """Compare what ranks read and measured from step `first` on with one process."""
    keys = [[key for r in ranks for key in r["keys"][i]] for i in range(len(ranks[0]["keys"]))]
    per_step = len(alone["keys"]) // len(alone["metrics"])
    pairs = [
        pair
        for result in ranks
        for pair in [
            *zip(result["metrics"], alone["metrics"][first:], strict=True),
            (result["val"], alone["val"]),
        ]
    ]
    return Compared(
        keys == alone["keys"][first * per_step :],
        _deviation(pairs, "loss_"),
        _deviation(pairs, "grad_norm"),
    )


def _deviation(pairs: list[tuple[dict[str, float], dict[str, float]]], prefix: str) -> float:
    """Return the largest relative difference of metrics with a prefix; NaN if one is NaN."""
    values = [(own[n], other[n]) for own, other in pairs for n in other if n.startswith(prefix)]
    return float(np.max([abs(a / b - 1) if a != b else 0.0 for a, b in values]))


def compare_ways(shards: Path, root: Path, world_size: int, ways: list[Way]) -> dict[str, Compared]:
    """Compare every way on ranks, with DDP and with FSDP2; by "PARALLEL WAY"."""
    alone = {way.name: train_once(**_run(shards, root / "alone", way)) for way in ways}
    pairs = list(itertools.product(PARALLEL, ways))
    runs = [_run(shards, root / parallel, way, parallel=parallel) for parallel, way in pairs]
    results = train_among_ranks(world_size, runs, root / f"ways_{world_size}")
    return {
        f"{parallel} {way.name}": compare(ranks, alone[way.name])
        for (parallel, way), ranks in zip(pairs, results, strict=True)
    }


def compare_resumes(
    shards: Path, root: Path, world_sizes: list[int]
) -> dict[tuple[str, str], Compared]:
    """Resume each way's checkpoint in each way, and compare; by (from, to)."""
    ways = [(1, "auto"), *itertools.product(world_sizes, PARALLEL)]
    names = {way: "1 process" if way[0] == 1 else f"{way[0]} {way[1]}" for way in ways}
    saving = {"save_interval": SAVED_STEP}

    def train(world_size: int, runs: list[dict[str, Any]], folder: str) -> list[list[Any]]:
        if world_size == 1:
            return [[train_once(**run)] for run in runs]
        return train_among_ranks(world_size, runs, root / folder)

    for size, parallel in ways:
        run = _run(
            shards, root / "from", Way(names[size, parallel], options=saving), parallel=parallel
        )
        (ranks,) = train(size, [run], f"from_{size}_{parallel}")
        if size == 1:
            (alone,) = ranks
    compared = {}
    for size, parallel in ways:
        to = names[size, parallel]
        saved = {name: root / "from" / _folder(name) / "checkpoints" for name in names.values()}
        runs = [
            _run(
                shards,
                root / "to",
                Way(
                    f"{name} to {to}",
                    options={"resume": str(path / f"model_step_{SAVED_STEP}.pt")},
                ),
                parallel=parallel,
            )
            for name, path in saved.items()
        ]
        for name, ranks in zip(saved, train(size, runs, f"to_{size}_{parallel}"), strict=True):
            compared[name, to] = compare(ranks, alone, first=SAVED_STEP)
    return compared


def _run(shards: Path, root: Path, way: Way, *, parallel: str = "auto") -> dict[str, Any]:
    return {
        "shards": str(shards),
        "folder": str(root / _folder(way.name)),
        "parallel": parallel,
        "max_steps": STEPS,
        **way.options,
    }


def _folder(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    is_good = True
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        root = Path(folder)
        shards = make_set(root)
        print(f"{STEPS} steps, compared with one process; {torch.__version__}")
        print("ranks  way                      same batches  losses differ  gradient norms")
        for size in args.world_sizes:
            for name, compared in compare_ways(shards, root, size, WAYS).items():
                way = next(way for way in WAYS if name.endswith(way.name))
                is_good &= compared.is_good(way)
                print(
                    f"{size:5}  {name:23}  {'yes' if compared.has_same_batches else 'NO':>12}"
                    f"  {compared.loss_deviation:13.1e}  {compared.norm_deviation:14.1e}"
                    f"{'' if compared.is_good(way) else '  BAD'}",
                    flush=True,
                )
        resumes = compare_resumes(shards, root, args.world_sizes)
        columns = list(dict.fromkeys(to for _, to in resumes))
        print(f"\ncheckpoint of step {SAVED_STEP}, resumed in each way: losses differ by")
        print(f"{'of':11}" + "".join(f"{to:>11}" for to in columns))
        for name in columns:
            cells = [resumes[name, to] for to in columns]
            texts = [f"{c.loss_deviation:.1e}" if c.has_same_batches else "BATCHES" for c in cells]
            print(f"{name:11}" + "".join(f"{text:>11}" for text in texts))
        is_good &= all(compared.is_good(Way("float32")) for compared in resumes.values())
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
