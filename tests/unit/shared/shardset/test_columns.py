"""Tar and Zarr columns, read by stock readers, and with damaged bytes."""

from __future__ import annotations

import json
import os
import random
import tarfile
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pytest
import webdataset
import xarray
import zarr
from helpers.oracles import tar_members
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shared.shardset.columns
from shared.errors import CorruptError, MachineError, ShardError
from shared.shardset.columns import (
    ColumnFile,
    TarColumnWriter,
    ZarrArray,
    read_chunk,
    write_zarr_column,
)
from shared.shardset.index import Members

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    "session_1/000000.audio.wav",
    "Sitzung Größe ☃/000001.audio.wav",
    "a.b.c/000002.audio.wav",
    "long" * 40 + "/000003.audio.wav",
    "日本" * 40 + "/1000000.audio.wav",
]
CONTENTS = [b"a", b"b" * 511, b"c" * 512, b"d" * 513, bytes(range(256)) * 5]
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_tar(path: Path, contents: dict[str, bytes], num_samples: int | None = None) -> Members:
    with TarColumnWriter(path, num_samples=num_samples or len(contents)) as writer:
        for row, (name, content) in enumerate(contents.items()):
            writer.add(row, name, content)
    return writer.members()


@pytest.fixture
def tar(tmp_path) -> tuple[Path, Members]:
    path = tmp_path / "train-000000.audio.tar"
    return path, write_tar(path, dict(zip(NAMES, CONTENTS, strict=True)))


# --- tar -------------------------------------------------------------------------------------


def test_stock_tarfile_reads_the_members_in_order(tar):
    path, _ = tar
    assert tar_members(path) == dict(zip(NAMES, CONTENTS, strict=True))
    assert list(tar_members(path)) == NAMES


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_members(tar):
    path, _ = tar
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [n.removesuffix(".audio.wav") for n in NAMES]
    assert [s["audio.wav"] for s in samples] == CONTENTS


def test_offsets_point_exactly_at_the_content(tar):
    path, members = tar
    raw = path.read_bytes()
    for row, content in enumerate(CONTENTS):
        begin = int(members.offset[row])
        assert raw[begin : begin + int(members.length[row])] == content
    with tarfile.open(path) as archive:
        assert members.offset.tolist() == [m.offset_data for m in archive]


def test_a_tar_records_neither_owner_nor_time(tar):
    with tarfile.open(tar[0]) as archive:
        for member in archive:
            found = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert found == (0, 0, 0, "", "", 0o644)


def test_the_same_members_give_the_same_bytes(tar, tmp_path):
    again = tmp_path / "again.tar"
    write_tar(again, dict(zip(NAMES, CONTENTS, strict=True)))
    assert again.read_bytes() == tar[0].read_bytes()


def test_rows_without_a_member_are_absent(tmp_path):
    path = tmp_path / "a.tar"
    with TarColumnWriter(path, num_samples=3) as writer:
        writer.add(1, "s/000001.audio.wav", b"here")
    file = ColumnFile(path)
    found = [file.read(writer.members(), row) for row in range(3)]
    file.close()
    assert found == [None, b"here", None]


def test_an_empty_column_is_a_legal_tar(tmp_path):
    with TarColumnWriter(tmp_path / "a.tar", num_samples=2):
        pass
    assert tar_members(tmp_path / "a.tar") == {}


def test_any_flipped_bit_of_a_member_is_corrupt(tar):
    path, members = tar
    good = path.read_bytes()
    for row in (0, 3):
        for bit in range(8 * len(CONTENTS[row])):
            bad = bytearray(good)
            bad[int(members.offset[row]) + bit // 8] ^= 1 << bit % 8
            if bit % 97 == 0 or len(CONTENTS[row]) == 1:
                path.write_bytes(bad)
                file = ColumnFile(path)
                with pytest.raises(CorruptError, match="checksum is"):
                    file.read(members, row)
                with pytest.raises(CorruptError, match=f"row {row}: checksum is") as caught:
                    file.read_rows(members, range(len(CONTENTS)))
                assert caught.value.offset == int(members.offset[row])
                file.close()


@given(offset=st.integers(0, 2**64 - 1), length=st.integers(1, 2**64 - 1))
@in_one_folder
def test_a_wrong_offset_or_length_is_corrupt(tmp_path, offset, length):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 100)
    members = Members(
        offset=np.array([offset], np.uint64),
        length=np.array([length], np.uint64),
        crc32c=np.array([0], np.uint32),
    )
    file = ColumnFile(path)
    with pytest.raises(CorruptError):
        file.read(members, 0)
    file.close()


