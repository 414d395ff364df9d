"""Independent references in slow plain Python, hypothesis strategies, and tiny shard sets."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from typing import TYPE_CHECKING, Any

import librosa
import numpy as np
from hypothesis import strategies as st
from rich.console import Console

from helpers.sessions import sensor_lines, write_lines, write_tone, write_video
from helpers.sets import merge_sections
from preprocess import cluster as cluster_module
from preprocess.build.job import BuildSummary, build_shards
from preprocess.build.video_subtasks import TASK_S
from preprocess.cluster import Cluster
from shared.recipe import Recipe
from shared.shardset.columns import ColumnFile
from shared.shardset.index import open_index
from shared.shardset.manifest import read_manifest
from shared.streams import DEFAULT_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shared.shardset.index import ShardIndex
    from shared.streams import DmelSettings

GRAIN_S = 1 / 1024
"""Times of the strategies are multiples of this, so that float64 sums of them are exact."""

SESSIONS = {"ann": 2.0, "bob": 1.6, "cat": 3.2, "dan": 1.0}
"""Tiny sessions and their lengths in seconds."""

HELD_OUT = "bob"
"""The session that the tiny recipe's salt puts into val; test_plan.py checks it independently."""


# --- strategies ------------------------------------------------------------------------------


def seconds(low: float = 0.0, high: float = 20.0) -> st.SearchStrategy[float]:
    """Draw times that float64 holds exactly."""
    grains = st.integers(math.ceil(low / GRAIN_S), math.floor(high / GRAIN_S))
    return grains.map(lambda n: n * GRAIN_S)


def increasing_times(min_size: int = 0, max_size: int = 12) -> st.SearchStrategy[list[float]]:
    """Draw increasing times."""
    return st.lists(seconds(), min_size=min_size, max_size=max_size, unique=True).map(sorted)


# --- the clock, slowly -----------------------------------------------------------------------


def slow_segments(duration_s: float, segment_s: float) -> list[tuple[float, float]]:
    """Return (start, stop) of every segment that begins inside [0, duration)."""
    segments = []
    start_s = 0.0
    while start_s < duration_s:
        segments.append((start_s, start_s + segment_s))
        start_s += segment_s
    return segments


def slow_nearest(times_s: Sequence[float], asked_s: float) -> int:
    """Return the index of the nearest time; the earlier of two equally near."""
    return min(range(len(times_s)), key=lambda i: (abs(times_s[i] - asked_s), i))


def slow_interpolate(
    times_s: Sequence[float],
    values: Sequence[float],
    asked_s: float,
    *,
    max_gap_s: float,
    edge_s: float,
    is_angle: bool = False,
) -> float | None:
    """Return one value at one time; None if nothing was recorded near enough."""
    if not times_s or not times_s[0] - edge_s <= asked_s <= times_s[-1] + edge_s:
        return None
    if asked_s <= times_s[0]:
        return values[0]
    if asked_s >= times_s[-1]:
        return values[-1]
    for k in range(len(times_s) - 1):
        if times_s[k] == asked_s:
            return values[k]
        if times_s[k] < asked_s < times_s[k + 1]:
            span_s = times_s[k + 1] - times_s[k]
            if span_s > max_gap_s:
                return None
            rise = values[k + 1] - values[k]
            if is_angle:
                rise = math.remainder(rise, 2 * math.pi)
            return values[k] + rise * (asked_s - times_s[k]) / span_s
    raise AssertionError("unreachable")


def angle_distance(a_rad: float, b_rad: float) -> float:
    """Return the distance of two angles along the shorter arc."""
    return abs(math.remainder(a_rad - b_rad, 2 * math.pi))


# --- sound, slowly ---------------------------------------------------------------------------


def slow_mel_share(
    samples: np.ndarray, start: int, count: int, *, rate_hz: int, settings: DmelSettings
) -> np.ndarray:
    """Compute unrounded dMel levels [count, channels] in float64 by one numpy FFT per frame."""
    hop = rate_hz // settings.rate_hz
    window = np.hanning(settings.fft_size + 1)[:-1]
    filters = librosa.filters.mel(
        sr=rate_hz, n_fft=settings.fft_size, n_mels=settings.channels, dtype=np.float64
    )
    rows = []
    for frame in range(count):
        stop = start + (frame + 1) * hop
        frame_samples = [
            samples[i] / 32768 if 0 <= i < len(samples) else 0.0
            for i in range(stop - settings.fft_size, stop)
        ]
        power = np.abs(np.fft.rfft(window * frame_samples)) ** 2
        level_db = 10 * np.log10(np.maximum(filters @ power, 1e-10))
        rows.append((level_db - settings.floor_db) / (settings.ceiling_db - settings.floor_db))
    return np.array(rows) * (settings.levels - 1)


