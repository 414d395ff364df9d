"""Serve one loader in its own process; ``measure.py`` runs it in the peers' environment.

Reads requests from standard input and writes responses to standard output, a JSON object per line.
Output of the loader goes to standard error.

    {"do": "check"}
    {"do": "memory", "workers": 2, "form": "rgb"}
    {"do": "pass", "workers": 2, "form": "rgb", "seconds": 1.0}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loaders import LOADERS, Entry
from recordings import Store
from windows import EYES, NUMBERS

from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD, to_model_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PAGE_BYTES = 4096
SETTLE_S = 1.0
"""Long enough for the workers to fill their queues."""
PREFETCH = 2
"""Batches per worker that loaders hold ready by default."""


def main() -> None:
    """Serve requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    store = Store(Path(sys.argv[2]), int(sys.argv[3]))
    entry = LOADERS[sys.argv[1]]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = answer_to(request, entry, store)
        except Exception as error:
            traceback.print_exc()
            message = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {message[-1][:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def answer_to(request: dict[str, Any], entry: Entry, store: Store) -> dict[str, Any]:
    """Return the response to a request."""
    if request["do"] == "check":
        return check(entry, store)
    if entry.limit is not None:
        from ours import run_limit

        return run_limit(entry.limit, store, request["workers"], request["seconds"])
    iterator = iter(entry.open(store, request["workers"], request["form"] == "worker"))
    if request["do"] == "memory":
        return memory_of(iterator, entry, request["workers"], request["form"])
    return run_pass(iterator, entry, request["workers"], request["form"], request["seconds"])


def run_pass(
    batches: Iterator[dict[str, Any]], entry: Entry, workers: int, form: str, seconds: float
) -> dict[str, float]:
    """Measure rate and processor time in the steady state of one pass.

    The clock starts after as many batches as can be prefetched, and stops at the end of the epoch
    or after `seconds`. Every page of each batch is touched, as a copy to a device would do.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - workers))
    warm_up(batches, entry, workers, form)
    num_samples = 0
    cpu_s, start_s = tree_cpu_s(), time.perf_counter()
    for num_batches, batch in enumerate(batches, 1):
        num_samples += take(batch, form)
        is_round = num_batches % max(1, workers) == 0
        if is_round and (entry.is_slow or time.perf_counter() - start_s > seconds):
            break
    wall_s = time.perf_counter() - start_s
    if not num_samples:
        raise RuntimeError("the epoch ended before the clock started; more windows are needed")
    return {
        "samples_per_s": num_samples / wall_s,
        "cpu_s_per_1000": 1000 * (tree_cpu_s() - cpu_s) / num_samples,
    }


def warm_up(batches: Iterator[dict[str, Any]], entry: Entry, workers: int, form: str) -> None:
    """Take as many batches as can be prefetched, so that none of them is counted."""
    count = max(1, workers) if entry.is_slow else max(2, (PREFETCH + 1) * workers)
    for batch in itertools.islice(batches, count):
        take(batch, form)


def memory_of(
    batches: Iterator[dict[str, Any]], entry: Entry, workers: int, form: str
) -> dict[str, float]:
    """Measure memory of the process tree while it works and is fully prefetched."""
    warm_up(batches, entry, workers, form)
    batch = next(batches)
    take(batch, form)
    time.sleep(SETTLE_S)
    return {"memory_mib": tree_memory_bytes() / 2**20}


def take(batch: dict[str, Any], form: str) -> int:
    """Use a batch as a training step would: make the model's input of it, or touch its memory."""
    if form == "device":
        batch = to_model_inputs(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and not (form == "device" and name in EYES):
            touch(value)
    return len(batch["key"])


def touch(values: Tensor) -> None:
    """Read a byte of every page."""
    values.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()


# --- correctness ------------------------------------------------------------------------------


def check(entry: Entry, store: Store) -> dict[str, Any]:
    """Compare an epoch with the truth: samples, numbers, and PSNR of frames.

    Slow loaders stop after two windows whose truth is known.
    """
    formats = store.root / "formats"
    raw, jpeg = np.load(formats / "truth" / "raw.npz"), np.load(formats / "truth" / "mjpeg.npz")
    numbers = {k: v for f in (formats / "numbers").glob("*.npz") for k, v in _rows(np.load(f))}
    seen: list[str] = []
    errors: list[float] = []
    same_numbers, same_pictures = True, True
    for batch in entry.open(store, min(2, os.cpu_count() or 1), False):
        for i, key in enumerate(batch["key"]):
            if "weight" in batch and not batch["weight"][i]:
                continue
            seen.append(key)
            same_numbers &= all(is_same(batch[n][i].numpy(), numbers[key][n]) for n in NUMBERS)
            if key in raw.files:
                found = pictures_of(batch, i)
                errors.append(np.mean((found.astype(np.float32) - raw[key]) ** 2))
                same_pictures &= np.array_equal(found, jpeg[key])
        if entry.is_slow and len(errors) >= 2:
            break
    if not errors:
        raise RuntimeError("no window with known truth was given")
    return {
        "is_complete": None if entry.is_slow else sorted(seen) == sorted(numbers),
        "has_same_numbers": same_numbers,
        "has_same_pictures": same_pictures,
        "psnr_db": psnr_db(float(np.mean(errors))),
    }


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have the same type, shape and values."""
    return a.dtype == b.dtype and np.array_equal(a, b)


def psnr_db(error: float) -> float | None:
    """Compute PSNR from a mean squared error of 8-bit values; None if there is no error."""
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def pictures_of(batch: dict[str, Any], i: int) -> np.ndarray:
    """Return RGB frames of both cameras, uint8 [2, F, H, W, 3], from any form."""
    if batch[EYES[0]].ndim == 5:
        return np.stack([batch[eye][i].numpy() for eye in EYES])
    inputs = to_model_inputs({eye: batch[eye][i : i + 1] for eye in EYES})
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    values = torch.cat([inputs[eye] for eye in EYES]) * std + mean
    return values.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()


def _rows(file: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    arrays = {name: file[name] for name in NUMBERS}
    for i, key in enumerate(file["key"]):
        yield str(key), {name: values[i] for name, values in arrays.items()}


# --- the process tree -------------------------------------------------------------------------


def tree() -> list[int]:
    """List this process and its descendants."""
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text(encoding="utf-8").split())
    return found


def tree_cpu_s() -> float:
    """Return processor time of the tree, including processes that have ended."""
    ticks = 0
    for pid in tree():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_memory_bytes() -> int:
    """Return anonymous and shared memory of the tree.

    Each page is divided by the number of processes that map it (PSS). Shared memory that only an
    open file holds, on its way between processes, counts. Libraries and the page cache do not.
    """
    pids, total = tree(), 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    maps = (Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in pids)
    mapped = {int(line.split()[4]) for text in maps for line in text.splitlines()}
    held = {}
    for path in (f for pid in pids for f in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(path.readlink()).startswith("/dev/shm/"):
                held[path.stat().st_ino] = path.stat().st_blocks * 512
    return total + sum(size for inode, size in held.items() if inode not in mapped)


if __name__ == "__main__":
    main()
