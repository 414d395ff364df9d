"""The index of a shard: round trips, readers of plain struct and json, and every kind of damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import CorruptError, FormatVersionError, ShardError
from shared.shardset.index import (
    ShardIndex,
    index_bytes,
    open_index,
    require_complete,
)

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def tiny_index(**changes: object) -> ShardIndex:
    facts = {
        "name": "train-000000",
        "sessions": ["ann", "bøb"],
        "columns": {"audio": {"file": "train-000000.audio.tar"}},
    }
    arrays = {
        "session": np.array([0, 0, 1], np.uint32),
        "window": np.array([0, 1, 1_000_000], np.uint32),
        "coverage": np.arange(21, dtype=np.float32).reshape(3, 7),
        "start_s": np.array([0.0, 4.0, 8.0]),
        "stop_s": np.array([4.0, 8.0, 12.0]),
        "present": np.array([1, 2, 127], np.uint8),
        "partial": np.array([0, 0, 3], np.uint8),
        "audio.offset": np.array([0, 2**40, 5], np.uint64),
        "audio.length": np.array([1, 0, 3], np.uint64),
        "audio.crc32c": np.array([7, 0, 9], np.uint32),
    }
    return ShardIndex(
        header={**facts, **{k: v for k, v in changes.items() if k in facts}},
        arrays={**arrays, **{k: v for k, v in changes.items() if k not in facts}},
    )


def write_index(folder: Path, content: bytes) -> Path:
    path = folder / "train-000000.index"
    path.write_bytes(content)
    return path


def with_header(content: bytes, header: bytes) -> bytes:
    """Return an index with another header; its arrays move to the offsets of the layout."""
    _, version, length = struct.unpack_from("<8sII", content)
    body = content[-(-(16 + length) // 64) * 64 :]
    start = -(-(16 + len(header)) // 64) * 64
    return (struct.pack("<8sII", b"VRCINDEX", version, len(header)) + header).ljust(
        start, b"\x00"
    ) + body


def header_of(content: bytes) -> dict:
    return json.loads(content[16 : 16 + struct.unpack_from("<I", content, 12)[0]])


def test_an_index_comes_back(tmp_path):
    index = tiny_index()
    found = open_index(write_index(tmp_path, index_bytes(index)))
    assert found.header == index.header
    assert found.arrays.keys() == index.arrays.keys()
    for name, array in index.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert [found.key(row) for row in range(3)] == ["ann/000000", "ann/000001", "bøb/1000000"]
    np.testing.assert_array_equal(found.members("audio").offset, [0, 2**40, 5])


def test_an_index_is_readable_by_struct_json_and_numpy(tmp_path):
    content = index_bytes(tiny_index())
    magic, version, length = struct.unpack_from("<8sII", content)
    assert (magic, version) == (b"VRCINDEX", 2)
    start = -(-(16 + length) // 64) * 64
    for name, (dtype, shape, offset) in header_of(content)["arrays"].items():
        assert offset % 64 == 0
        count = int(np.prod(shape))
        found = np.frombuffer(content, f"<{dtype}", count=count, offset=start + offset)
        np.testing.assert_array_equal(found.reshape(shape), tiny_index().arrays[name])


def test_the_order_in_which_arrays_are_given_does_not_change_the_bytes():
    index = tiny_index()
    turned = ShardIndex(header=index.header, arrays=dict(reversed(index.arrays.items())))
    assert index_bytes(turned) == index_bytes(index)


def test_a_truncated_index_is_corrupt_at_any_length(tmp_path):
    content = index_bytes(tiny_index())
    for length in [*range(0, 700, 13), len(content) - 64 - 12]:
        with pytest.raises(CorruptError):
            open_index(write_index(tmp_path, content[:length]))


@given(data=st.data())
@in_one_folder
def test_a_flipped_bit_gives_an_index_or_a_clear_error(tmp_path, data):
    content = bytearray(index_bytes(tiny_index()))
    header_end = 16 + struct.unpack_from("<I", content, 12)[0]
    bit = data.draw(st.integers(0, 8 * header_end - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = write_index(tmp_path, bytes(content))
    with contextlib.suppress(ShardError):  # any other error fails the test
        index = open_index(path)
        assert [len(index.key(row)) > 0 for row in range(index.num_samples)]


def test_any_flipped_bit_differs_from_the_manifests_checksum(tmp_path):
    content = index_bytes(tiny_index())
    sha256 = hashlib.sha256(content).hexdigest()
    open_index(write_index(tmp_path, content), sha256=sha256)
    for place in range(0, len(content), 101):
        bad = bytearray(content)
        bad[place] ^= 1
        with pytest.raises(ShardError):
            open_index(write_index(tmp_path, bytes(bad)), sha256=sha256)


def test_a_file_of_another_kind_is_not_an_index(tmp_path):
    with pytest.raises(CorruptError, match="not a shard index"):
        open_index(write_index(tmp_path, b"PK\x03\x04" * 100))


def test_a_newer_index_is_refused_with_what_to_do(tmp_path):
    content = bytearray(index_bytes(tiny_index()))
    content[8] = 3
    with pytest.raises(FormatVersionError, match=r"version 3 is newer than 2.*update the program"):
        open_index(write_index(tmp_path, bytes(content)))


def test_a_missing_index_is_a_shard_error(tmp_path):
    with pytest.raises(ShardError, match="no such index"):
        open_index(tmp_path / "gone.index")


@pytest.mark.parametrize(
    "entry",
    [
        ["u4", [3], 1 << 40],
        ["u4", [1 << 62], 0],
        ["u4", [1 << 31, 1 << 33], 0],
        ["u4", [-3], 0],
        ["u4", [3], -64],
        ["u4", [3.0], 0],
        ["u4", [3], None],
        ["u4", 3, 0],
        ["O", [3], 0],
        ["u4", [2], 0],
        [[], [3], 0],
        ["u4", [3]],
        None,
    ],
)
def test_an_impossible_array_is_corrupt(tmp_path, entry):
    content = index_bytes(tiny_index())
    header = header_of(content)
    header["arrays"]["window"] = entry
    path = write_index(tmp_path, with_header(content, json.dumps(header).encode()))
    with pytest.raises(CorruptError, match="header is damaged"):
        open_index(path)


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"null", b"{}", b'{"arrays": 3}', b'{"arrays": {}}', b"[" * 100_000, b"\xff"],
    ids=lambda header: header[:12].decode("latin1"),
)
def test_a_broken_header_is_corrupt(tmp_path, header):
    content = with_header(index_bytes(tiny_index()), header)
    with pytest.raises(CorruptError, match="header is damaged"):
        open_index(write_index(tmp_path, content))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other.tar", "a/b.tar", "..", ".hidden", "", "a\\b", "a\x00b", 3]
)
def test_a_column_file_outside_the_set_is_refused(tmp_path, name):
    content = index_bytes(tiny_index(columns={"audio": {"file": name}}))
    with pytest.raises(CorruptError, match="is not a plain file name"):
        open_index(write_index(tmp_path, content))


def test_an_open_index_survives_the_truncation_of_its_file(tmp_path):
    path = write_index(tmp_path, index_bytes(tiny_index()))
    index = open_index(path)
    assert str(path) not in Path("/proc/self/maps").read_text(), "the next line would be a SIGBUS"
    os.truncate(path, 0)
    assert index.key(2) == "bøb/1000000"


@pytest.mark.parametrize("name", sorted(tiny_index().arrays))
def test_an_index_without_an_array_is_corrupt(tmp_path, name):
    index = tiny_index()
    arrays = {n: array for n, array in index.arrays.items() if n != name}
    content = index_bytes(ShardIndex(header=index.header, arrays=arrays))
    with pytest.raises(CorruptError, match=f"lacks the array {name};"):
        open_index(write_index(tmp_path, content))


@pytest.mark.parametrize("name", sorted(tiny_index().arrays))
@pytest.mark.parametrize("other", ["dtype", "dimension", "width"])
def test_an_array_of_another_form_is_corrupt(tmp_path, name, other):
    array = tiny_index().arrays[name]
    wrong = {
        "dtype": array.astype(np.uint8 if array.dtype == np.uint32 else np.uint32),
        "dimension": array[..., None],
        "width": array.reshape(3, -1)[:, [0, 0]],
    }
    content = index_bytes(tiny_index(**{name: np.ascontiguousarray(wrong[other])}))
    with pytest.raises(CorruptError, match=f"{name} is .*; fix: rebuild"):
        open_index(write_index(tmp_path, content))


@pytest.mark.parametrize("sessions", [["ann", 1], "ab", {"ann": 1, "bob": 2}, None])
def test_sessions_that_are_not_names_are_corrupt(tmp_path, sessions):
    content = index_bytes(tiny_index(sessions=sessions))
    with pytest.raises(CorruptError, match="not a list of names"):
        open_index(write_index(tmp_path, content))


@pytest.mark.parametrize("name", ["start_s", "stop_s"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_window_without_a_time_is_corrupt(tmp_path, name, value):
    content = index_bytes(tiny_index(**{name: np.array([0.0, value, 8.0])}))
    with pytest.raises(CorruptError, match="time is not finite"):
        open_index(write_index(tmp_path, content))


def test_an_unknown_column_is_ignored(tmp_path):
    """Newer software may add some without a new version of the format."""
    more = {**tiny_index().columns, "smell": {"file": "train-000000.smell.tar"}}
    content = index_bytes(tiny_index(columns=more, **{"smell.offset": np.zeros(3, np.float32)}))
    assert "smell" in open_index(write_index(tmp_path, content)).columns


def test_an_index_without_a_column_is_not_complete():
    with pytest.raises(CorruptError, match=r"a\.index: lacks the column vision_left, vision_right"):
        require_complete(tiny_index(), origin="a.index")


def test_a_row_without_a_session_is_corrupt(tmp_path):
    content = index_bytes(tiny_index(session=np.array([0, 1, 2], np.uint32)))
    with pytest.raises(CorruptError, match="a session that doesn't exist"):
        open_index(write_index(tmp_path, content))