def test_a_member_that_is_too_long_is_refused_unread(tar, monkeypatch):
    path, members = tar
    file = ColumnFile(path)
    row = int(members.length.argmax())
    longest = int(members.length[row])
    assert file.read(members, row, max_bytes=longest) == CONTENTS[row]
    monkeypatch.setattr(os, "pread", None)
    message = f"a member of {longest} bytes; the limit is {longest - 1}"
    with pytest.raises(CorruptError, match=message):
        file.read(members, row, max_bytes=longest - 1)
    file.close()


# --- consecutive rows ------------------------------------------------------------------------


class Requests:
    """Counts the bytes of each request to the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        pread = os.pread

        def counted(descriptor: int, size: int, offset: int) -> bytes:
            self.sizes.append(size)
            return pread(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", counted)


def read_rows(path: Path, members: Members, rows: range, **options: Any) -> list[bytes | None]:
    file = ColumnFile(path)
    try:
        contents = file.read_rows(members, rows, **options)
    finally:
        file.close()
    return [None if content is None else bytes(content) for content in contents]


def test_consecutive_rows_are_read_by_one_request(tar, monkeypatch):
    path, members = tar
    requests = Requests(monkeypatch)
    assert read_rows(path, members, range(1, 5)) == CONTENTS[1:]
    assert requests.sizes == [int(members.offset[4] + members.length[4] - members.offset[1])]


def test_stages_end_once_for_one_request(tar):
    stages: list[str] = []
    read_rows(*tar, range(5), on_stage=stages.append)
    assert stages == ["fetch", "checksum"]


def test_absent_rows_cost_no_request(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    with TarColumnWriter(path, num_samples=5) as writer:
        writer.add(1, "s/000001.x", b"one")
        writer.add(3, "s/000003.x", b"three")
    requests = Requests(monkeypatch)
    members = writer.members()
    assert read_rows(path, members, range(5)) == [None, b"one", None, b"three", None]
    assert read_rows(path, members, range(1)) == [None]
    assert read_rows(path, members, range(0)) == []
    assert len(requests.sizes) == 1


def table(parts: list[tuple[int, int]], content: bytes) -> Members:
    """Return the members [offset, offset + length) of a file's content."""
    return Members(
        offset=np.array([offset for offset, _ in parts], np.uint64),
        length=np.array([length for _, length in parts], np.uint64),
        crc32c=np.array(
            [google_crc32c.value(content[offset : offset + n]) for offset, n in parts], np.uint32
        ),
    )


@given(data=st.data())
@in_one_folder
def test_members_in_any_order_are_those_that_single_reads_give(tmp_path, data):
    content = bytes(random.Random(0).randbytes(300_000))
    path = tmp_path / "any"
    path.write_bytes(content)
    part = st.tuples(st.integers(0, 200_000), st.integers(0, 100_000))
    parts = data.draw(st.lists(part, max_size=8))
    members = table(parts, content)
    start = data.draw(st.integers(0, len(parts)))
    rows = range(start, data.draw(st.integers(start, len(parts))))
    expected = [content[o : o + n] or None for o, n in parts[rows.start : rows.stop]]
    assert read_rows(path, members, rows) == expected
    file = ColumnFile(path)
    assert [file.read(members, row) for row in rows] == expected
    file.prefetch(members, rows)
    file.close()


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ([(0, 10), (10, 10)], [20]),
        ([(0, 10), (10 + (64 << 10), 10)], [20 + (64 << 10)]),
        ([(0, 10), (11 + (64 << 10), 10)], [10, 10]),
        ([(10, 10), (0, 10)], [10, 10]),
        ([(0, 10), (9, 10)], [10, 10]),
        ([(0, 10), (0, 10)], [10, 10]),
    ],
)
def test_members_far_apart_or_out_of_order_are_read_apart(tmp_path, monkeypatch, parts, sizes):
    content = bytes(1 << 17)
    (tmp_path / "a").write_bytes(content)
    requests = Requests(monkeypatch)
    read_rows(tmp_path / "a", table(parts, content), range(len(parts)))
    assert requests.sizes == sizes


