"""The index of a shard: round trips, stock readers of safetensors, and every kind of damage."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.config import make_section
from shared.errors import ConfigError, CorruptError, FormatVersionError, ShardError
from shared.recipe import Recipe
from shared.shardset import index as index_module
from shared.shardset.index import (
    ShardIndex,
    index_bytes,
    open_index,
    parse_index,
    require_matching,
)
from shared.shardset.layout import columns_of
from shared.streams import MAX_STREAMS

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

DAMAGE = r"header is damaged: .*; fix: rebuild"


def column_entry(name: str) -> dict[str, Any]:
    return {
        "file": f"train-000000.{name}.{'zarr.zip' if name.endswith('dmel') else 'tar'}",
        "length_bytes": 2**41,
        "sha256": "00" * 32,
        "fingerprint": "f",
        "basis": {"qp": 22},
        "rows": {"ann": "r"},
    }


def member_arrays(column: str) -> dict[str, np.ndarray]:
    lengths = {"eye": [9, 0, 8], "mic": [0, 2**40, 7], "mic.dmel": [4, 4, 4]}
    return {
        f"{column}.offset": np.arange(3, dtype=np.uint64) + 2**40,
        f"{column}.length": np.array(lengths[column], np.uint64),
        f"{column}.crc32c": np.arange(3, dtype=np.uint32) + 7,
    }


def tiny_index(*, header: dict[str, Any] | None = None, **arrays: np.ndarray) -> ShardIndex:
    columns = ("eye", "mic", "mic.dmel")
    return ShardIndex(
        header={
            "name": "train-000000",
            "split": "train",
            "streams": ["eye", "mic", "words"],
            "videos": ["eye"],
            "sessions": ["ann", "bøb"],
            "durations_s": [3, 7.5],
            "segment_s": 2.0,
            "columns": {name: column_entry(name) for name in columns},
            "statistics": {"mic": {"count": 3}},
            "decode_failures": [
                {"session": "ann", "segment": 1, "stream": "eye", "reason": "no picture"}
            ],
            **(header or {}),
        },
        arrays={
            "session": np.array([0, 0, 1], np.uint32),
            "segment": np.array([0, 1, 3], np.uint32),
            "present": np.array([[1, 0, 0], [0, 1, 1], [1, 1, 1]], np.uint8),
            "coverage": np.arange(9, dtype=np.float32).reshape(3, 3) / 9,
            "eye.error_s": np.array([[0.0, np.nan]] * 3, np.float32),
            **{name: a for column in columns for name, a in member_arrays(column).items()},
            **arrays,
        },
    )


def layout_of(content: bytes) -> dict[str, Any]:
    """Return the outer header of a safetensors file."""
    return json.loads(content[8 : 8 + struct.unpack_from("<Q", content)[0]])


def with_layout(content: bytes, layout: bytes) -> bytes:
    """Return an index with other bytes for its outer header."""
    return (
        struct.pack("<Q", len(layout))
        + layout
        + content[8 + struct.unpack_from("<Q", content)[0] :]
    )


def with_metadata(content: bytes, metadata: object) -> bytes:
    """Return an index with another value of ``__metadata__``."""
    return with_layout(
        content, json.dumps({**layout_of(content), "__metadata__": metadata}).encode()
    )


def parse(content: bytes) -> ShardIndex:
    return parse_index(content, origin="set/a.index")


def use(index: ShardIndex) -> None:
    """Ask an index for everything that it knows."""
    for row in range(index.num_samples):
        assert index.key(row) == f"{index.session(row)}/{index.segment(row):06d}"
        assert 0 <= index.segment(row) * index.segment_s <= index.duration_s(row)
        assert index.present_streams(row) == tuple(
            name for name in index.streams if index.is_present(row, name)
        )
    assert sum(len(numbers) for _, numbers in index.segments) == index.num_samples
    for column, entry in index.columns.items():
        assert "/" not in entry["file"]
        assert len(index.members(column).offset) == index.num_samples
    assert all(isinstance(failure["reason"], str) for failure in index.decode_failures)


def use_or_refuse(content: bytes) -> bool:
    """Use damaged bytes; return whether they were refused, in one line with a fix."""
    try:
        use(parse(content))
    except ShardError as error:  # any other error fails the test
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert len(message) < 1000
    assert "fix: " in message
    return True


def assert_equal(found: ShardIndex, expected: ShardIndex) -> None:
    assert found.header == expected.header
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype


# --- round trips -----------------------------------------------------------------------------


def test_an_index_comes_back(tmp_path):
    (tmp_path / "a.index").write_bytes(index_bytes(tiny_index()))
    found = open_index(tmp_path / "a.index")
    assert_equal(found, tiny_index())
    use(found)


def test_an_index_answers_by_row_and_stream():
    index = tiny_index()
    assert index.num_samples == 3
    assert [index.key(row) for row in range(3)] == ["ann/000000", "ann/000001", "bøb/000003"]
    assert [index.duration_s(row) for row in range(3)] == [3.0, 3.0, 7.5]
    assert index.segments == [("ann", [0, 1]), ("bøb", [3])]
    assert [index.present_streams(row) for row in range(3)] == [
        ("eye",),
        ("mic", "words"),
        ("eye", "mic", "words"),
    ]
    assert [index.is_present(row, "mic") for row in range(3)] == [False, True, True]
    assert not index.is_present(0, "undeclared")
    assert index.stream_column("words") == 2
    np.testing.assert_array_equal(index.members("mic.dmel").crc32c, [7, 8, 9])


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}x", fullmatch=True)
SESSIONS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def indexes(draw: st.DrawFn) -> ShardIndex:
    streams = sorted(draw(st.sets(NAMES, min_size=1, max_size=5)))
    columns = sorted(draw(st.sets(st.sampled_from([*streams, *(f"{s}.dmel" for s in streams)]))))
    sessions = draw(st.lists(SESSIONS, unique=True, min_size=1, max_size=3))
    segment_s = draw(st.sampled_from([0.5, 1, 2.0, 7.25]))
    rows = sorted(
        draw(st.sets(st.tuples(st.integers(0, len(sessions) - 1), st.integers(0, 50)), max_size=9))
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    videos = draw(st.lists(st.sampled_from(streams), unique=True))
    arrays = {
        "session": np.array([s for s, _ in rows], np.uint32),
        "segment": np.array([i for _, i in rows], np.uint32),
        "present": rng.integers(0, 2, (len(rows), len(streams)), np.uint8),
        "coverage": rng.random((len(rows), len(streams)), np.float32),
        **{f"{v}.error_s": rng.random((len(rows), 3), np.float32) for v in videos if v in columns},
    }
    for column in columns:
        for name, dtype in (("offset", np.uint64), ("length", np.uint64), ("crc32c", np.uint32)):
            high = np.iinfo(dtype).max
            arrays[f"{column}.{name}"] = rng.integers(1, high, len(rows), dtype, endpoint=True)
        if not column.endswith(".dmel"):
            arrays[f"{column}.length"] *= arrays["present"][:, streams.index(column)]
    durations_s = draw(
        st.lists(st.floats(400, 1e6), min_size=len(sessions), max_size=len(sessions))
    )
    header = {
        **tiny_index().header,
        "streams": streams,
        "videos": videos,
        "sessions": sessions,
        "durations_s": durations_s,
        "segment_s": segment_s,
        "columns": {name: column_entry(name) for name in columns},
    }
    return ShardIndex(header=header, arrays=arrays)


@given(index=indexes())
def test_any_index_comes_back_and_is_what_stock_safetensors_reads(index):
    content = index_bytes(index)
    found = parse(content)
    assert_equal(found, index)
    use(found)
    stock = safetensors.numpy.load(content)
    assert stock.keys() == index.arrays.keys()
    for name, array in index.arrays.items():
        np.testing.assert_array_equal(stock[name], array)
        assert stock[name].dtype == array.dtype


def test_stock_safe_open_reads_header_and_arrays(tmp_path):
    (tmp_path / "a.index").write_bytes(index_bytes(tiny_index()))
    with safetensors.safe_open(tmp_path / "a.index", framework="numpy") as file:
        assert json.loads(file.metadata()["vr_creature"]) == {"version": 3, **tiny_index().header}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            np.testing.assert_array_equal(file.get_tensor(name), tiny_index().arrays[name])


def test_an_index_is_readable_by_struct_json_and_numpy():
    content = index_bytes(tiny_index())
    start = 8 + struct.unpack_from("<Q", content)[0]
    layout = layout_of(content)
    assert json.loads(layout.pop("__metadata__")["vr_creature"])["sessions"] == ["ann", "bøb"]
    dtypes = {"U8": "u1", "U32": "<u4", "U64": "<u8", "F32": "<f4"}
    for name, entry in layout.items():
        first, last = entry["data_offsets"]
        found = np.frombuffer(content[start + first : start + last], dtypes[entry["dtype"]])
        np.testing.assert_array_equal(found.reshape(entry["shape"]), tiny_index().arrays[name])


def test_an_index_written_by_the_library_is_read():
    metadata = layout_of(index_bytes(tiny_index()))["__metadata__"]
    assert_equal(parse(safetensors.numpy.save(dict(tiny_index().arrays), metadata)), tiny_index())


def test_every_array_is_aligned_to_its_items():
    content = index_bytes(tiny_index())
    start = 8 + struct.unpack_from("<Q", content)[0]
    assert start % 8 == 0
    for name, array in tiny_index().arrays.items():
        assert (start + layout_of(content)[name]["data_offsets"][0]) % array.itemsize == 0


def test_the_order_in_which_parts_are_given_does_not_change_the_bytes():
    index = tiny_index()
    turned = ShardIndex(
        header=dict(reversed(index.header.items())), arrays=dict(reversed(index.arrays.items()))
    )
    assert index_bytes(turned) == index_bytes(index)


def test_an_open_index_survives_the_truncation_of_its_file(tmp_path):
    path = tmp_path / "a.index"
    path.write_bytes(index_bytes(tiny_index()))
    index = open_index(path)
    assert str(path) not in Path("/proc/self/maps").read_text(), "the next line would be a SIGBUS"
    os.truncate(path, 0)
    assert index.key(2) == "bøb/000003"


def test_unknown_arrays_and_keys_are_ignored():
    """Newer software may add some without a new version of the format."""
    more = tiny_index(header={"new": 1}, **{"eye.gain": np.zeros(3, np.float32)})
    found = parse(index_bytes(more))
    assert found.header["new"] == 1
    use(found)


def test_an_index_of_as_many_streams_as_a_recipe_can_declare_comes_back():
    streams = {
        f"s{i:03d}": {"kind": "audio", "file": "all.mka", "track": i % 64} for i in range(64)
    }
    streams |= {
        f"t{i:03d}": {"kind": "sensor", "key": f"k{i}", "values": [{"count": 1, "type": "scalar"}]}
        for i in range(MAX_STREAMS - 64)
    }
    columns = columns_of(Recipe(streams=streams))
    many = ShardIndex(
        header={
            **tiny_index().header,
            "streams": sorted(streams),
            "videos": [],
            "columns": {name: column_entry("mic") for name in columns},
        },
        arrays={
            "session": np.zeros(1, np.uint32),
            "segment": np.zeros(1, np.uint32),
            "present": np.ones((1, MAX_STREAMS), np.uint8),
            "coverage": np.ones((1, MAX_STREAMS), np.float32),
            **{
                f"{name}.{part}": np.ones(1, dtype)
                for name in columns
                for part, dtype in (("offset", "u8"), ("length", "u8"), ("crc32c", "u4"))
            },
        },
    )
    assert_equal(parse(index_bytes(many)), many)
    one_more = {**streams, "extra": {"kind": "text", "file": "a.jsonl"}}
    with pytest.raises(ConfigError, match="513 streams, more than 512; fix"):
        make_section(Recipe, {"streams": one_more}, origin="recipe")


# --- versions --------------------------------------------------------------------------------


def test_an_index_of_format_2_is_refused_with_the_command_that_upgrades():
    with pytest.raises(FormatVersionError, match=r"fix: run `python -m preprocess upgrade set`"):
        parse(struct.pack("<8sII", b"VRCINDEX", 2, 2) + b"{}")


@pytest.mark.parametrize(
    ("version", "message"), [(4, "version 4 is not 3.*update the program"), (2, "upgrade set`")]
)
def test_an_index_of_another_version_is_refused_with_what_to_do(version, message):
    header = {**tiny_index().header, "version": version}
    content = with_metadata(index_bytes(tiny_index()), {"vr_creature": json.dumps(header)})
    with pytest.raises(FormatVersionError, match=message):
        parse(content)


@pytest.mark.parametrize("version", ["3", 3.0, None, True, [3]])
def test_a_version_that_is_no_number_is_corrupt(version):
    header = {**tiny_index().header, "version": version}
    content = with_metadata(index_bytes(tiny_index()), {"vr_creature": json.dumps(header)})
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(content)


# --- damaged files ---------------------------------------------------------------------------


def test_a_missing_index_is_a_shard_error(tmp_path):
    with pytest.raises(ShardError, match="no such index"):
        open_index(tmp_path / "gone.index")


def test_a_folder_is_a_corrupt_index(tmp_path):
    with pytest.raises(CorruptError, match="can't be read"):
        open_index(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "a.index").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="1099511627776 bytes; the limit is"):
        open_index(tmp_path / "a.index")


def test_a_truncated_index_is_corrupt_at_any_length():
    content = index_bytes(tiny_index())
    for length in range(len(content)):
        with pytest.raises(CorruptError):
            parse(content[:length])


def test_bytes_after_the_last_array_are_corrupt():
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(index_bytes(tiny_index()) + b"\x00")


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 100, b"", b"x", bytes(8), b"\xff" * 1000])
def test_a_file_of_another_kind_is_not_an_index(content):
    with pytest.raises(CorruptError):
        parse(content)


def test_a_header_over_the_limit_is_corrupt(monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_HEADER_BYTES", 100)
    with pytest.raises(CorruptError, match="are not a shard index"):
        parse(index_bytes(tiny_index()))


def test_safetensors_of_another_program_are_corrupt():
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, {"format": "pt"}))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with up to three changed, or fewer bytes; the header is hit most of the time."""
    if rng.random() < 0.2:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    header_bytes = 8 + struct.unpack_from("<Q", content)[0]
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(header_bytes if rng.random() < 0.7 else len(content))
        changed[position] ^= rng.randrange(1, 256)
    return bytes(changed)


