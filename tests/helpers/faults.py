"""Damage a shard set in every way that ``tests/experiments/faults.py`` tries.

Bits flip; bytes are cut off, zeroed, missing or exchanged. Hostile sets have names, sizes, numbers
and media that a reader must refuse, in indexes and members with correct checksums.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg

from helpers import sets as tiny_sets
from shared.kinds.column import MAX_MEMBER_BYTES
from shared.media.yuv import encode_h264
from shared.shardset.index import index_bytes, open_index

Fault = Callable[[Path, random.Random], None]

UNREAD = {"rejected.jsonl", "sessions.jsonl"}
"""Files that no reader of samples opens."""


def flip_any_bit(shards: Path, rng: random.Random) -> None:
    """Flip one bit: half of the time in a random byte of the set, else in a random file."""
    files = sorted(path for path in shards.iterdir() if path.name not in UNREAD)
    sizes = [path.stat().st_size for path in files]
    weights = sizes if rng.random() < 0.5 else [float(size > 0) for size in sizes]
    flip(rng.choices(files, weights)[0], rng)


def flip(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        position = rng.randrange(path.stat().st_size)
        file.seek(position)
        value = file.read(1)[0] ^ (1 << rng.randrange(8))
        file.seek(position)
        file.write(bytes([value]))


def flip_in(pattern: str) -> Fault:
    return lambda shards, rng: flip(pick(shards, pattern, rng), rng)


def truncate(pattern: str) -> Fault:
    def fault(shards: Path, rng: random.Random) -> None:
        path = pick(shards, pattern, rng)
        with path.open("r+b") as file:
            file.truncate(rng.randrange(path.stat().st_size))

    return fault


def remove(pattern: str) -> Fault:
    return lambda shards, rng: pick(shards, pattern, rng).unlink()


def swap(pattern: str) -> Fault:
    """Exchange the names of two files."""

    def fault(shards: Path, rng: random.Random) -> None:
        first, second = rng.sample(sorted(shards.glob(pattern)), 2)
        between = shards / "between"
        first.rename(between)
        second.rename(first)
        between.rename(second)

    return fault


def zero_page(pattern: str) -> Fault:
    """Zero a block of 512 bytes, as if the disk had lost it."""

    def fault(shards: Path, rng: random.Random) -> None:
        path = pick(shards, pattern, rng)
        content = bytearray(path.read_bytes())
        start = rng.randrange(max(1, len(content) - 512))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
        path.write_bytes(content)

    return fault


def pick(shards: Path, pattern: str, rng: random.Random) -> Path:
    return rng.choice(sorted(p for p in shards.glob(pattern) if p.stat().st_size > 0))


def hostile_member(column: str, make: Callable[[random.Random], bytes]) -> Fault:
    """Replace a member by a hostile one, with correct checksums up to the manifest."""

    def fault(shards: Path, rng: random.Random) -> None:
        content = make(rng)

        def change(index: Any, path: Path, row: int) -> None:
            index.arrays[f"{column}.offset"][row] = path.stat().st_size
            index.arrays[f"{column}.length"][row] = len(content)
            index.arrays[f"{column}.crc32c"][row] = google_crc32c.value(content)
            with path.open("ab") as file:
                file.write(content)

        rewrite_index(shards, column, rng, change)

    return fault


def hostile_index(field: str, value: int) -> Fault:
    """Make an index point elsewhere, with the correct checksum in the manifest."""

    def fault(shards: Path, rng: random.Random) -> None:
        def change(index: Any, _: Path, row: int) -> None:
            index.arrays[f"vision_left.{field}"][row] = value

        rewrite_index(shards, "vision_left", rng, change)

    return fault


def hostile_header(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Fault:
    """Change an index's header and arrays, with the correct checksum in the manifest."""

    def fault(shards: Path, rng: random.Random) -> None:
        def change_both(index: Any, _: Path, __: int) -> None:
            change(index.header, index.arrays)

        rewrite_index(shards, "vision_left", rng, change_both)

    return fault


