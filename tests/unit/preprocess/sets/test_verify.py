"""verify finds the problems of a set; show describes it."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import sets as tiny_sets

from preprocess.__main__ import cli
from preprocess.sets.verify import describe_sample, describe_set, verify_set
from shared.errors import CorruptError, ShardError, rebuild_hint
from shared.shardset.index import ShardIndex, index_bytes, open_index
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest

COLUMNS = {f"{c.name}.{c.suffix}": c for c in columns_of(tiny_sets.set_recipe()).values()}
"""Suffix of file names -> column."""


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    return tiny_sets.make_set(tmp_path_factory.mktemp("inspect"))


@pytest.fixture
def a_copy(whole_set, tmp_path):
    return tiny_sets.copy_set(whole_set, tmp_path / "set")


def edit_index(root, entry_number, change):
    """Change an index and vouch for it in the manifest, as a bug in the builder would."""
    import hashlib

    entry = json.loads((root / "manifest.json").read_text())["shards"][entry_number]
    path = root / entry["index_file"]
    index = open_index(path)
    header = json.loads(json.dumps(index.header))
    arrays = {name: array.copy() for name, array in index.arrays.items()}
    change(header, arrays)
    content = index_bytes(ShardIndex(header=header, arrays=arrays))
    path.write_bytes(content)

    def vouch(values):
        values["shards"][entry_number]["index_sha256"] = hashlib.sha256(content).hexdigest()

    tiny_sets.edit_manifest(root, vouch)


def shard_with_both_eyes(root):
    """Name of a shard of cat, which has every column."""
    for path in sorted(root.glob("*.index")):
        index = open_index(path)
        if index.sessions == ["cat"]:
            return index.header["name"]
    raise AssertionError("no shard of cat alone")


def test_a_whole_set_has_no_problem(whole_set):
    verdict = verify_set(whole_set)
    assert verdict.problems == ()
    assert verdict.num_samples == 25
    assert verdict.num_shards == len(list(whole_set.glob("*.index")))
    sizes = [p.stat().st_size for c in COLUMNS for p in whole_set.glob(f"*.{c}")]
    assert verdict.length_bytes == sum(sizes)


def test_every_member_is_counted(whole_set):
    tars = [end for end in COLUMNS if end.endswith("tar")]
    in_tars = sum(len(tar_names(p)) for end in tars for p in whole_set.glob(f"*.{end}"))
    num_arrays = len(COLUMNS) - len(tars)  # every sample has a chunk in each
    assert verify_set(whole_set).num_members == in_tars + 25 * num_arrays


def tar_names(path):
    import tarfile

    with tarfile.open(path) as tar:
        return tar.getnames()


@pytest.mark.parametrize("column", COLUMNS)
def test_a_flipped_byte_inside_a_member_is_found_and_named(a_copy, column):
    name = shard_with_both_eyes(a_copy)
    index = open_index(tiny_sets.index_of(a_copy, name))
    offset = int(index.members(COLUMNS[column].name).offset[2])
    tiny_sets.flip_byte(a_copy / f"{name}.{column}", offset + 40)
    problems = verify_set(a_copy).problems
    assert any(f"{name} {index.key(2)}: " in p and "checksum is" in p for p in problems)
    assert any(f"{name}.{column}: checksum differs from its index" in p for p in problems)
    assert len(problems) == 2


@pytest.mark.parametrize("column", COLUMNS)
def test_a_flipped_byte_between_members_is_found(a_copy, column):
    name = shard_with_both_eyes(a_copy)
    path = a_copy / f"{name}.{column}"
    tiny_sets.flip_byte(path, path.stat().st_size - 3)
    assert [f"{path}: checksum differs from its index; {rebuild_hint(a_copy)}"] == list(
        verify_set(a_copy).problems
    )


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_found_once(a_copy, column):
    path = a_copy / f"{shard_with_both_eyes(a_copy)}.{column}"
    path.unlink()
    assert verify_set(a_copy).problems == (
        f"{path}: can't be opened: No such file or directory; {rebuild_hint(a_copy)}",
    )


def test_a_column_cut_short_is_found(a_copy):
    path = a_copy / f"{shard_with_both_eyes(a_copy)}.audio.tar"
    path.write_bytes(path.read_bytes()[:10_000])
    assert any("reach past its end at 10000" in p for p in verify_set(a_copy).problems)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_bad_index_is_found(a_copy, how):
    path = tiny_sets.index_of(a_copy, shard_with_both_eyes(a_copy))
    if how == "missing":
        path.unlink()
    else:
        tiny_sets.flip_byte(path, 200)
    problems = verify_set(a_copy).problems
    assert str(path) in problems[0]
    assert any("samples, but the set has 18" in p for p in problems)


def test_a_flipped_byte_in_the_tokenizer_is_found(a_copy):
    tiny_sets.flip_byte(a_copy / "tokenizer.json", 50)
    (problem,) = verify_set(a_copy).problems
    assert "tokenizer.json: checksum differs" in problem


def test_a_file_that_the_disk_does_not_give_is_unread_and_no_problem(
    a_copy, monkeypatch, quick_retries
):
    path = a_copy / f"{shard_with_both_eyes(a_copy)}.audio.tar"
    preadv = os.preadv

    def fail(fd, *args):
        if Path(f"/proc/self/fd/{fd}").readlink() == path:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, *args)

    monkeypatch.setattr(os, "preadv", fail)
    result = verify_set(a_copy)
    assert result.problems == ()
    (unread,) = result.unread
    assert unread.startswith(f"{path}: Input/output error; ")
    ended = CliRunner().invoke(cli, ["verify", str(a_copy)])
    assert ended.exit_code == 3
    assert "0 problems, 1 files could not be read" in ended.output


def test_a_folder_in_the_place_of_a_file_is_a_problem(a_copy):
    tokenizer = a_copy / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.mkdir()
    (problem,) = verify_set(a_copy).problems
    assert problem == f"{tokenizer}: can't be read: Is a directory; {rebuild_hint(a_copy)}"


@pytest.mark.parametrize("runs", [[6], [2, 3]], ids=["count", "runs"])
def test_a_wrong_count_or_run_of_a_shard_is_found(a_copy, runs):
    def change(values):
        values["shards"][0].update(num_samples=sum(runs), runs=runs)

    tiny_sets.edit_manifest(a_copy, change)
    (problem,) = verify_set(a_copy).problems
    assert "its index has 5 samples in 1 runs, not those of the manifest" in problem


def test_runs_that_do_not_add_up_are_refused(a_copy):
    tiny_sets.edit_manifest(a_copy, lambda values: values["shards"][0].update(runs=[4]))
    with pytest.raises(CorruptError, match=r"runs of 4 of 5 samples"):
        verify_set(a_copy)


def test_an_index_of_other_segments_is_found(a_copy):
    edit_index(a_copy, 0, lambda header, _: header.update(segment_s=0.3))
    assert "train-000000.index: has segments of 0.3 s" in verify_set(a_copy).problems[0]


def test_an_index_of_other_streams_is_found(a_copy):
    def change(header, arrays):
        header["streams"].append("wrist")
        for name in ("present", "coverage"):
            arrays[name] = np.pad(arrays[name], ((0, 0), (0, 1)))

    edit_index(a_copy, 0, change)
    (problem,) = verify_set(a_copy).problems
    assert "train-000000: its index has other streams than the manifest's recipe" in problem


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("samples", "the manifest counts 26 samples, but the set has 25"),
        ("segments_planned", "planned"),
    ],
)
def test_a_wrong_count_of_the_set_is_found(a_copy, name, says):
    def change(values):
        values["counts"][name] += 1

    tiny_sets.edit_manifest(a_copy, change)
    (problem,) = verify_set(a_copy).problems
    assert says in problem


@pytest.mark.parametrize("content", [None, "[1]\n", "{}\n", "not json\n", '{"level": []}\n'])
def test_an_unreadable_list_of_rejected_segments_is_found(a_copy, content):
    path = a_copy / "rejected.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    (problem,) = verify_set(a_copy).problems
    assert str(path) in problem
    assert rebuild_hint(a_copy) in problem


def test_an_unplanned_rejected_segment_is_found(a_copy):
    with (a_copy / "rejected.jsonl").open("a") as file:
        file.write('{"level": "session", "session": "zed", "segments": 3}\n')
    (problem,) = verify_set(a_copy).problems
    assert "25 segments were planned, but 25 samples + 3 rejected" in problem


def test_a_session_in_both_splits_is_found(a_copy):
    def change(values):
        own = next(s for s in values["shards"] if s["split"] == "train")
        values["shards"].append({**own, "name": "val-000009", "split": "val"})

    tiny_sets.edit_manifest(a_copy, change)
    problems = verify_set(a_copy).problems
    assert "val-000009: session ann is in both splits: held-out data leaks" in problems


def test_a_key_in_two_shards_is_found(a_copy):
    def change(values):
        copied = next(s for s in values["shards"] if s["split"] == "train")
        values["shards"].append({**copied, "name": "train-000009"})
        values["counts"]["samples"] += copied["num_samples"]

    tiny_sets.edit_manifest(a_copy, change)
    problems = verify_set(a_copy).problems
    assert sum("occurs twice in the set" in p for p in problems) == 5


# --- show ------------------------------------------------------------------------------------


def described(lines):
    """Values of each name, in order."""
    found = {}
    for name, value in lines:
        found.setdefault(name, []).append(value)
    return found


def test_show_describes_a_set(whole_set):
    lines = described(describe_set(whole_set))
    assert lines["train"][0].startswith("21 samples in ")
    assert lines["val"][0].startswith("4 samples in ")
    [segments] = lines["segments"]
    assert segments.startswith("25 planned = 25 samples + 0 rejected, 0.4 s each")
    assert {column.name for column in COLUMNS.values()} <= set(lines)
    assert lines["proprio"][0] == "sensor: float32 12x20, rad, rad/s, zarr"
    assert lines["vision_left"] == ["video: uint8 2x32x32x3, sRGB 0..255, h264"]


def test_show_draws_the_distribution_of_values(whole_set):
    lines = described(describe_set(whole_set))
    _, drawn_angles, drawn_velocities = lines["proprio"]
    angles = np.concatenate([values[:, :10] for values in finite_proprio(whole_set)])
    counts, _ = np.histogram(angles, 36, (-math.pi, math.pi))
    head, _, drawn = drawn_angles.partition("; ")
    low, high = angles.min(), angles.max()
    numbers = f"{angles.mean():.3g} +- {angles.std():.3g}, {low:.3g} to {high:.3g}"
    assert head == f"angle: rad {numbers}"
    assert (drawn[:6], drawn[-5:]) == ("-3.14 ", " 3.14")
    bars = drawn[6:-5]
    assert [bar == " " for bar in bars] == [n == 0 for n in counts]
    assert {bars[i] for i in np.flatnonzero(counts == counts.max())} == {"█"}
    assert drawn_velocities.startswith("velocity: rad/s ")
    assert lines["audio"][1].startswith("dBFS of segments: ")
    tokens = read_manifest(whole_set).statistics["external_text"]["tokens"]
    assert lines["external_text"][1] == f"{sum(tokens)} tokens of {np.count_nonzero(tokens)} kinds"


def test_show_describes_sets_of_any_streams(tmp_path):
    streams = {
        "hand": {
            "kind": "sensor",
            "key": "touch",
            "values": [{"count": 4, "type": "quaternion"}, {"count": 1, "type": "scalar"}],
        },
        "gone": {"kind": "sensor", "key": "gone", "values": [{"count": 3, "type": "position"}]},
    }
    lines = described(describe_set(tiny_sets.make_set(tmp_path, streams=streams)))
    assert lines["hand"][0] == "sensor: float32 12x5, zarr"
    assert [value.split(":")[0] for value in lines["hand"][1:]] == ["scalar"]
    assert lines["gone"] == ["sensor: float32 12x3, m, zarr"]


def finite_proprio(root):
    """Proprio of the train split, by zarr."""
    for path in root.glob("train-*.proprio.zarr.zip"):
        with zarr.storage.ZipStore(path, mode="r") as store:
            values = zarr.open_group(store, mode="r")["proprio"][:].reshape(-1, 20)
        yield values[np.isfinite(values).all(axis=1)].astype(np.float64)


def test_show_describes_a_sample(whole_set):
    lines = described(describe_sample(whole_set, "cat/000003"))
    assert lines["sample"][0].startswith("cat/000003, row ")
    assert lines["time"] == ["[1.2, 1.6) s of 2.5 s of its session"]
    assert lines["streams"] == [", ".join(sorted(tiny_sets.set_recipe().streams))]
    assert lines["audio.dmel"][0].startswith("320 bytes at ")
    assert lines["vision_right"][1] == "2 frames, worst 0.0 ms off, 0 masked"
    assert lines["internal_text"][1:] == ["   1.30 s  reach"]


def test_show_describes_a_sample_with_few_streams(whole_set):
    lines = described(describe_sample(whole_set, "eve/000000"))
    assert lines["streams"] == ["proprio, touch"]
    assert set(lines) == {"sample", "time", "streams", "proprio", "touch"}


@pytest.mark.parametrize("key", ["cat/999999", "nobody/000000", "cat", "", "cat@000012"])
def test_the_error_for_an_unknown_key_has_an_example(whole_set, key):
    with pytest.raises(ShardError) as found:
        list(describe_sample(whole_set, key))
    assert f"no sample {key!r}; fix: use a key SESSION/SEGMENT such as ann/000000" in str(
        found.value
    )
    window = "; the SEGMENT of a window SESSION@TICK is TICK / (0.4 x model.tick_rate_hz), rounded"
    assert (window in str(found.value)) == ("@" in key)


def test_verify_exits_with_1_if_there_are_problems(a_copy):
    runner = CliRunner()
    good = runner.invoke(cli, ["verify", str(a_copy)])
    assert (good.exit_code, "all good" in good.output) == (0, True)
    shown = runner.invoke(cli, ["show", str(a_copy), "cat/000003"])
    assert (shown.exit_code, "cat/000003, row" in shown.output) == (0, True)
    (a_copy / f"{shard_with_both_eyes(a_copy)}.audio.tar").unlink()
    bad = runner.invoke(cli, ["verify", str(a_copy)])
    assert (bad.exit_code, "1 problems" in bad.stdout, "audio.tar" in bad.stderr) == (1, True, True)
    unknown = runner.invoke(cli, ["show", str(a_copy), "cat/1"])
    assert unknown.exit_code == 1
    assert unknown.stderr.startswith("Error: ")