def test_a_thousand_damaged_indexes_are_refused_or_usable():
    """Checksums that fit the damage: what is read is still complete and in range."""
    rng, content = random.Random(0), index_bytes(tiny_index())
    refused = sum(use_or_refuse(damaged(content, rng)) for _ in range(1000))
    assert 600 < refused < 1000


def test_a_thousand_damaged_indexes_differ_from_the_manifests_checksum():
    rng, content = random.Random(1), index_bytes(tiny_index())
    sha256 = hashlib.sha256(content).hexdigest()
    assert_equal(parse_index(content, origin="a.index", sha256=sha256), tiny_index())
    for _ in range(1000):
        bad = damaged(content, rng)
        if bad != content:
            with pytest.raises(CorruptError):
                parse_index(bad, origin="a.index", sha256=sha256)


# --- self-consistent damage: arrays ----------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [1 << 40, (1 << 40) + 12]},
        {"data_offsets": [0, 12]},
        {"data_offsets": [-12, 0]},
        {"data_offsets": [0.0, 12.0]},
        {"data_offsets": [True, 12]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 12, 24]},
        {"data_offsets": 3},
        {"data_offsets": None},
        {"data_offsets": "ab"},
        {"shape": [1 << 62]},
        {"shape": [1 << 31, 1 << 33]},
        {"shape": [-3]},
        {"shape": [3.0]},
        {"shape": [True]},
        {"shape": [2]},
        {"shape": [3] * 1000},
        {"shape": 3},
        {"shape": None},
        {"dtype": "O"},
        {"dtype": "I64"},
        {"dtype": "U8"},
        {"dtype": ["U32"]},
        {"dtype": None},
    ],
    ids=repr,
)
def test_an_impossible_array_is_corrupt(entry):
    content = index_bytes(tiny_index())
    layout = layout_of(content)
    layout["segment"].update(entry)
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(with_layout(content, json.dumps(layout).encode()))