def test_a_request_for_several_members_is_bounded(tmp_path, monkeypatch):
    content = bytes(300)
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(shared.shardset.columns, "_MAX_SPAN_BYTES", 200)
    requests = Requests(monkeypatch)
    read_rows(tmp_path / "a", table([(0, 100), (100, 100), (200, 100)], content), range(3))
    assert requests.sizes == [200, 100]


def test_each_bad_member_of_a_run_is_named(tar):
    path, members = tar
    good = path.read_bytes()
    for row in range(5):
        bad = bytearray(good)
        bad[int(members.offset[row])] ^= 1
        path.write_bytes(bad)
        offset = int(members.offset[row])
        with pytest.raises(CorruptError, match=f"at {offset}: row {row}: checksum") as caught:
            read_rows(path, members, range(5))
        assert caught.value.offset == offset


def test_a_file_that_shrinks_while_open_names_the_first_missing_member(tar):
    path, members = tar
    file = ColumnFile(path)
    offset = int(members.offset[3])
    os.truncate(path, offset + 10)
    with pytest.raises(CorruptError, match="row 3: only 10 of 513 bytes exist") as caught:
        file.read_rows(members, range(5))
    assert caught.value.offset == offset
    assert [bytes(c) for c in file.read_rows(members, range(3))] == CONTENTS[:3]
    file.close()


def test_prefetch_asks_once_for_consecutive_rows(tar, monkeypatch):
    path, members = tar
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *part: asked.append(part[:2]))
    file = ColumnFile(path)
    file.prefetch(members, range(1, 4))
    start, stop = int(members.offset[1]), int(members.offset[3] + members.length[3])
    assert asked == [(start, stop - start)]
    file.prefetch(replace(members, offset=members.offset + np.uint64(1 << 60)), range(1, 4))
    assert len(asked) == 1, "members outside the file are left to the read"
    file.close()


def test_a_device_error_is_no_damage_of_the_column(tar, monkeypatch, quick_retries):
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(MachineError, match=r"tar: Input/output error.*given up after 4 attempts"):
        read_rows(*tar, range(2))


def test_a_truncated_column_is_corrupt(tar):
    path, members = tar
    path.write_bytes(path.read_bytes()[: int(members.offset[4]) + 10])
    file = ColumnFile(path)
    with pytest.raises(CorruptError, match="past its end"):
        file.read(members, 4)
    file.close()


def test_a_missing_column_is_a_shard_error(tmp_path):
    with pytest.raises(ShardError, match=r"gone\.tar: can't be opened: No such file"):
        ColumnFile(tmp_path / "gone.tar")


# --- zarr ------------------------------------------------------------------------------------


def sensor_arrays(num_samples: int = 3) -> dict[str, ZarrArray]:
    rng = np.random.default_rng(0)
    proprio = rng.normal(size=(num_samples, 4, 6)).astype(np.float32)
    proprio[0, 1] = np.nan
    return {
        "timestamp": ZarrArray(
            values=rng.random((num_samples, 4)),
            dimensions=("sample", "time"),
            fill_value="NaN",
            attributes={"units": "s"},
        ),
        "proprio": ZarrArray(
            values=proprio,
            dimensions=("sample", "time", "joint"),
            fill_value="NaN",
            attributes={"units": "rad"},
        ),
        "valid": ZarrArray(
            values=~np.isnan(proprio).any(axis=2),
            dimensions=("sample", "time"),
            fill_value=False,
            attributes={},
        ),
        "dmel": ZarrArray(
            values=rng.integers(0, 256, (num_samples, 5, 8), np.uint8),
            dimensions=("sample", "frame", "channel"),
            fill_value=255,
            attributes={"long_name": "level"},
        ),
    }