# --- tiny sessions and sets ------------------------------------------------------------------


def tiny_recipe(**sections: Any) -> Recipe:
    """Make a recipe of one-second segments of 32 pixels; merge sections into it by key.

    The streams are the default seven, none of them required; `required` names exceptions.
    """
    required = sections.pop("required", ())
    values: dict[str, Any] = {
        "segment": {"duration_s": 1.0},
        "video": {"size": 32},
        "audio": {"dmel": {"fft_size": 512, "channels": 16}},
        "text": {"vocab_size": 300},
        "split": {"val_fraction": 0.25, "salt": "salt2"},
        "streams": {n: {**s, "required": n in required} for n, s in DEFAULT_STREAMS.items()},
    }
    streams = sections.pop("streams", None)
    if streams is not None:
        values["streams"] = streams
    return Recipe.model_validate(merge_sections(values, sections))


def write_tiny_session(folder: Path, duration_s: float, *, has_right: bool = False) -> Path:
    """Write a flawless session of video, sound, sensors and text."""
    folder.mkdir(parents=True)
    frames_s = np.arange(round(duration_s * 30)) / 30
    write_video(folder / "vision_left.mp4", times_s=frames_s, b_frames=0)
    if has_right:
        write_video(folder / "vision_right.mp4", times_s=frames_s, b_frames=0, gop=10)
    write_tone(folder / "audio.wav", duration_s)
    write_lines(folder / "metadata.jsonl", sensor_lines(duration_s))
    texts = [
        {"timestamp": 0.25, "stream": "internal", "text": f"I am {folder.name}"},
        {"timestamp": 0.75, "stream": "external", "text": "hello, wörld"},
    ]
    write_lines(folder / "text.jsonl", texts)
    return folder


def write_tiny_sessions(root: Path) -> Path:
    """Write the folder of SESSIONS."""
    for name, duration_s in SESSIONS.items():
        write_tiny_session(root / name, duration_s, has_right=name == "cat")
    return root


def cluster_of(num_workers: int) -> Cluster:
    """Make a silent local Dask cluster, or one of this process for 0 workers."""
    console = Console(file=io.StringIO())
    return Cluster(scheduler=None, num_workers=num_workers, console=console, start_s=0.0)


class DividingCluster(Cluster):
    """Divides shards as for a cluster, but runs everything in this process."""

    def is_in_process(self, *, work_s: float) -> bool:
        del work_s
        return False

    def _run_on_cluster(self, *work: Any) -> Iterator[tuple[int | None, Any]]:
        return cluster_module._run_in_process(*work[:2])


def build(
    sessions: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    num_workers: int = 0,
    keep_old_s: float = 0.0,
    task_s: float = TASK_S,
    **options: bool,
) -> BuildSummary:
    """Run build_shards in this process, or over a local Dask cluster."""
    with cluster_of(num_workers) as cluster:
        return build_shards(
            sessions,
            out,
            recipe=recipe or tiny_recipe(),
            cluster=cluster,
            task_s=task_s,
            keep_old_s=keep_old_s,
            **options,
        )


def build_with_subtasks(
    sessions: Path | str, out: Path | str, recipe: Recipe | None = None, *, task_s: float = 1.0
) -> BuildSummary:
    """Run build_shards in this process, divided into tasks of `task_s` seconds of video."""
    console = Console(file=io.StringIO())
    with DividingCluster(scheduler=None, num_workers=1, console=console) as cluster:
        return build_shards(
            sessions,
            out,
            recipe=recipe or tiny_recipe(),
            cluster=cluster,
            task_s=task_s,
            keep_old_s=0.0,
        )