@pytest.mark.parametrize("entry", [None, 3, [], {}, "x"])
def test_an_entry_that_is_no_array_is_corrupt(entry):
    content = index_bytes(tiny_index())
    layout = {**layout_of(content), "segment": entry}
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(with_layout(content, json.dumps(layout).encode()))


def test_overlapping_arrays_are_corrupt():
    content = index_bytes(tiny_index())
    layout = layout_of(content)
    layout["mic.offset"]["data_offsets"] = layout["eye.offset"]["data_offsets"]
    with pytest.raises(CorruptError, match="does not begin where"):
        parse(with_layout(content, json.dumps(layout).encode()))


def test_a_gap_between_arrays_is_corrupt():
    content = index_bytes(tiny_index(zap=np.zeros(3, np.uint8)))
    layout = layout_of(content)
    del layout["present"]
    with pytest.raises(CorruptError, match="'zap' does not begin where"):
        parse(with_layout(content, json.dumps(layout).encode()))


def test_too_many_arrays_are_corrupt():
    more = {f"x{i}": np.zeros(3, np.uint8) for i in range(8 * MAX_STREAMS)}
    with pytest.raises(CorruptError, match=rf"arrays; the limit is {8 * MAX_STREAMS}"):
        parse(index_bytes(tiny_index(**more)))