@pytest.fixture
def zarr_file(tmp_path) -> Path:
    path = tmp_path / "train-000000.proprio.zarr.zip"
    write_zarr_column(path, sensor_arrays(), attributes={"keys": ["a/000000", "ä/1", "c/2"]})
    return path


def test_stock_zarr_reads_values_names_and_units(zarr_file):
    with zarr.storage.ZipStore(zarr_file, mode="r") as store:
        group = zarr.open_group(store, mode="r", zarr_format=3)
        assert group.attrs["keys"] == ["a/000000", "ä/1", "c/2"]
        assert sorted(group.array_keys()) == sorted(sensor_arrays())
        for name, array in sensor_arrays().items():
            found = group[name]
            np.testing.assert_array_equal(found[:], array.values)
            assert found.dtype == array.values.dtype
            assert found.metadata.dimension_names == array.dimensions
            assert found.attrs.asdict() == array.attributes
            assert found.chunks == (1, *array.values.shape[1:])


def test_stock_xarray_reads_values_names_and_units(zarr_file):
    with zarr.storage.ZipStore(zarr_file, mode="r") as store:
        opened = xarray.open_zarr(store, consolidated=False, chunks=None)
        for name, array in sensor_arrays().items():
            np.testing.assert_array_equal(opened[name].values, array.values)
            assert opened[name].dims == array.dimensions
            assert opened[name].dtype == array.values.dtype
        assert opened["proprio"].attrs["units"] == "rad"
        assert dict(opened.sizes) == {"sample": 3, "time": 4, "joint": 6, "frame": 5, "channel": 8}


def test_the_zip_module_and_numpy_read_rows(zarr_file):
    with zipfile.ZipFile(zarr_file) as archive:
        assert archive.testzip() is None
        facts = json.loads(archive.read("proprio/zarr.json"))
        assert facts["chunk_grid"]["configuration"]["chunk_shape"] == [1, 4, 6]
        for row, expected in enumerate(sensor_arrays()["proprio"].values):
            content = archive.read(f"proprio/c/{row}/0/0")
            found = np.frombuffer(content, "<f4").reshape(4, 6)
            np.testing.assert_array_equal(found, expected)
        assert {(e.compress_type, e.date_time) for e in archive.infolist()} == {
            (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        }


def test_the_same_arrays_give_the_same_bytes(zarr_file, tmp_path):
    again = tmp_path / "again.zarr.zip"
    write_zarr_column(again, sensor_arrays(), attributes={"keys": ["a/000000", "ä/1", "c/2"]})
    assert again.read_bytes() == zarr_file.read_bytes()


VALUES = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=4),
)


@given(values=VALUES)
@in_one_folder
def test_every_chunk_is_the_row_that_stock_zarr_reads(tmp_path, values):
    path = tmp_path / "any.zarr.zip"
    fill: float | bool | str = "NaN" if values.dtype.kind == "f" else values.dtype.type(0).item()
    array = ZarrArray(
        values=values,
        dimensions=tuple("abcd"[: values.ndim]),
        fill_value=fill,
        attributes={},
    )
    members = write_zarr_column(path, {"x": array}, attributes={})["x"]
    with zarr.storage.ZipStore(path, mode="r") as store:
        stock = zarr.open_group(store, mode="r")["x"][:]
    file = ColumnFile(path)
    for row in range(len(values)):
        content = file.read(members, row)
        found = read_chunk(content, dtype=values.dtype.str[1:], shape=values.shape[1:])
        np.testing.assert_array_equal(found, stock[row])
        assert found.tobytes() == values[row].tobytes()
    file.close()


@pytest.mark.parametrize("size", [0, 1, 3, 7, 9, 16])
def test_a_chunk_of_another_size_is_corrupt(size):
    with pytest.raises(CorruptError, match=r"bytes, expected float32 \(2,\)"):
        read_chunk(b"\x00" * size, dtype="f4", shape=(2,))
