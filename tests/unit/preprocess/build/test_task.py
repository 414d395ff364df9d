"""What is in a shard set: every segment, each in its place, as it was recorded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import webdataset
import zarr
from helpers.oracles import (
    HELD_OUT,
    SESSIONS,
    build,
    check_set,
    jsonl,
    open_indexes,
    psnr_db,
    set_keys,
    slow_segments,
    tar_members,
    tiny_recipe,
    write_tiny_sessions,
)

from shared.kinds.audio import decode_wav
from shared.kinds.text import decode_text
from shared.kinds.video import decode_pictures
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.shardset.columns import ColumnFile, read_chunk
from shared.shardset.index import open_index
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.shardset.index import ShardIndex

RAW = tiny_recipe(video={"codec": "raw"})
COLUMNS = columns_of(RAW)
TARS = [name for name, column in COLUMNS.items() if column.container == "tar"]
ARRAYS = {n: column.array for n, column in COLUMNS.items() if column.container == "zarr"}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory) -> Path:
    return write_tiny_sessions(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def raw_set(sessions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("raw")
    build(sessions, out, RAW)
    return out


@pytest.fixture(scope="module")
def jpeg_set(sessions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("jpeg")
    build(sessions, out, tiny_recipe(video={"codec": "mjpeg"}))
    return out


def member(out: Path, index: ShardIndex, column: str, row: int) -> bytes | None:
    file = ColumnFile(out / index.columns[column]["file"])
    try:
        return file.read(index.members(column), row)
    finally:
        file.close()


def all_keys() -> list[str]:
    """Keys of the segments: every one in which something is recorded."""
    return [
        f"{name}/{int(start_s):06d}"
        for name, duration_s in SESSIONS.items()
        for start_s, _ in slow_segments(duration_s, 1.0)
    ]


# --- completeness ----------------------------------------------------------------------------


def test_every_segment_is_a_sample(raw_set):
    keys = [
        index.key(row) for _, index in open_indexes(raw_set) for row in range(index.num_samples)
    ]
    assert sorted(keys) == all_keys()
    assert jsonl(raw_set / "rejected.jsonl") == []
    manifest = read_manifest(raw_set)
    assert manifest.counts == {
        "sessions": 4,
        "segments_planned": len(keys),
        "samples": len(keys),
        "segments_rejected": 0,
    }
    assert [entry.runs for entry in manifest.shards] == [(2, 4, 1), (2,)]


def test_held_out_sessions_are_in_val_only(raw_set):
    found = {name: index.sessions for name, index in open_indexes(raw_set)}
    assert found == {"train-000000": ["ann", "cat", "dan"], "val-000000": [HELD_OUT]}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("column", TARS)
def test_stock_webdataset_counts_the_members_of_each_column(raw_set, column):
    for name, index in open_indexes(raw_set):
        path = str(raw_set / f"{name}.{column}.tar")
        stock = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
        found = [sample["__key__"] for sample in stock]
        have = [r for r in range(index.num_samples) if index.members(column).length[r]]
        assert found == [index.key(row) for row in have]
        own = [key for key in all_keys() if key.split("/")[0] in index.sessions]
        assert found == [k for k in own if column != "vision_right" or k.startswith("cat/")]


@pytest.mark.parametrize("column", ARRAYS)
def test_stock_zarr_counts_the_rows_of_each_column(raw_set, column):
    for name, index in open_indexes(raw_set):
        path = raw_set / f"{name}.{column}.zarr.zip"
        with zarr.storage.ZipStore(path, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            assert group.attrs["keys"] == [index.key(r) for r in range(index.num_samples)]
            [(array, values)] = group.arrays()
            assert (array, values.shape[0]) == (ARRAYS[column], index.num_samples)
            assert values.shape[1:] == COLUMNS[column].shape


def test_files_of_a_first_build_have_names_without_a_generation(raw_set):
    names = {p.name for p in raw_set.iterdir()}
    own = {f"{s}.{c.name}.{c.suffix}" for s, _ in open_indexes(raw_set) for c in COLUMNS.values()}
    own |= {f"{s}.index" for s, _ in open_indexes(raw_set)}
    assert names == own | {"manifest.json", "rejected.jsonl", "sessions.jsonl", "tokenizer.json"}


def test_times_and_presence_of_each_row_are_in_the_index(raw_set):
    for _, index in open_indexes(raw_set):
        assert index.segment_s == 1.0
        assert index.streams == sorted(RAW.streams)
        for row in range(index.num_samples):
            session = index.key(row).split("/")[0]
            assert index.duration_s(row) == pytest.approx(SESSIONS[session], abs=0.05)
            absent = set() if session == "cat" else {"vision_right"}
            assert set(index.present_streams(row)) == set(RAW.streams) - absent
            shares = dict(zip(index.streams, index.arrays["coverage"][row].tolist(), strict=True))
            assert {name for name, share in shares.items() if share == 0} == absent
            is_tail = index.key(row) in {"bob/000001", "cat/000003"}
            assert (shares["audio"] < 1) == is_tail


# --- raw == shard ----------------------------------------------------------------------------


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def readers(sessions: Path, out: Path) -> dict[str, SessionReader]:
    manifest = read_manifest(out)
    tokenizer = manifest.load_tokenizer()
    return {
        path.name: SessionReader(
            path,
            scan_session(path, recipe=manifest.recipe),
            recipe=manifest.recipe,
            tokenizer=tokenizer,
        )
        for path in sessions.iterdir()
    }


def rows(sessions: Path, out: Path) -> Iterator[tuple]:
    """(index, row, reader of its session, its segment) of every sample."""
    fields = readers(sessions, out)
    assert set_keys(out), "a test that looks at every sample looks at none"
    for _, index in open_indexes(out):
        for row in range(index.num_samples):
            reader = fields[index.session(row)]
            yield index, row, reader, reader.scan.segments(reader.recipe)[index.segment(row)]


@pytest.mark.parametrize("codec", ["raw", "mjpeg"])
def test_pictures_of_shards_are_those_of_the_sessions(request, sessions, codec):
    out = request.getfixturevalue({"raw": "raw_set", "mjpeg": "jpeg_set"}[codec])
    count = 0
    for index, row, reader, segment in rows(sessions, out):
        for stream in ("vision_left", "vision_right"):
            content = member(out, index, stream, row)
            assert (content is None) == (stream not in reader.scan.intervals)
            if content is None:
                continue
            [(_, frames)] = reader.iter_frames(stream, [segment])
            spec = reader.recipe.streams[stream]
            found = decode_pictures(content, spec=spec, out=np.zeros_like(frames.pictures))
            if codec == "raw":
                same(found, frames.pictures)
            else:
                assert psnr_db(found, frames.pictures) > 35
            same(index.arrays[f"{stream}.error_s"][row], frames.error_s)
            count += 1
    assert count == len(all_keys()) + 4


def test_sound_of_shards_is_that_of_the_sessions(sessions, raw_set):
    for index, row, reader, segment in rows(sessions, raw_set):
        content = member(raw_set, index, "audio", row)
        same(decode_wav(content), reader.read_audio("audio", segment))
        assert soundfile.info(io.BytesIO(content)).samplerate == 16_000


def test_audio_tokens_of_shards_are_those_of_the_sessions(sessions, raw_set):
    for index, row, reader, segment in rows(sessions, raw_set):
        levels = member(raw_set, index, "audio.dmel", row)
        found = read_chunk(levels, dtype="u1", shape=(50, 16))
        same(found, reader.read_dmel("audio", segment))


@pytest.mark.parametrize(("stream", "size"), [("touch", 5), ("proprio", 20)])
def test_sensors_of_shards_are_those_of_the_sessions(sessions, raw_set, stream, size):
    for index, row, reader, segment in rows(sessions, raw_set):
        content = member(raw_set, index, stream, row)
        found = read_chunk(content, dtype="f4", shape=(30, size))
        same(found, reader.read_sensor(stream, segment))


def test_text_of_shards_is_that_of_the_sessions(sessions, raw_set):
    for index, row, reader, segment in rows(sessions, raw_set):
        said = {"internal_text": f"I am {index.session(row)}", "external_text": "hello, wörld"}
        for stream, expected in said.items():
            found = decode_text(member(raw_set, index, stream, row))
            assert found == reader.read_text(stream, segment)
            assert [e.text for e in found.events] == ([expected] if segment.index == 0 else [])


# --- the specification and the recordings ----------------------------------------------------

FORMAT_PAGE = Path(__file__).parents[4] / "docs" / "format.md"


def code_of_page(heading: str) -> str:
    section = FORMAT_PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_the_reader_in_the_specification_reads_an_index_and_a_member(raw_set, monkeypatch):
    monkeypatch.chdir(raw_set)
    found: dict = {}
    exec(code_of_page("The index"), found)
    expected = open_index(raw_set / "train-000000.index")
    assert found["arrays"].keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found["arrays"][name], array)
    assert found["wav"] == tar_members(raw_set / "train-000000.audio.tar")["ann/000000.audio.wav"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_join_in_the_specification_joins_columns_by_key(raw_set, monkeypatch):
    monkeypatch.chdir(raw_set)
    found: dict = {}
    exec(code_of_page("Joining columns with stock readers"), found)
    joined = found["joined"]
    assert list(joined) == [k for k in all_keys() if not k.startswith(HELD_OUT)]
    for key, sample in joined.items():
        pictures = np.load(io.BytesIO(sample["vision_left.npy"]))
        assert (pictures.shape, sample["touch"].shape) == ((5, 32, 32, 3), (30, 5))
        assert {"audio.wav", "internal_text.json"} < set(sample), key


@pytest.mark.slow
def test_every_segment_of_real_recordings_is_a_sample_or_rejected(real_sessions, tmp_path):
    summary = build(real_sessions[0].parent, tmp_path / "out", tiny_recipe(video={"size": 64}))
    counts = summary.manifest.counts
    assert counts["sessions"] == len(real_sessions)
    assert counts["segments_planned"] == counts["samples"] + counts["segments_rejected"]
    assert counts["samples"] == len(set(set_keys(tmp_path / "out")))
    assert check_set(tmp_path / "out") > counts["samples"]