@pytest.mark.parametrize("name", sorted(tiny_index().arrays))
def test_an_index_without_an_array_is_corrupt(name):
    index = tiny_index()
    arrays = {n: array for n, array in index.arrays.items() if n != name}
    with pytest.raises(CorruptError, match=f"lacks the array {name};"):
        parse(index_bytes(replace(index, arrays=arrays)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for name in sorted(tiny_index().arrays)
        for change in ("dtype", "dimension", "width")
        if (name, change) != ("eye.error_s", "width")  # the recipe knows the number of frames
    ],
)
def test_an_array_of_another_form_is_corrupt(name, change):
    array = np.nan_to_num(tiny_index().arrays[name])
    wrong = {
        "dtype": array.astype(np.uint8 if array.dtype == np.uint32 else np.uint32),
        "dimension": array.reshape(3, -1)[:, 0] if array.ndim == 2 else array[:, None],
        "width": np.repeat(array.reshape(3, -1), 4, axis=1),
    }
    with pytest.raises(CorruptError, match=f"{name} is .*; fix: rebuild"):
        parse(index_bytes(tiny_index(**{name: wrong[change]})))


@pytest.mark.parametrize("name", ["session", "mic.crc32c", "eye.error_s", "unknown"])
@pytest.mark.parametrize("num_rows", [0, 2, 4])
def test_arrays_of_other_numbers_of_rows_are_corrupt(name, num_rows):
    array = tiny_index(unknown=np.zeros(3, np.uint8)).arrays[name]
    wrong = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    with pytest.raises(CorruptError, match=r"arrays have \[.*\] rows"):
        parse(index_bytes(tiny_index(**{name: wrong})))


