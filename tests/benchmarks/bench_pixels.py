"""Measure a stored frame by codec, on real footage: bytes, PSNR, and time to the model's input.

    python tests/benchmarks/bench_pixels.py                  7 interleaved rounds
    GOMP_SPINCOUNT=1000 python tests/benchmarks/bench_pixels.py        on busy cores, as train does
    python tests/benchmarks/bench_pixels.py --rounds 3 --windows 1
    python tests/benchmarks/bench_pixels.py --qp 20 22 24 --quality 80 90 95

The footage is the left video of each real session, in windows of 4 s at the default recipe's size
and rate. PSNR is against these scaled pictures, the mean over windows: of the colors that planes
become on the device, and of RGB as decoded on the CPU. Encoding and decoding are timed by the
thread's CPU clock, as one loader process would do it; "device" is normalized float32 from a batch
of planes or RGB, by the wall clock. Each round times every codec once; medians. "to model" is the
total of the default configuration, planes and device, and its share of the total of JPEG at
quality 90 and RGB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.clock import nearest
from shared.kinds.video import decode_pictures, encode_pictures
from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults
from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized_frames

if TYPE_CHECKING:
    from collections.abc import Callable

SESSIONS = Path(__file__).resolve().parents[3] / "shared" / "sessions"
WINDOW_S = 4.0
DEFAULT = VideoDefaults()
NUM_FRAMES = round(WINDOW_S * DEFAULT.rate_hz)
BASE = "mjpeg q90"
LAYOUTS = ("yuv420", "rgb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=3, help="of each session, at most")
    parser.add_argument("--qp", type=int, nargs="+", default=[DEFAULT.qp])
    parser.add_argument("--quality", type=int, nargs="+", default=[DEFAULT.quality])
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    windows = footage(args.windows)
    if not windows:
        sys.exit(f"{SESSIONS}: no session with a left eye; put real recordings there")
    specs = {"raw": VideoDefaults(codec="raw"), "yuv420": VideoDefaults(codec="yuv420")}
    for quality in sorted({90, *args.quality}):
        specs[f"mjpeg q{quality}"] = VideoDefaults(codec="mjpeg", quality=quality)
    for qp in args.qp:
        specs[f"h264 qp{qp}"] = VideoDefaults(codec="h264", qp=qp)
    members = {n: [encode_pictures(w, spec=r) for w in windows] for n, r in specs.items()}
    times_ms = measure(specs, members, windows, rounds=args.rounds)
    show(specs, members, windows, times_ms)


def footage(limit: int) -> list[np.ndarray]:
    """Return windows of real pictures, uint8 [NUM_FRAMES, 224, 224, 3]."""
    windows = []
    for video in sorted(SESSIONS.glob("*/vision_left.mp4")):
        track = read_video_track(video)
        for number in range(min(limit, int(track.stop_s / WINDOW_S))):
            asked_s = number * WINDOW_S + np.arange(NUM_FRAMES) / DEFAULT.rate_hz
            index = nearest(track.times_s, asked_s)[0]
            wanted = sorted({int(i) for i in index})
            have = dict(read_frames(video, track, wanted, spec=DEFAULT))
            if all(int(i) in have for i in index):
                windows.append(np.array([have[int(i)] for i in index]))
    return windows


def measure(
    specs: dict[str, VideoDefaults],
    members: dict[str, list[bytes]],
    windows: list[np.ndarray],
    *,
    rounds: int,
) -> dict[tuple[str, str], float]:
    """Median ms per frame by (codec, what); conversions stand under ("", layout)."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    out = {layout: memory(layout) for layout in LAYOUTS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = {layout: batch_of(members["raw"], specs["raw"], layout) for layout in LAYOUTS}
    on_device = {layout: batch.to(device) for layout, batch in batches.items()}
    for number in range(rounds + 1):  # the first warms up
        times: dict[tuple[str, str], float] = {}
        for name, spec in specs.items():
            times[name, "encode"] = timed(
                lambda spec=spec: [encode_pictures(w, spec=spec) for w in windows]
            )
            for layout in LAYOUTS:
                times[name, layout] = timed(
                    lambda name=name, spec=spec, layout=layout: [
                        decode_pictures(m, spec=spec, out=out[layout]) for m in members[name]
                    ]
                )
        count = len(windows) * NUM_FRAMES
        for layout, batch in on_device.items():
            elapsed = timed(lambda batch=batch: to_float(batch), clock=time.perf_counter)
            times["", layout] = elapsed * count / (batch.shape[0] * NUM_FRAMES)
        if number:
            for what, elapsed in times.items():
                found[what].append(elapsed / count * 1e3)
    return {what: statistics.median(values) for what, values in found.items()}


