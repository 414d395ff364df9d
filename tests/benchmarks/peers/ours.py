"""Our loader, as ``train`` uses it, and the limits that all loaders are compared with."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import simplejpeg
from windows import BATCH_SIZE, EYES, NUM_FRAMES, SIZE, open_set, split_jpegs, stored_members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from recordings import Store

LIMIT_SAMPLES = 64
"""Windows that a limit goes over again and again."""


def open_ours(store: Store, name: str, workers: int, pixels: str) -> Iterator[dict[str, Any]]:
    """Yield the batches of one epoch in the peers' form."""
    for batch in open_set(store, name, workers=workers, pixels=pixels, is_shuffled=True):
        yield {**batch["inputs"], "key": batch["keys"], "weight": batch["weight"]}


# --- limits -----------------------------------------------------------------------------------


def memcpy(_: Store) -> Callable[[int], None]:
    """Copy a window's frames, as bytes, into warm memory."""
    source = np.full((2, NUM_FRAMES, SIZE, SIZE, 3), 7, dtype=np.uint8)
    target = np.zeros((BATCH_SIZE, *source.shape), dtype=np.uint8)
    return lambda i: np.copyto(target[i % BATCH_SIZE], source)


def jpeg_to_rgb(store: Store) -> Callable[[int], None]:
    """Decode a window's JPEGs into warm memory; nothing is read, checked or collated."""
    samples = [[j for m in members for j in split_jpegs(m)] for members in _stored(store, "mjpeg")]
    out = np.zeros((2 * NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        for jpeg, picture in zip(samples[i % len(samples)], out, strict=True):
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=picture)

    return decode


def h264_to_yuv(store: Store) -> Callable[[int], None]:
    """Decode a window's H.264 to planes that stay in the decoder's own memory."""
    samples = _stored(store, "h264")

    def decode(i: int) -> None:
        found = 0
        for member in samples[i % len(samples)]:
            context = av.CodecContext.create("h264", "r")
            context.thread_type, context.thread_count = "NONE", 1
            packets = (*context.parse(member), *context.parse(), None)
            found += sum(len(context.decode(packet)) for packet in packets)
        assert found == 2 * NUM_FRAMES, found

    return decode


def _stored(store: Store, name: str) -> list[list[bytes]]:
    """Return both cameras' members of some windows, as stored in our set."""
    both = [stored_members(store, name, eye) for eye in EYES]
    keys = itertools.islice(both[0], LIMIT_SAMPLES)
    return [[member for eye in both for member in eye[key]] for key in keys]


def run_limit(
    make: Callable[[Store], Callable[[int], None]], store: Store, workers: int, seconds: float
) -> dict[str, float]:
    """Return samples per second and processor time of `workers` processes at once, at least one."""
    work = make(store)
    context = multiprocessing.get_context("fork")
    count = max(1, workers)
    barrier, results = context.Barrier(count), context.SimpleQueue()

    def repeat() -> None:
        work(0)
        barrier.wait()
        start_s, cpu_s, done = time.perf_counter(), time.process_time(), 0
        while (wall_s := time.perf_counter() - start_s) < seconds:
            work(done)
            done += 1
        results.put((done / wall_s, (time.process_time() - cpu_s) / done))

    processes = [context.Process(target=repeat) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    rates, cpu_s = zip(*found, strict=True)
    return {"samples_per_s": sum(rates), "cpu_s_per_1000": 1000 * float(np.mean(cpu_s))}