def test_an_array_without_a_dimension_is_corrupt():
    with pytest.raises(CorruptError, match=r"arrays have \[0, 3\] rows"):
        parse(index_bytes(tiny_index(unknown=np.zeros((), np.uint8))))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("session", [0, 1, 2], "a session that doesn't exist"),
        ("session", [0, 1, 0], "order of sessions and segments"),
        ("session", [0, 0, 2**32 - 1], "a session that doesn't exist"),
        ("segment", [1, 0, 3], "order of sessions and segments"),
        ("segment", [1, 1, 3], "order of sessions and segments"),
        ("segment", [0, 2, 3], "begins after the end of its session"),
        ("segment", [0, 1, 2**32 - 1], "begins after the end of its session"),
        ("present", [[1, 0, 0], [0, 2, 1], [1, 1, 1]], "other than 0 and 1"),
        ("present", [[255] * 3] * 3, "other than 0 and 1"),
        ("present", [[0] * 3] * 3, "present and the members of eye differ"),
        ("present", [[1, 0, 0], [0, 1, 1], [1, 0, 1]], "present and the members of mic differ"),
        ("eye.length", [9, 1, 8], "present and the members of eye differ"),
        ("mic.dmel.length", [4, 0, 4], "present and the members of mic.dmel differ"),
        ("coverage", [[0, 0, np.nan]] * 3, "no shares"),
        ("coverage", [[0, 0, np.inf]] * 3, "no shares"),
        ("coverage", [[0, 0, -0.5]] * 3, "no shares"),
    ],
)
def test_rows_that_cannot_be_are_corrupt(name, values, message):
    array = np.array(values).astype(tiny_index().arrays[name].dtype)
    with pytest.raises(CorruptError, match=f"{message}; fix: rebuild"):
        parse(index_bytes(tiny_index(**{name: array})))