def tar_members(path: Path) -> dict[str, bytes]:
    """Read the members of a tar by stock tarfile, in order."""
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def file_hashes(folder: Path) -> dict[str, str]:
    """Hash every file by SHA-256, except the cache of scans, which holds times of files."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != "sessions.jsonl"
    }


def file_identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of every file, by name."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the peak signal-to-noise ratio of two uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def open_indexes(out: Path) -> Iterator[tuple[str, ShardIndex]]:
    """Yield name and index of every shard of a set."""
    for entry in read_manifest(out).shards:
        yield entry.name, open_index(out / entry.index_file, sha256=entry.index_sha256)


def check_set(out: Path) -> int:
    """Check every checksum of a set by hashlib, and every member; return the member count."""
    num_members = 0
    manifest = read_manifest(out)
    manifest.load_tokenizer()
    for entry in manifest.shards:
        content = (out / entry.index_file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.index_sha256
        index = open_index(out / entry.index_file)
        for name, column in index.columns.items():
            path = out / column["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == column["sha256"]
            assert path.stat().st_size == column["length_bytes"]
            file = ColumnFile(path)
            members = [file.read(index.members(name), r) for r in range(index.num_samples)]
            num_members += sum(m is not None for m in members)
            file.close()
    return num_members


def set_keys(out: Path) -> list[str]:
    """Return the keys of all samples of a set, in order."""
    return [index.key(r) for _, index in open_indexes(out) for r in range(index.num_samples)]


def set_contents(out: Path) -> dict[tuple[str, str], Any]:
    """Return columns' hashes and index arrays by shard and name, independent of file names."""
    contents: dict[tuple[str, str], Any] = {}
    for shard, index in open_indexes(out):
        for name, column in index.columns.items():
            contents[shard, name] = column["sha256"]
        for name, array in index.arrays.items():
            contents[shard, name] = array.tobytes()
        contents[shard, "decode failures"] = json.dumps(index.decode_failures)
    return contents


MASK = 2**64 - 1


def slow_hashes(text, count):
    """Compute splitmix64 as in its paper, on Python integers."""
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    hashes = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        hashes.append(z ^ (z >> 31))
    return hashes


def slow_permutation(text, values):
    hashes = slow_hashes(text, len(values))
    return [value for _, value in sorted(zip(hashes, values, strict=True), key=lambda p: p[0])]


def slow_epoch(sizes, fingerprint, seed, epoch, block_shards, *, most_samples=2**20):
    """Return every (shard, window): permute shards, then samples inside blocks of shards.

    A shard with more than `most_samples` is permuted as several; a block has no more than that.
    Windows of 40 ticks, 20 apart, at 10 Hz.
    """
    basis = f"{fingerprint}/40/20/10.0/{seed}/{epoch}"
    ranges = []
    for shard, size in enumerate(sizes):
        samples = [(shard, window) for window in range(size)]
        ranges += [samples[i : i + most_samples] for i in range(0, max(size, 1), most_samples)]
    blocks = []
    for number, samples in enumerate(slow_permutation(f"{basis}/shards", ranges)):
        in_block = number - blocks[-1][0] if blocks else block_shards
        if in_block >= block_shards or len(blocks[-1][1]) + len(samples) > most_samples:
            blocks.append((number, []))
        blocks[-1][1].extend(samples)
    return [
        sample
        for block, (_, samples) in enumerate(blocks)
        for sample in slow_permutation(f"{basis}/block/{block}", samples)
    ]


def exact_planes(rgb: np.ndarray) -> np.ndarray:
    """Convert RGB [F, H, W, 3] to unrounded I420 planes, float64 [F, 3H/2, W]."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    packed = []
    for chroma in ((blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128):
        count, height, width = chroma.shape
        quads = chroma.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
        packed.append(quads.reshape(count, height // 4, width))
    return np.concatenate([luma, *packed], axis=1)


def exact_rgb(planes: np.ndarray) -> np.ndarray:
    """Convert I420 planes [F, 3H/2, W] to unrounded RGB, float64 [F, H, W, 3].

    Chroma is at the center of its four pixels and is interpolated linearly.
    """
    count, rows, width = planes.shape
    height = rows * 2 // 3
    luma = planes[:, :height].astype(np.float64)
    chroma = planes[:, height:].reshape(count, 2, height // 2, width // 2).astype(np.float64) - 128
    blue, red = np.moveaxis(_doubled(_doubled(chroma, 2), 3), 1, 0)
    colors = [
        luma + 1.402 * red,
        luma - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587,
        luma + 1.772 * blue,
    ]
    return np.stack(colors, axis=-1).clip(0, 255)


def _doubled(values: np.ndarray, axis: int) -> np.ndarray:
    """Upsample by 2 along an axis; new values are a quarter to each side of the old ones."""
    count = values.shape[axis]
    positions = (np.arange(2 * count) - 0.5) / 2
    before = np.floor(positions).astype(int)
    share = (positions - before).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    low = np.take(values, before.clip(0, count - 1), axis)
    high = np.take(values, (before + 1).clip(0, count - 1), axis)
    return low + share * (high - low)
