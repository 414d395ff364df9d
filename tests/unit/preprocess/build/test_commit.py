"""What is not in a shard set has a line that says why."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.oracles import build, jsonl, open_indexes, tiny_recipe, write_tiny_session
from helpers.sessions import sensor_lines, write_lines, write_video

from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def odd_sessions(tmp_path_factory) -> Path:
    """Sessions with a flaw each, 3 s long."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("whole", "lines", "cut", "outside", "deaf"):
        write_tiny_session(root / name, 3.0)
    write_tiny_session(root / "tail", 2.1)
    write_tiny_session(root / "blind", 3.0)
    (root / "blind" / "vision_left.mp4").unlink()
    with (root / "lines" / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('no json\n{"timestamp": "soon"}\n{"timestamp": 2.99, "tou')
    video = root / "cut" / "vision_left.mp4"
    write_video(video, times_s=np.arange(90) / 30, gop=30, b_frames=0)
    content = bytearray(video.read_bytes())
    place = content.find(b"mdat") + 4
    third = (len(content) - place) // 3
    for i in range(place + third, place + 2 * third):
        content[i] ^= 0x55
    video.write_bytes(content)
    late = {"timestamp": 99.0, "stream": "external", "text": "too late"}
    write_lines(root / "outside" / "text.jsonl", [late])
    (root / "deaf" / "audio.wav").write_bytes(b"RIFF, but no more")
    return root


@pytest.fixture(scope="module")
def odd_set(odd_sessions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("odd_set")
    build(odd_sessions, out, tiny_recipe(required=["vision_left"]))
    return out


def lines_of(out: Path, session: str) -> list[dict]:
    return [x for x in jsonl(out / "rejected.jsonl") if x["session"] == session]


def test_a_session_without_a_fault_has_no_line(odd_set):
    assert lines_of(odd_set, "whole") == []


def test_a_session_without_a_required_stream_has_one_line(odd_set):
    [line] = lines_of(odd_set, "blind")
    assert (line["level"], line["segments"]) == ("session", 3)
    assert line["reason"] == "required stream vision_left: vision_left.mp4: no such file"


def test_a_tail_segment_has_a_line(odd_set):
    [line] = lines_of(odd_set, "tail")
    assert (line["level"], line["segment"], line["start_s"]) == ("segment", 2, 2.0)
    assert "of [2, 3) s; segment.min_coverage asks for 50%" in line["reason"]


def test_lines_that_are_no_json_have_a_line_per_kind(odd_set):
    found = lines_of(odd_set, "lines")
    assert {x["level"] for x in found} == {"lines"}
    assert any("line 91: not JSON (and 1 more such lines)" in x["reason"] for x in found)
    assert any("line 92: timestamp is 'soon'" in x["reason"] for x in found)


def test_segments_that_do_not_decode_have_a_line_and_no_member(odd_set):
    found = lines_of(odd_set, "cut")
    assert found
    for line in found:
        assert (line["level"], line["stream"]) == ("stream", "vision_left")
        is_partial = "start_s" in line
        assert (line["reason"] == "no picture of this segment decodes") != is_partial
    lost = {f"cut/{x['segment']:06d}" for x in found if "start_s" not in x}
    assert lost
    for _, index in open_indexes(odd_set):
        for row in range(index.num_samples):
            if index.key(row).startswith("cut/"):
                is_lost = index.key(row) in lost
                assert index.is_present(row, "vision_left") != is_lost
                assert (index.members("vision_left").length[row] == 0) == is_lost
                assert np.isnan(index.arrays["vision_left.error_s"][row]).all() == is_lost


def test_a_text_outside_the_session_has_a_line(odd_set):
    line, absent, silent = lines_of(odd_set, "outside")
    assert line["level"] == "lines"
    assert line["reason"] == "text.jsonl line 1: text 'too late' at 99 s is outside the session"
    assert (absent["level"], absent["stream"]) == ("stream", "external_text")
    assert absent["reason"].startswith("all of its events are outside the session")
    assert (silent["stream"], silent["reason"]) == ("internal_text", "no event of it is recorded")


def test_a_sound_file_that_can_not_be_read_has_a_line(odd_set):
    [line] = lines_of(odd_set, "deaf")
    assert (line["level"], line["stream"]) == ("stream", "audio")
    assert line["reason"].startswith("audio.wav: not a readable audio file")


def test_what_is_planned_is_what_is_there_and_what_is_not(odd_set):
    manifest = read_manifest(odd_set)
    lines = jsonl(odd_set / "rejected.jsonl")
    gone = sum(
        x.get("segments", 0) if x["level"] == "session" else x["level"] == "segment" for x in lines
    )
    assert gone == manifest.counts["segments_rejected"] == 4
    assert manifest.counts["segments_planned"] == 21
    assert sum(s.num_samples for s in manifest.shards) == manifest.counts["samples"] == 17


def test_a_session_of_nothing_but_text_or_sensors_is_usable(tmp_path):
    root = tmp_path / "sessions"
    for name in ("texts", "moves"):
        (root / name).mkdir(parents=True)
    said = [{"timestamp": t, "stream": "internal", "text": "hm"} for t in (0.5, 1.5)]
    write_lines(root / "texts" / "text.jsonl", said)
    write_lines(root / "moves" / "metadata.jsonl", sensor_lines(2.0))
    build(root, tmp_path / "out", tiny_recipe(split={"val_fraction": 0.0}))
    [(_, index)] = open_indexes(tmp_path / "out")
    found = {index.key(row): index.present_streams(row) for row in range(index.num_samples)}
    assert found == {
        "moves/000000": ("proprio", "touch"),
        "moves/000001": ("proprio", "touch"),
        "texts/000000": ("internal_text",),
        "texts/000001": ("internal_text",),
    }
    with zipfile.ZipFile(tmp_path / "out" / "train-000000.proprio.zarr.zip") as archive:
        chunk = np.frombuffer(archive.read("proprio/c/2/0/0"), "<f4")
    assert np.isnan(chunk).all()  # absent is never zero


def test_a_segment_of_nothing_but_silent_text_is_rejected(tmp_path):
    folder = tmp_path / "sessions" / "quiet"
    folder.mkdir(parents=True)
    said = [{"timestamp": t, "stream": "internal", "text": "hm"} for t in (0.5, 4.5)]
    write_lines(folder / "text.jsonl", said)
    build(tmp_path / "sessions", tmp_path / "out", tiny_recipe(split={"val_fraction": 0.0}))
    silent, *lines = lines_of(tmp_path / "out", "quiet")
    assert (silent["level"], silent["stream"]) == ("stream", "external_text")
    assert [line["segment"] for line in lines] == [1, 2, 3, 5]
    assert lines[0]["reason"] == "nothing but silent text of [1, 2) s"
    assert read_manifest(tmp_path / "out").shards[0].runs == (1, 1)


# --- what docs/format.md promises of rejected.jsonl --------------------------------------------


@pytest.fixture(scope="module")
def poor_sessions(tmp_path_factory) -> Path:
    """Sessions of 3 s that lack streams in different ways."""
    root = tmp_path_factory.mktemp("poor")
    for name in ("whole", "no key", "one voice", "short", "link", "two files"):
        write_tiny_session(root / name, 3.0)
    lines = [{k: v for k, v in line.items() if k != "touch"} for line in sensor_lines(3.0)]
    write_lines(root / "no key" / "metadata.jsonl", lines)
    said = {"timestamp": 0.5, "stream": "internal", "text": "hm"}
    write_lines(root / "one voice" / "text.jsonl", [said])
    write_video(root / "short" / "vision_left.mp4", times_s=np.arange(30) / 30)
    (root / "link" / "audio.wav").unlink()
    (root / "link" / "audio.wav").symlink_to(root / "gone.wav")
    for file in ("vision_left.mp4", "audio.wav"):
        (root / "two files" / file).write_bytes(b"\0" * 999)
    for name, file in (("only video", "vision_left.mp4"), ("only empty", "metadata.jsonl")):
        (root / name).mkdir()
        (root / name / file).write_bytes(b"" if "empty" in name else b"\0" * 999)
    (root / "only link").mkdir()
    (root / "only link" / "metadata.jsonl").symlink_to(root / "gone.jsonl")
    return root


def poor_lines(sessions: Path, out: Path, required: list[str]) -> dict[str, list[dict]]:
    build(sessions, out, tiny_recipe(required=required))
    return {path.name: lines_of(out, path.name) for path in sessions.iterdir()}


def test_every_way_to_lack_a_stream_has_a_line(poor_sessions, tmp_path):
    found = poor_lines(poor_sessions, tmp_path, [])
    assert found["whole"] == []
    [line] = found["no key"]
    assert (line["level"], line["stream"]) == ("stream", "touch")
    assert line["reason"] == "metadata.jsonl holds no usable reading of it"
    [line] = found["one voice"]
    assert (line["level"], line["stream"]) == ("stream", "external_text")
    [line] = found["link"]
    assert (line["level"], line["stream"]) == ("stream", "audio")
    assert line["reason"].startswith("audio.wav: links to a missing file; fix:")
    [line] = found["short"]
    assert (line["level"], line["stream"], line["segment"]) == ("stream", "vision_left", 2)
    assert line["reason"] == "covers none of [2, 3) s"
    assert {line["stream"] for line in found["two files"]} == {"audio", "vision_left"}


def test_the_reason_of_the_only_file_is_in_the_line_of_its_session(poor_sessions, tmp_path):
    found = poor_lines(poor_sessions, tmp_path, [])
    for name, reason in (
        ("only video", "vision_left.mp4: "),
        ("only empty", "metadata.jsonl: has no line"),
        ("only link", "metadata.jsonl: links to a missing file"),
    ):
        [line] = [line for line in found[name] if line["level"] == "session"]
        assert reason in line["reason"]


def test_a_rejected_session_keeps_the_reasons_of_its_other_files(poor_sessions, tmp_path):
    found = poor_lines(poor_sessions, tmp_path, ["vision_left"])
    session, stream = found["two files"]
    assert session["level"] == "session"
    assert session["reason"].startswith("required stream vision_left: vision_left.mp4: ")
    assert (stream["level"], stream["stream"]) == ("stream", "audio")
    assert stream["reason"].startswith("audio.wav: ")