# --- self-consistent damage: header ----------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [b"", b"[]", b"null", b"{}", b'{"__metadata__": 3}', b"[" * 100_000, b"\xff", b'{"a":1e999}'],
    ids=lambda layout: layout[:16].decode("latin1"),
)
def test_a_broken_layout_is_corrupt(layout):
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(with_layout(index_bytes(tiny_index()), layout))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"vr_creature": {}},
        {"vr_creature": ""},
        {"vr_creature": "[" * 100_000},
        {"vr_creature": "9" * 10_000},
        {"vr_creature": "null"},
        {"vr_creature": '{"version": 3}'},
        {"vr_creature": "\ud800"},
    ],
    ids=lambda metadata: str(metadata)[:30].encode("ascii", "replace").decode(),
)
def test_a_broken_header_is_corrupt(metadata):
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(with_metadata(index_bytes(tiny_index()), metadata))


FOREIGN = ("absent", None, 3, "text", [3], {"a": 3}, [[]], [None], True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, own in sorted(tiny_index().header.items())
        for value in FOREIGN
        # Any text and any mapping will do for these.
        if name not in ("name", "split", "statistics") or type(value) is not type(own)
        if (name, value) != ("segment_s", 3)
    ]
    + [("name", "absent"), ("split", "absent")],
)
def test_a_header_with_a_missing_or_foreign_value_is_corrupt(name, value):
    header = copy.deepcopy(dict(tiny_index().header)) | {"version": 3, name: value}
    if value == "absent":
        del header[name]
    metadata = {"vr_creature": json.dumps(header)}
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(with_metadata(index_bytes(tiny_index()), metadata))


HUGE = 10**400


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streams": []}, "0 streams"),
        ({"streams": ["mic", "eye", "words"]}, "not sorted names"),
        ({"streams": ["eye", "eye", "mic"]}, "not sorted names"),
        ({"streams": ["../eye", "mic", "words"]}, "stream name"),
        ({"streams": ["eye", "mic", "weight"]}, "reserved"),
        ({"streams": [f"s{i:04d}" for i in range(MAX_STREAMS + 1)]}, "streams; the limit is 512"),
        ({"videos": ["ear"]}, "not sorted names"),
        ({"columns": {"ear": column_entry("eye")}}, "'ear' is not a column of its streams"),
        ({"columns": {"mic.": column_entry("eye")}}, "'mic.' is not a column"),
        ({"columns": {"mic.a.b": column_entry("eye")}}, "'mic.a.b' is not a column"),
        ({"columns": {"mic.../x": column_entry("eye")}}, "is not a column"),
        ({"columns": {".dmel": column_entry("eye")}}, "is not a column"),
        ({"sessions": ["ann", 1]}, "not a list of names"),
        ({"sessions": ["ann", ""]}, "not a list of names"),
        ({"sessions": ["ann", "\ud800"]}, "can't encode"),
        ({"sessions": ["ann", "ann"]}, "sessions repeat"),
        ({"sessions": ["ann"]}, "2 durations of 1 sessions"),
        ({"durations_s": [3.0]}, "1 durations of 2 sessions"),
        ({"durations_s": [3.0, -1.0]}, "duration of a session"),
        ({"durations_s": [3.0, float("nan")]}, "duration of a session"),
        ({"durations_s": [3.0, float("inf")]}, "duration of a session"),
        ({"durations_s": [3.0, 1e308]}, "duration of a session"),
        ({"durations_s": [3.0, HUGE]}, "duration of a session"),
        ({"durations_s": [3.0, True]}, "duration of a session"),
        ({"segment_s": 0}, "duration of a segment"),
        ({"segment_s": -2.0}, "duration of a segment"),
        ({"segment_s": float("nan")}, "duration of a segment"),
        ({"segment_s": 1e308}, "duration of a segment"),
        ({"segment_s": HUGE}, "duration of a segment"),
        ({"decode_failures": [{"session": "ann"}]}, "KeyError: 'segment'"),
        ({"decode_failures": ["x"]}, "TypeError"),
    ],
    ids=lambda value: repr(value)[:60].encode("ascii", "replace").decode(),
)
def test_a_header_that_cannot_be_is_corrupt(values, message):
    header = json.dumps({**tiny_index().header, "version": 3, **values})
    content = with_metadata(index_bytes(tiny_index()), {"vr_creature": header})
    with pytest.raises(CorruptError, match=DAMAGE) as caught:
        parse(content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(column_entry("eye")))
