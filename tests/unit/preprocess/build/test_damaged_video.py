"""A damaged video: the same pictures are masked in every build, and the set says which."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from helpers.oracles import (
    build,
    build_with_subtasks,
    check_set,
    file_hashes,
    jsonl,
    open_indexes,
    tiny_recipe,
)

from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.shardset.index import FLAG_BITS
from shared.streams import MaskReason

if TYPE_CHECKING:
    from pathlib import Path

    from shared.kinds.video import Frames

RECIPE = tiny_recipe(
    split={"val_fraction": 0},
    streams={"eye": {"kind": "video", "file": "eye.mp4", "rate_hz": 10, "codec": "raw"}},
)
KINDS = {
    "h264": ("libx264", {"x264-params": "keyint=15:min-keyint=15:scenecut=0:bframes=2"}),
    "h264 open groups": ("libx264", {"x264-params": "keyint=15:scenecut=0:bframes=2:open-gop=1"}),
    "hevc": ("libx265", {"x265-params": "keyint=15:min-keyint=15:open-gop=0:log-level=none"}),
    "mpeg4": ("mpeg4", {"g": "15", "bf": "2"}),
}


def write_session(folder: Path, kind: str) -> bytes:
    """Write 8 s of drifting blocks; return the file's bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    field = np.kron(rng.integers(0, 250, (40, 48, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    codec, options = KINDS[kind]
    with av.open(str(folder / "eye.mp4"), "w") as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(240):
            picture = np.ascontiguousarray(field[i : i + 64, i : i + 96])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return (folder / "eye.mp4").read_bytes()


def zero_block(content: bytes) -> bytes:
    start = len(content) * 2 // 5 // 512 * 512
    return content[:start] + bytes(4096) + content[start + 4096 :]


def garble(content: bytes) -> bytes:
    """Change every byte of whole packets: decoding finds it."""
    with av.open(io.BytesIO(content)) as container:
        starts = [p.pos for p in container.demux(container.streams.video[0]) if p.size]
    first, last = (starts[len(starts) * k // 5] for k in (2, 3))
    last = min(last, first + 4096)
    last = max(start for start in starts if start <= last)
    changed = bytes(byte ^ 0x55 for byte in content[first:last])
    return content[:first] + changed + content[last:]


def read_all(folder: Path) -> dict[int, Frames]:
    scan = scan_session(folder, recipe=RECIPE)
    frames = SessionReader(folder, scan, recipe=RECIPE).iter_frames("eye", scan.segments(RECIPE))
    return {segment.index: of_segment for segment, of_segment in frames}


@pytest.mark.parametrize("fault", [zero_block, garble])
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_a_damaged_video_is_the_same_however_it_is_divided(kind, fault, tmp_path):
    content = write_session(tmp_path / "in" / "ann", kind)
    (tmp_path / "in" / "ann" / "eye.mp4").write_bytes(fault(content))
    build(tmp_path / "in", tmp_path / "whole", RECIPE)
    build_with_subtasks(tmp_path / "in", tmp_path / "split", RECIPE, task_s=1.0)
    assert file_hashes(tmp_path / "split") == file_hashes(tmp_path / "whole")
    check_set(tmp_path / "whole")
    # Reading any segment alone gives what the set has.
    scan = scan_session(tmp_path / "in" / "ann", recipe=RECIPE)
    for _, index in open_indexes(tmp_path / "whole"):
        for row in range(index.num_samples):
            segment = scan.segments(RECIPE)[index.segment(row)]
            reader = SessionReader(tmp_path / "in" / "ann", scan, recipe=RECIPE)
            alone = [frames for _, frames in reader.iter_frames("eye", [segment])]
            stored = index.arrays["eye.error_s"][row]
            found = alone[0].error_s if alone else np.full_like(stored, np.nan)
            np.testing.assert_array_equal(found, stored)


@pytest.mark.parametrize("fault", [zero_block, garble])
def test_what_damage_reaches_is_masked_flagged_and_listed(fault, tmp_path):
    content = write_session(tmp_path / "clean" / "ann", "h264")
    write_session(tmp_path / "in" / "ann", "h264")
    (tmp_path / "in" / "ann" / "eye.mp4").write_bytes(fault(content))
    build(tmp_path / "clean", tmp_path / "expected", RECIPE)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    lines = [line for line in jsonl(tmp_path / "out" / "rejected.jsonl") if "stream" in line]
    assert lines
    assert all(2.0 < line.get("start_s", 3.0) < line.get("stop_s", 4.0) < 6.0 for line in lines)
    expected, found = (read_all(tmp_path / root / "ann") for root in ("clean", "in"))
    num_valid = 0
    for number, frames in found.items():
        is_valid = np.isfinite(frames.error_s)
        num_valid += int(is_valid.sum())
        np.testing.assert_array_equal(
            frames.pictures[is_valid], expected[number].pictures[is_valid]
        )
    assert 50 < num_valid < 80
    flags = {index.segment(r): index.flags[r, 0] for _, index in open_indexes(tmp_path / "out")
             for r in range(index.num_samples)}  # fmt: skip
    bit = FLAG_BITS[MaskReason.DAMAGED]
    assert bit in flags.values() or len(flags) < 8  # a whole segment is lost
    assert flags[0] == flags[max(flags)] == 0
