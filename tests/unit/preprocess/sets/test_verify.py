"""verify finds the problems of a set; show describes it."""

from __future__ import annotations

import errno
import json
import math

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import sets as tiny_sets

from preprocess.__main__ import cli
from preprocess.sets.verify import describe_sample, describe_set, verify_set
from shared.errors import ShardError, rebuild_hint
from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, index_bytes, open_index
from shared.shardset.manifest import read_manifest

COLUMNS = (
    "vision_left.tar",
    "vision_right.tar",
    "audio.tar",
    "text.tar",
    "proprio.zarr.zip",
    "dmel.zarr.zip",
)


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
    facts = json.loads(json.dumps(index.header))
    arrays = {name: array.copy() for name, array in index.arrays.items()}
    change(facts, arrays)
    content = index_bytes(ShardIndex(header=facts, arrays=arrays))
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
    assert verdict.num_samples == 36
    assert verdict.num_shards == len(list(whole_set.glob("*.index")))
    sizes = [p.stat().st_size for c in COLUMNS for p in whole_set.glob(f"*.{c}")]
    assert verdict.length_bytes == sum(sizes)


def test_every_member_is_counted(whole_set):
    tars = ("vision_left.tar", "vision_right.tar", "audio.tar", "text.tar")
    in_tars = sum(len(tar_names(p)) for c in tars for p in whole_set.glob(f"*.{c}"))
    arrays = 4 + 2  # of the two Zarr columns; every sample has a chunk in each
    assert verify_set(whole_set).num_members == in_tars + 36 * arrays


def tar_names(path):
    import tarfile

    with tarfile.open(path) as tar:
        return tar.getnames()


@pytest.mark.parametrize("column", COLUMNS)
def test_a_flipped_byte_inside_a_member_is_found_and_named(a_copy, column):
    name = shard_with_both_eyes(a_copy)
    index = open_index(tiny_sets.index_of(a_copy, name))
    part = {"proprio.zarr.zip": "proprio/touch", "dmel.zarr.zip": "dmel/dmel"}.get(column)
    offset = int(index.members(part or column.partition(".")[0]).offset[2])
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
    path.write_bytes(path.read_bytes()[:20_000])
    assert any("reach past its end at 20000" in p for p in verify_set(a_copy).problems)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_bad_index_is_found(a_copy, how):
    path = tiny_sets.index_of(a_copy, shard_with_both_eyes(a_copy))
    if how == "missing":
        path.unlink()
    else:
        tiny_sets.flip_byte(path, 200)
    problems = verify_set(a_copy).problems
    assert str(path) in problems[0]
    assert any("samples, but the set has 32" in p for p in problems)


def test_a_flipped_byte_in_the_tokenizer_is_found(a_copy):
    tiny_sets.flip_byte(a_copy / "tokenizer.json", 50)
    (problem,) = verify_set(a_copy).problems
    assert "tokenizer.json: checksum differs" in problem


def test_files_that_the_disk_does_not_give_are_problems_like_others(a_copy, monkeypatch):
    path = a_copy / f"{shard_with_both_eyes(a_copy)}.audio.tar"
    read_sha256 = ColumnFile.sha256

    def fail(file):
        if file.path == path:
            raise OSError(errno.EIO, "Input/output error")
        return read_sha256(file)

    monkeypatch.setattr(ColumnFile, "sha256", fail)
    tokenizer = a_copy / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.mkdir()
    assert verify_set(a_copy).problems == (
        f"{path}: can't be read: Input/output error; {rebuild_hint(a_copy)}",
        f"{tokenizer}: can't be read: Is a directory; {rebuild_hint(a_copy)}",
    )


def test_a_wrong_count_of_a_shard_is_found(a_copy):
    def change(values):
        values["shards"][0]["num_samples"] += 1

    tiny_sets.edit_manifest(a_copy, change)
    (problem,) = verify_set(a_copy).problems
    assert "its index has 4 samples, the manifest says 5" in problem


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("samples", "the manifest counts 37 samples, but the set has 36"),
        ("windows_planned", "planned"),
    ],
)
def test_a_wrong_count_of_the_set_is_found(a_copy, name, says):
    def change(values):
        values["counts"][name] += 1

    tiny_sets.edit_manifest(a_copy, change)
    (problem,) = verify_set(a_copy).problems
    assert says in problem


@pytest.mark.parametrize("content", [None, "[1]\n", "{}\n", "not json\n", '{"level": []}\n'])
def test_an_unreadable_list_of_rejected_windows_is_found(a_copy, content):
    path = a_copy / "rejected.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    (problem,) = verify_set(a_copy).problems
    assert str(path) in problem
    assert rebuild_hint(a_copy) in problem