def without(array: str) -> Fault:
    return hostile_header(lambda _, arrays: arrays.pop(array))


def with_array(name: str, make: Callable[[Any], Any]) -> Fault:
    """Replace an array of the index by the result of `make`."""
    return hostile_header(lambda _, arrays: arrays.update({name: make(arrays[name])}))


def with_header_values(**values: object) -> Fault:
    return hostile_header(lambda header, _: header.update(values))


def with_durations(value: float) -> Fault:
    """Give all sessions of an index the same duration."""

    def change(header: dict[str, Any], _: dict[str, Any]) -> None:
        header["durations_s"] = [value] * len(header["sessions"])

    return hostile_header(change)


def without_key(key: str) -> Fault:
    return hostile_header(lambda header, _: header.pop(key))


def renamed_stream(header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Rename a stream of an index, its column and its arrays."""
    header["streams"] = sorted({*header["streams"], "zzz"} - {"touch"})
    header["columns"]["zzz"] = header["columns"].pop("touch")
    for name in [name for name in arrays if name.startswith("touch.")]:
        arrays[name.replace("touch", "zzz")] = arrays.pop(name)


def hostile_name(shards: Path, rng: random.Random) -> None:
    """Name a tar's member like a system file, with correct checksums."""
    path = pick(shards, "train-*.vision_left.tar", rng)
    content = bytearray(path.read_bytes())
    content[:100] = b"../../../../etc/passwd".ljust(100, b"\0")
    path.write_bytes(content)


def hostile_file(shards: Path, _: random.Random) -> None:
    """Make the manifest name a file outside the set."""

    def lead_out(values: dict[str, Any]) -> None:
        values["shards"][0]["index_file"] = "../../../etc/passwd"

    tiny_sets.edit_manifest(shards, lead_out)


def rewrite_index(
    shards: Path,
    column: str,
    rng: random.Random,
    change: Callable[[Any, Path, int], None],
) -> None:
    """Change a row of a random index, and correct all checksums."""
    manifest = json.loads((shards / "manifest.json").read_text())
    entries = [e for e in manifest["shards"] if e["split"] == "train"]
    rng.shuffle(entries)
    for entry in entries:
        path = shards / entry["index_file"]
        index = open_index(path)
        index = replace(index, arrays={n: a.copy() for n, a in index.arrays.items()})
        rows = index.arrays[f"{column}.length"].nonzero()[0]
        if len(rows):
            break
    change(index, shards / index.columns[column]["file"], int(rng.choice(list(rows))))
    content = index_bytes(index)
    path.write_bytes(content)
    entry["index_sha256"] = hashlib.sha256(content).hexdigest()
    manifest.pop("sha256")
    (shards / "manifest.json").write_text(json.dumps(manifest))


# --- contents of hostile members -------------------------------------------------------------


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header states another size."""
    content = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


def noise_pictures(rng: random.Random) -> bytes:
    """Return a valid member of random pictures."""
    pictures = np.random.default_rng(rng.randrange(1 << 32)).integers(0, 256, (2, 32, 32, 3))
    return b"".join(
        simplejpeg.encode_jpeg(picture, colorsubsampling="420")
        for picture in pictures.astype(np.uint8)
    )


def many_jpegs(_: random.Random) -> bytes:
    return jpeg_of_size(32, 32) * 500


@cache
def large_h264(_: random.Random | None = None) -> bytes:
    """Return a few bytes that claim to be two pictures of 4,096 x 4,096."""
    return encode_h264(np.zeros((2, 4096 * 3 // 2, 4096), np.uint8), qp=51, rate_hz=5)


@cache
def many_h264(_: random.Random | None = None) -> bytes:
    """Return the expected number of pictures, and 500 more behind the last delimiter."""
    delimiter = b"\x00\x00\x00\x01\x09"
    planes = np.zeros((502, 48, 32), np.uint8)
    _, *parts = encode_h264(planes, qp=30, rate_hz=5).split(delimiter)
    head = b"".join(delimiter + part for part in parts[:2])
    return head + b"".join(part[1:] for part in parts[2:])  # each without its delimiter's payload


def deep_json(_: random.Random) -> bytes:
    return b"[" * 1_000_000


def text_member(num_tokens: int, *, token: int = 5, time_s: float = 0.0) -> bytes:
    times_s = [time_s] * num_tokens
    values = {"ids": [token] * num_tokens, "time_s": times_s, "event_s": times_s, "events": []}
    return json.dumps(values).encode()


def hostile_text(make: Callable[[], bytes]) -> Fault:
    return hostile_member("internal_text", lambda _: make())


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 100_000))


COLUMN_FILES = "train-*[rp]"
"""Pattern of the columns: .tar and .zarr.zip."""

FAULTS: dict[str, tuple[int, Fault]] = {
    "any single bit flipped": (0, flip_any_bit),  # 0 means --flips
    "a bit of the manifest flipped": (100, flip_in("manifest.json")),
    "a bit of an index flipped": (100, flip_in("train-*.index")),
    "a bit of the tokenizer flipped": (20, flip_in("tokenizer.json")),
    "512 bytes zeroed in a column": (50, zero_page(COLUMN_FILES)),
    "column truncated": (50, truncate(COLUMN_FILES)),
    "index truncated": (20, truncate("train-*.index")),
    "manifest truncated": (20, truncate("manifest.json")),
    "column missing": (10, remove(COLUMN_FILES)),
    "index missing": (5, remove("train-*.index")),
    "manifest missing": (1, remove("manifest.json")),
    "tokenizer missing": (1, remove("tokenizer.json")),
    "two indexes swapped": (10, swap("train-*.index")),
    "two text columns swapped": (10, swap("train-*.internal_text.tar")),
    "two picture columns swapped": (10, swap("train-*.vision_left.tar")),
    "two sensor columns swapped": (10, swap("train-*.proprio.zarr.zip")),
    "hostile: member named ../../etc/passwd": (5, hostile_name),
    "hostile: manifest names ../../etc/passwd": (1, hostile_file),
    "hostile: picture of 65,535 x 65,535": (
        5,
        hostile_member("vision_left", lambda _: jpeg_of_size(65_535, 65_535) * 2),
    ),
    "hostile: 500 pictures in a member": (3, hostile_member("vision_left", many_jpegs)),
    "hostile: noise for pictures": (20, hostile_member("vision_left", noise)),
    "hostile: noise for text": (20, hostile_member("internal_text", noise)),
    "hostile: JSON a million deep": (3, hostile_member("internal_text", deep_json)),
    "hostile: 48 MB of tokens": (2, hostile_text(lambda: text_member(3_000_000))),
    "hostile: tokens of another vocabulary": (
        5,
        hostile_text(lambda: text_member(1, token=1 << 40)),
    ),
    "hostile: noise for dMel": (10, hostile_member("audio.dmel", noise)),
    "hostile: noise for sensors": (10, hostile_member("proprio", noise)),
    "hostile: member of 2**63 bytes": (3, hostile_index("length", 1 << 63)),
    "hostile: member just below the limit": (3, hostile_index("length", MAX_MEMBER_BYTES)),
    "hostile: member at 2**63": (3, hostile_index("offset", 1 << 63)),
    "hostile: H.264 of 4,096 x 4,096": (2, hostile_member("vision_left", large_h264)),
    "hostile: 500 pictures behind an H.264 delimiter": (
        2,
        hostile_member("vision_left", many_h264),
    ),
    **{
        f"hostile: tokens at {time_s:g} s": (
            2,
            hostile_text(lambda time_s=time_s: text_member(1, time_s=time_s)),
        )
        for time_s in (1e308, -1e308, 3600.0)
    },
    **{
        f"hostile: index without the array {name}": (1, without(name))
        for name in ("present", "coverage", "session", "segment")
    },
    **{
        f"hostile: index without the array {name}": (1, without(name))
        for name in ("internal_text.offset", "audio.dmel.crc32c", "vision_left.error_s")
    },
    **{
        f"hostile: index without {key}": (1, without_key(key))
        for key in ("columns", "sessions", "durations_s", "streams", "videos", "segment_s")
    },
    "hostile: index without the column proprio": (
        1,
        hostile_header(lambda header, _: header["columns"].pop("proprio")),
    ),
    "hostile: column without a file": (
        1,
        hostile_header(lambda header, _: header["columns"].update(proprio={})),
    ),
    "hostile: column of an undeclared stream": (
        1,
        hostile_header(lambda header, _: header["columns"].update(x=header["columns"]["touch"])),
    ),
    "hostile: another name for a stream": (1, hostile_header(renamed_stream)),
    "hostile: streams in another order": (
        1,
        hostile_header(lambda header, _: header["streams"].reverse()),
    ),
    "hostile: a stream named ../../etc/passwd": (
        1,
        hostile_header(lambda header, _: header["streams"].insert(0, "../../etc/passwd")),
    ),
    "hostile: no videos": (1, with_header_values(videos=[])),
    "hostile: sessions that are numbers": (1, with_header_values(sessions=[1] * 50)),
    "hostile: sessions that are a string": (1, with_header_values(sessions="x" * 50)),
    "hostile: sessions that repeat": (
        1,
        with_header_values(sessions=["x"] * 50, durations_s=[2.0] * 50),
    ),
    **{
        f"hostile: sessions of {duration_s:g} s": (1, with_durations(duration_s))
        for duration_s in (float("nan"), float("inf"), 1e308, -1.0)
    },
    **{
        f"hostile: segments of {segment_s:g} s": (1, with_header_values(segment_s=segment_s))
        for segment_s in (float("nan"), 1e308, 0.0, 1e-300)
    },
    "hostile: segment numbers of 2**32 - 1": (
        1,
        with_array("segment", lambda a: np.full_like(a, 2**32 - 1)),
    ),
    "hostile: the same segment twice": (1, with_array("segment", np.zeros_like)),
    "hostile: rows of sessions that do not exist": (
        1,
        with_array("session", lambda a: np.full_like(a, 2**32 - 1)),
    ),
    "hostile: presence that is not a number": (
        1,
        with_array("present", lambda a: np.full(a.shape, np.nan, np.float32)),
    ),
    "hostile: nothing is present": (1, with_array("present", np.zeros_like)),
    "hostile: everything is present": (5, with_array("present", np.ones_like)),
    "hostile: presence of 255": (1, with_array("present", lambda a: np.full_like(a, 255))),
    "hostile: presence of fewer streams": (
        1,
        with_array("present", lambda a: np.ascontiguousarray(a[:, 1:])),
    ),
    "hostile: coverage that is not a number": (
        1,
        with_array("coverage", lambda a: np.full_like(a, np.nan)),
    ),
    "hostile: segments of two dimensions": (
        1,
        with_array("segment", lambda a: np.stack([a, a], axis=1)),
    ),
    "hostile: fewer rows": (1, with_array("segment", lambda a: a[:-1])),
    "hostile: lengths that are not numbers": (
        1,
        with_array("proprio.length", lambda a: np.full(len(a), np.nan)),
    ),
    "hostile: time errors of fewer frames": (
        1,
        with_array("vision_left.error_s", lambda a: np.ascontiguousarray(a[:, :1])),
    ),
    "hostile: time errors of no dimension": (
        1,
        with_array("vision_left.error_s", lambda a: np.ascontiguousarray(a[:, 0])),
    ),
}
"""Number of trials and the function of each fault, by name."""