def timed(work: Callable[[], object], *, clock: Callable[[], float] = time.thread_time) -> float:
    began = clock()
    work()
    return clock() - began


def to_float(batch: torch.Tensor) -> None:
    normalized_frames(batch, torch.float32)
    if batch.is_cuda:
        torch.cuda.synchronize()


def memory(layout: str) -> np.ndarray:
    height, width = DEFAULT.height, DEFAULT.width
    picture = (height * 3 // 2, width) if layout == "yuv420" else (height, width, 3)
    return np.zeros((NUM_FRAMES, *picture), np.uint8)


def batch_of(members: list[bytes], spec: VideoDefaults, layout: str) -> torch.Tensor:
    """Make a batch of at most eight windows."""
    decoded = [decode_pictures(m, spec=spec, out=memory(layout)) for m in members[:8]]
    return torch.from_numpy(np.array(decoded))


def psnr_db(layout: str, members: list[bytes], spec: VideoDefaults, windows: list) -> float:
    """Mean over windows, of RGB in [0, 255] as the model or the CPU has it."""
    found = []
    for member, window in zip(members, windows, strict=True):
        pixels = decode_pictures(member, spec=spec, out=memory(layout))
        frames = normalized_frames(torch.from_numpy(pixels[None]), torch.float32)[0]
        rgb = frames.permute(0, 2, 3, 1).numpy() * np.float32(IMAGENET_STD) * 255
        error = np.mean((rgb + np.float32(IMAGENET_MEAN) * 255 - window) ** 2)
        found.append(10 * np.log10(255**2 / error) if error > 1e-6 else np.inf)
    return float(np.mean(found))


def show(
    specs: dict[str, VideoDefaults],
    members: dict[str, list[bytes]],
    windows: list[np.ndarray],
    times_ms: dict[tuple[str, str], float],
) -> None:
    count = len(windows) * NUM_FRAMES
    print(f"{len(windows)} windows, {count} frames, {torch.get_num_threads()} threads of torch")
    print(
        "codec       B/frame  PSNR planes  PSNR RGB  encode ms  to planes ms  to RGB ms  "
        "to model ms  of JPEG, RGB"
    )
    base_ms = times_ms[BASE, "rgb"] + times_ms["", "rgb"]
    for name, spec in specs.items():
        size = sum(map(len, members[name])) / count
        planes_db, rgb_db = (psnr_db(la, members[name], spec, windows) for la in LAYOUTS)
        to_model_ms = times_ms[name, "yuv420"] + times_ms["", "yuv420"]
        print(
            f"{name:10}  {size:7.0f}  {planes_db:11.2f}  {rgb_db:8.2f}"
            f"  {times_ms[name, 'encode']:9.2f}  {times_ms[name, 'yuv420']:12.3f}"
            f"  {times_ms[name, 'rgb']:9.3f}  {to_model_ms:11.3f}  {to_model_ms / base_ms:12.2f}"
        )
    for layout in LAYOUTS:
        print(f"device, from {layout}: {times_ms['', layout]:.3f} ms per frame")


if __name__ == "__main__":
    main()
