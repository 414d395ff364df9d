"""Corrected headers against stock readers, and what happens when there is no space or power."""

from __future__ import annotations

import collections
import shutil
import struct
import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from helpers.oracles import tiny_recipe

from preprocess.validate import repair
from preprocess.validate.repair import plan_repairs, repair_session
from preprocess.validate.repair_plan import RepairKind
from preprocess.validate.report import check_session
from shared.errors import MachineError
from shared.media import riff
from shared.media.riff import read_wav_header
from shared.media.sound import read_sound

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000
SAMPLES = (8_000 * np.sin(np.arange(2 * RATE_HZ) / 9)).astype("<i2")
RECIPE = tiny_recipe(streams={"mic": {"kind": "audio", "file": "mic.wav"}})
TAGS = b"LIST" + struct.pack("<I", 12) + b"INFOISFT" + bytes(4)


def record(folder: Path, *, riff_bytes: int, data_bytes: int, after: bytes = b"") -> Path:
    """Write a session whose sound has these sizes in its header."""
    folder.mkdir()
    soundfile.write(folder / "mic.wav", SAMPLES, RATE_HZ, subtype="PCM_16")
    content = bytearray((folder / "mic.wav").read_bytes() + after)
    content[4:8], content[40:44] = struct.pack("<I", riff_bytes), struct.pack("<I", data_bytes)
    (folder / "mic.wav").write_bytes(content)
    return folder


SIZES = {
    "never finished": {"riff_bytes": 0, "data_bytes": 0},
    "of an earlier moment": {"riff_bytes": 16_036, "data_bytes": 16_000},
    "outer": {"riff_bytes": 36, "data_bytes": SAMPLES.nbytes},
    "never finished, half a frame": {"riff_bytes": 0, "data_bytes": 0, "after": b"\1"},
    "outer, with tags": {"riff_bytes": 36, "data_bytes": SAMPLES.nbytes, "after": TAGS},
}


@pytest.mark.parametrize("name", SIZES)
def test_a_corrected_file_is_right_for_a_stock_reader(name: str, tmp_path: Path) -> None:
    session = record(tmp_path / "s", **SIZES[name])
    before = (session / "mic.wav").read_bytes()
    [message] = check_session(session, recipe=RECIPE).report.warnings
    assert "all 2.00 s are read; fix: write the right sizes with --fix" in message
    sentences = repair_session(session, recipe=RECIPE)
    assert sentences[0] == "mic.wav: wrote the size of all 2.00 s of sound into the header"
    assert (session / "mic.wav.orig").read_bytes() == before
    with wave.open(str(session / "mic.wav")) as file:
        assert file.readframes(file.getnframes()) == SAMPLES.tobytes()
    size = (session / "mic.wav").stat().st_size
    assert struct.unpack("<I", (session / "mic.wav").read_bytes()[4:8]) == (size - 8,)
    report = check_session(session, recipe=RECIPE).report
    assert (report.warnings, report.errors) == ((), ())
    assert repair_session(session, recipe=RECIPE) == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"riff_bytes": SAMPLES.nbytes + 36, "data_bytes": SAMPLES.nbytes},
        {"riff_bytes": 0xFFFFFFFF, "data_bytes": 0xFFFFFFFF},
        {"riff_bytes": SAMPLES.nbytes + 136, "data_bytes": SAMPLES.nbytes + 100},  # cut off
    ],
)
def test_a_header_that_is_right_or_promises_more_is_not_changed(sizes, tmp_path):
    session = record(tmp_path / "s", **sizes)
    assert repair_session(session, recipe=RECIPE) == []


def test_sound_past_the_limit_becomes_rf64_with_its_holes(tmp_path, monkeypatch):
    session = tmp_path / "s"
    session.mkdir()
    samples = np.zeros((3_000_000, 1), np.int16)
    samples[:100], samples[-100:] = 1_000, 2_000
    soundfile.write(session / "mic.wav", samples, RATE_HZ)
    content = bytearray((session / "mic.wav").read_bytes())
    monkeypatch.setattr(riff, "_MODULUS", 1 << 20)
    size = samples.nbytes % (1 << 20)
    content[4:8], content[40:44] = struct.pack("<I", size + 36), struct.pack("<I", size)
    (session / "mic.wav").write_bytes(content)
    repair_session(session, recipe=RECIPE)
    repaired = session / "mic.wav"
    head = repaired.read_bytes()[:80]
    assert (head[:4], head[12:16]) == (b"RF64", b"ds64")
    assert struct.unpack("<QQ", head[20:36]) == (repaired.stat().st_size - 8, samples.nbytes)
    assert repaired.stat().st_blocks * 512 < samples.nbytes / 2
    # The lowered limit is what marks a size in ds64; for others it is 0xFFFFFFFF.
    patched = bytearray(repaired.read_bytes())
    patched[4:8] = patched[76:80] = b"\xff" * 4
    (tmp_path / "stock.wav").write_bytes(patched)
    np.testing.assert_array_equal(
        soundfile.read(tmp_path / "stock.wav", dtype="int16")[0], samples[:, 0]
    )
    monkeypatch.undo()
    header = read_wav_header(tmp_path / "stock.wav")
    assert (header.num_bytes, header.is_wrong) == (samples.nbytes, False)


def test_without_space_for_a_copy_the_file_stays_and_the_message_says_why(tmp_path, monkeypatch):
    session = record(tmp_path / "s", riff_bytes=0, data_bytes=0)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(repair.shutil, "disk_usage", lambda _: usage(1, 1, 10 << 20))
    assert repair_session(session, recipe=RECIPE) == []
    [message] = check_session(session, recipe=RECIPE).report.warnings
    assert "all 2.00 s are read" in message
    assert "(--fix does not: it needs" in message
    assert [path.name for path in session.iterdir()] == ["mic.wav"]


def test_a_copy_that_fails_leaves_the_original(tmp_path, monkeypatch):
    session = record(tmp_path / "s", riff_bytes=0, data_bytes=0)
    before = (session / "mic.wav").read_bytes()

    def fail(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repair, "corrected_head", fail)
    with pytest.raises(MachineError, match="No space left"):
        repair_session(session, recipe=RECIPE)
    monkeypatch.undo()
    assert (session / "mic.wav").read_bytes() == before
    assert len(repair_session(session, recipe=RECIPE)) == 2
    assert read_sound(session / "mic.wav", rate_hz=RATE_HZ).duration_s == 2.0
    assert not list(session.glob("*repair*"))


def test_the_plan_names_the_repair_and_changes_nothing(tmp_path):
    session = record(tmp_path / "s", riff_bytes=0, data_bytes=0)
    shutil.copytree(session, tmp_path / "copy")
    plan = plan_repairs(session, recipe=RECIPE)
    assert plan.covers(RepairKind.SIZES, "mic.wav")
    assert (session / "mic.wav").read_bytes() == (tmp_path / "copy" / "mic.wav").read_bytes()