def test_an_unplanned_rejected_window_is_found(a_copy):
    with (a_copy / "rejected.jsonl").open("a") as file:
        file.write('{"level": "session", "session": "zed", "windows": 3}\n')
    (problem,) = verify_set(a_copy).problems
    assert "39 windows were planned, but 36 samples + 6 rejected" in problem


def test_a_session_in_both_splits_is_found(a_copy):
    def change(values):
        own = next(s for s in values["shards"] if s["split"] == "train")
        own["split"] = "val"

    tiny_sets.edit_manifest(a_copy, change)
    problems = verify_set(a_copy).problems
    assert problems
    assert all("session ann is in both splits: held-out data leaks" in p for p in problems)


def test_a_duplicate_key_is_found(a_copy):
    def change(facts, arrays):
        arrays["window"][1] = arrays["window"][0]

    edit_index(a_copy, 0, change)
    problems = verify_set(a_copy).problems
    assert sum("occurs twice in the set" in p for p in problems) == 1


# --- show ------------------------------------------------------------------------------------


def test_show_describes_a_set(whole_set):
    lines = dict(describe_set(whole_set))
    assert lines["train"].startswith("30 samples in ")
    assert lines["val"].startswith("6 samples in ")
    assert lines["windows"].startswith("39 planned = 36 samples + 3 rejected")
    assert lines["window"] == "1 s, every 0.25 s"
    assert lines["proprio"] == "float32 30x20, rad, rad/s, zarr"


def test_show_draws_the_distribution_of_values(whole_set):
    lines = dict(describe_set(whole_set))
    angles = np.concatenate([values[:, :10] for values in finite_proprio(whole_set)])
    counts, _ = np.histogram(angles, 36, (-math.pi, math.pi))
    head, _, drawn = lines["joint angles"].partition("; ")
    low, high = angles.min(), angles.max()
    assert head == f"{angles.mean():.3g} +- {angles.std():.3g}, {low:.3g} to {high:.3g}"
    assert (drawn[:6], drawn[-5:]) == ("-3.14 ", " 3.14")
    bars = drawn[6:-5]
    assert [bar == " " for bar in bars] == [n == 0 for n in counts]
    assert {bars[i] for i in np.flatnonzero(counts == counts.max())} == {"█"}
    assert {"touch values", "joint velocities", "dB of windows"} < lines.keys()
    tokens = read_manifest(whole_set).statistics["external_tokens"]
    assert lines["external tokens"] == f"{sum(tokens)} of {np.count_nonzero(tokens)} kinds"


def finite_proprio(root):
    """Proprio of the train split, by zarr."""
    for path in root.glob("train-*.proprio.zarr.zip"):
        with zarr.storage.ZipStore(path, mode="r") as store:
            values = zarr.open_group(store, mode="r")["proprio"][:].reshape(-1, 20)
        yield values[np.isfinite(values).all(axis=1)].astype(np.float64)


def test_show_skips_statistics_that_early_sets_lack(a_copy):
    def forget(values):
        del values["statistics"]["audio_level"]
        del values["statistics"]["touch"]["histogram"]

    tiny_sets.edit_manifest(a_copy, forget)
    names = [name for name, _ in describe_set(a_copy)]
    assert "joint angles" in names
    assert not {"dB of windows", "touch values"} & set(names)


def test_show_describes_a_sample(whole_set):
    lines = list(describe_sample(whole_set, "cat/000003"))
    facts = dict(lines)
    assert facts["sample"].startswith("cat/000003, row ")
    assert facts["time"] == "[0.75, 1.75) s of its session"
    assert facts["streams"].split(", ") == [
        "vision_left",
        "vision_right",
        "audio",
        "touch",
        "proprio",
        "internal_text",
        "external_text",
    ]
    assert facts["dmel/dmel"].startswith("800 bytes at ")
    said = [value for name, value in lines if name in ("internal_text", "external_text")]
    assert said == ["   1.00 s  wait, wörld", "   1.30 s  reach", "   1.60 s  the red ball"]


def test_show_describes_a_sample_with_few_streams(whole_set):
    facts = dict(describe_sample(whole_set, "eve/000000"))
    assert facts["streams"] == "touch, proprio"
    assert facts["vision_left"].startswith("0 bytes")


@pytest.mark.parametrize("key", ["cat/999999", "nobody/000000", "cat", ""])
def test_the_error_for_an_unknown_key_has_an_example(whole_set, key):
    with pytest.raises(ShardError) as found:
        list(describe_sample(whole_set, key))
    assert f"no sample {key!r}; fix: use a key SESSION/WINDOW such as ann/000000" in str(
        found.value
    )


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