@pytest.mark.parametrize("value", ["absent", None, 3.5, [], True])
def test_a_column_with_a_missing_or_foreign_value_is_corrupt(key, value):
    entry = column_entry("eye") | {key: value}
    if value == "absent":
        del entry[key]
    index = tiny_index(header={"columns": {**tiny_index().columns, "eye": entry}})
    with pytest.raises(CorruptError, match=DAMAGE):
        parse(index_bytes(index))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../other.tar", "a/b.tar", "..", ".hidden", "", "a\\b", "a\x00b", "x" * 300],
)
def test_a_column_file_outside_the_set_is_refused(name):
    entry = column_entry("eye") | {"file": name}
    index = tiny_index(header={"columns": {**tiny_index().columns, "eye": entry}})
    with pytest.raises(CorruptError, match="is not a plain file name"):
        parse(index_bytes(index))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=st.data())
def test_a_changed_value_anywhere_in_the_header_is_refused_or_usable(data):
    header = {"version": 3, **copy.deepcopy(dict(tiny_index().header))}
    place: Any = header
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON_VALUES)
    content = with_metadata(index_bytes(tiny_index()), {"vr_creature": json.dumps(header)})
    use_or_refuse(content)


@given(data=st.data())
def test_changed_values_of_any_array_are_refused_or_usable(data):
    name = data.draw(st.sampled_from(sorted(tiny_index().arrays)))
    array = tiny_index().arrays[name]
    size = array.nbytes
    values = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), array.dtype)
    use_or_refuse(index_bytes(tiny_index(**{name: values.reshape(array.shape)})))


# --- the recipe ------------------------------------------------------------------------------

RECIPE = Recipe.model_validate(
    {
        "segment": {"duration_s": 2.0},
        "streams": {
            "eye": {"kind": "video", "file": "eye.mp4", "rate_hz": 1},
            "mic": {"kind": "audio", "file": "mic.wav"},
            "touch": {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "scalar"}]},
        },
    }
)


def require(index: ShardIndex, *names: str, segment_s: float = 2.0) -> None:
    columns = [columns_of(RECIPE)[name] for name in names]
    require_matching(index, columns, segment_s=segment_s, origin="a.index")


def test_an_index_matches_its_recipe():
    require(tiny_index(), "eye", "mic", "mic.dmel")
    require(tiny_index(), "mic")


def test_an_index_without_a_column_does_not_match():
    with pytest.raises(CorruptError, match=r"a\.index: lacks the column touch; fix"):
        require(tiny_index(), "eye", "touch")


def test_segments_of_another_length_do_not_match():
    with pytest.raises(CorruptError, match=r"has segments of 2 s, the recipe says 4; fix"):
        require(tiny_index(), segment_s=4.0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (tiny_index(**{"eye.error_s": np.zeros((3, 5), np.float32)}), "has 5 frames of eye"),
        (
            tiny_index(header={"videos": []}),
            "has None frames of eye in a segment, the recipe says 2",
        ),
        (
            tiny_index(
                header={"videos": ["eye", "mic"]}, **{"mic.error_s": np.zeros((3, 2), np.float32)}
            ),
            "has 2 frames of mic in a segment, the recipe says None",
        ),
    ],
)
def test_frames_of_another_number_do_not_match(index, message):
    with pytest.raises(CorruptError, match=message):
        require(parse(index_bytes(index)), "eye", "mic")


def test_flags_are_an_optional_array_of_a_byte_per_stream():
    assert not tiny_index().flags.any()
    flags = np.array([[0, 1, 0], [2, 0, 4], [7, 0, 0]], np.uint8)
    index = parse_index(index_bytes(tiny_index(flags=flags)), origin="x")
    np.testing.assert_array_equal(index.flags, flags)
    for wrong in (flags[:, :2], flags.astype(np.uint32), flags[:2]):
        with pytest.raises(CorruptError, match=DAMAGE):
            parse_index(index_bytes(tiny_index(flags=wrong)), origin="x")
