"""Damage a shard set in every way, and check what training reads from it.

    python tests/experiments/faults.py --flips 1000 --codec h264 --workers 2

Each trial damages one thing in a fresh copy of a tiny set, reads all streams of an epoch, and
compares each sample with the undamaged set's sample of the same key. A trial is

    detected   samples were reported, with file and offset, and substituted; or reading stopped with
               one clear message
    unread     nothing was reported, and every sample is right: no reader uses those bytes
    silent     nothing was reported, and a sample is wrong, missing or twice (must be 0)
    unnamed    samples were substituted, but the damage was not located (must be 0)
    crashed    another exception than a clear message was raised (must be 0)

In every case the number of batches and their shapes must stay the same.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import torch
from helpers import sets as tiny_sets
from helpers.faults import FAULTS

from shared.errors import EngineError
from train.data.loader import Loader
from train.data.shard_source import ShardSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.faults import Fault

Outcome = str

BAD_OUTCOMES = ("crashed", "silent", "unnamed")


class Reference:
    """The samples of an undamaged set."""

    def __init__(self, shards: Path) -> None:
        batches = list(epoch(shards))
        self.shapes = [window_shapes(batch) for batch in batches]
        self.rows = {key: row for batch in batches for key, row, _ in rows_of(batch)}
        self.files = {path.name for path in shards.iterdir()}

    def judge(self, shards: Path, *, num_workers: int = 0) -> tuple[Outcome, str]:
        """Read a damaged set; return the outcome and the message."""
        try:
            batches = list(epoch(shards, num_workers=num_workers))
        except EngineError as error:
            return "detected", str(error)
        except Exception as error:  # any other exception is a crash
            return "crashed", f"{type(error).__name__}: {error}"
        skipped = [skip for batch in batches for skip in batch["skipped"]]
        if [window_shapes(batch) for batch in batches] != self.shapes:
            return "silent", "batches have other shapes"
        rows = [each for batch in batches for each in rows_of(batch)]
        seen = Counter(key for key, _, weight in rows if weight)
        for key, row, _ in rows:
            if key not in self.rows or not is_same(row, self.rows[key]):
                return "silent", f"{key} is another sample"
        if unnamed := [skip for skip in skipped if not self.is_named(skip)]:
            return "unnamed", json.dumps(unnamed[0])
        if skipped:
            return "detected", skipped[0]["error"]
        if set(seen) != set(self.rows) or set(seen.values()) != {1}:
            return "silent", "a sample is missing or twice"
        return "unread", ""

    def is_named(self, skip: dict[str, Any]) -> bool:
        """Return whether a substituted sample is reported with shard, file and offset.

        Its error must name them, too. For an index or a missing file, only the file is named.
        """
        file, offset = skip["file"], skip["offset"]
        if file not in self.files or not file.startswith(f"{skip['shard']}."):
            return False
        if file.endswith(".index"):
            return f"{file}: " in skip["error"] and offset is None
        if f"{file}: can't be opened: " in skip["error"]:
            return offset is None
        return type(offset) is int and f"{file} at {offset}: " in skip["error"]


def epoch(shards: Path, *, num_workers: int = 0) -> Iterator[dict[str, Any]]:
    """Yield all batches of one shuffled epoch, for any number of corrupt samples."""
    source = ShardSource(shards)
    config = tiny_sets.make_config(shards, max_bad_fraction=1.0, num_workers=num_workers)
    for batch in Loader(source, config, num_epochs=1):
        yield {**batch, "inputs": {n: t.clone() for n, t in batch["inputs"].items()}}
    source.close()


def window_shapes(batch: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in batch["inputs"].items()}


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor], float]]:
    for i, key in enumerate(batch["keys"]):
        row = {name: tensor[i] for name, tensor in batch["inputs"].items()}
        yield key, row, float(batch["weight"][i])


def is_same(row: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in row.items())


def try_fault(
    fault: Fault, shards: Path, reference: Reference, seed: str, *, num_workers: int = 0
) -> tuple[Outcome, str]:
    """Damage a copy, read it, and return the outcome and the message."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(shards, Path(folder) / "set"))
        fault(copy, random.Random(seed))
        outcome, message = reference.judge(copy, num_workers=num_workers)
        return outcome, message.replace(f"{folder}/", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="mjpeg", help="video.codec of the set")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        shards = tiny_sets.make_set(Path(folder), video={"codec": args.codec})
        reference = Reference(shards)
        print(f"{'fault':46} tries  detected  unread  silent  unnamed  crashed   example")
        for name, (count, fault) in FAULTS.items():
            if args.only not in name:
                continue
            count = count or args.flips
            results = [
                try_fault(
                    fault,
                    shards,
                    reference,
                    f"{args.seed}/{name}/{i}",
                    num_workers=args.workers,
                )
                for i in range(count)
            ]
            outcomes = Counter(outcome for outcome, _ in results)
            worst = (*BAD_OUTCOMES, "detected", "unread")
            example = next(text for kind in worst for o, text in results if o == kind)
            print(
                f"{name:46} {count:5}  {outcomes['detected']:8}  {outcomes['unread']:6}  "
                f"{outcomes['silent']:6}  {outcomes['unnamed']:7}  {outcomes['crashed']:7}   "
                f"{example[:90]}"
            )
            for outcome, text in results:
                if outcome in BAD_OUTCOMES:
                    bad += 1
                    print(f"    {outcome}: {text[:160]}")
    return 1 if bad else 0


if __name__ == "__main__":
    io.TextIOWrapper.reconfigure(sys.stdout, line_buffering=True)  # type: ignore[attr-defined]
    sys.exit(main())
