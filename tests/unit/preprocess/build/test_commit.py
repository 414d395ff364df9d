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
    line, absent = lines_of(odd_set, "outside")
    assert line["level"] == "lines"
    assert line["reason"] == "text.jsonl line 1: text 'too late' at 99 s is outside the session"
    assert (absent["level"], absent["stream"]) == ("stream", "external_text")
    assert absent["reason"].startswith("all of its events are outside the session")


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
    lines = lines_of(tmp_path / "out", "quiet")
    assert [line["segment"] for line in lines] == [1, 2, 3, 5]
    assert lines[0]["reason"] == "nothing but silent text of [1, 2) s"
    assert read_manifest(tmp_path / "out").shards[0].runs == (1, 1)
