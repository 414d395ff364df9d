"""Run every example of docs/format.md, and compare it with the files' members.

The heavy ones run in the virtual environment of the peers' benchmark.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from preprocess.build.statistics import AXES, LOG
from shared.kinds.column import MAX_MEMBER_BYTES
from shared.kinds.text import MAX_TEXT_BYTES
from shared.kinds.video import decode_pictures
from shared.shardset import index as index_module
from shared.shardset.index import open_index
from shared.shardset.manifest import FORMAT_VERSION, read_manifest
from shared.streams import MAX_STREAMS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
PEERS = ROOT / "data" / "bench" / "peers-venv"


def blocks(language="python"):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def code_with(word, language="python"):
    (found,) = (block for block in blocks(language) if word in block)
    return found


def run_example(word, folder, monkeypatch):
    """Run the example with a word in a set's folder; return its variables."""
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code_with(word), found)
    return found


def chunk(path, name, dtype):
    """Read a row's bytes by stock zipfile."""
    with zipfile.ZipFile(path) as archive:
        shape = json.loads(archive.read(f"{name.partition('/')[0]}/zarr.json"))["shape"][1:]
        return np.frombuffer(archive.read(name), dtype=dtype).reshape(shape)


def members(folder, column):
    """Read the members of a column by stock tarfile, by key."""
    found = {}
    for path in sorted(folder.glob(f"train-*.{column}.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name.partition(".")[0]] = tar.extractfile(member).read()
    return found


MARKS = (
    "def read_index",
    "safe_open",
    "av.open",
    "webdataset.",
    "tensorstore",
    "xarray",
    "load_dataset",
)
"""A word of each Python example."""


def test_every_example_is_run_by_a_test():
    assert sorted(code_with(mark) for mark in MARKS) == sorted(blocks())
    assert [code_with("energon prepare", "bash")] == blocks("bash")


def keys_of(heading, first_key):
    """Return the keys of the table that begins with a key, in a section of the page."""
    section = PAGE.split(f"{heading}\n")[1]
    table = section[section.index(f"| `{first_key}`") :].split("\n\n")[0]
    return [
        key for row in table.splitlines() for key in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]


def test_the_page_lists_every_key_of_a_manifest(tiny_set):
    values = json.loads((tiny_set / "manifest.json").read_text())
    assert keys_of("## manifest.json", "format") == list(values)
    for key, entry in (("shards", values["shards"][0]), ("counts", values["counts"])):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |"))
        names = re.findall(r"`(\w+)`", row.split("|")[2])
        assert set(names) - {"train", "val"} == set(entry)


def test_the_page_lists_every_key_and_array_of_an_index(tiny_set):
    index = open_index(tiny_set / "train-000000.index")
    assert set(keys_of("## The index", "version")) == {"version", *index.header}
    row = next(line for line in PAGE.splitlines() if line.startswith("| `columns` | column"))
    for entry in index.columns.values():
        assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == set(entry)
    parts = {"NAME": index.videos, "COLUMN": index.columns}
    arrays = set()
    for form in keys_of("## The index", "session"):
        word, dot, part = form.rpartition(".")
        arrays |= {f"{name}.{part}" for name in parts[word]} if dot else {form}
    assert arrays == index.arrays.keys() | {"flags"}  # which a set without masks leaves out


def test_the_page_lists_every_type_of_values_with_its_histogram():
    bins = PAGE.split("### Statistics")[1]
    for value_type, axis in AXES.items():
        assert f"`{value_type}`" in PAGE.split("## A session folder")[0]
        if axis is not None and axis is not LOG:
            assert re.search(rf"\n\| `{value_type}` \| .* linear, {len(axis.edges) - 1} \|", bins)
    assert f"signed_log, {len(LOG.edges) - 1} " in bins


def test_the_page_states_the_limits_of_the_code():
    for text in (
        f"more than {MAX_STREAMS} streams",
        f"{8 * MAX_STREAMS:,} arrays",
        f"{MAX_TEXT_BYTES >> 20} MiB for text",
        f"format version {FORMAT_VERSION}",
    ):
        assert text in PAGE.replace("\n  ", " ").replace("\n", " ")
    assert (MAX_MEMBER_BYTES, 8 * MAX_STREAMS) == (1 << 30, index_module._MAX_ARRAYS)


def test_plain_python_reads_an_index_and_a_member(tiny_set, monkeypatch):
    found = run_example("def read_index", tiny_set, monkeypatch)
    ours = open_index(tiny_set / "train-000000.index")
    assert found["header"] == {"version": 3, **ours.header}
    assert found["arrays"].keys() == ours.arrays.keys()
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(found["arrays"][name], array)
    assert found["wav"] == members(tiny_set, "audio")[ours.key(0)]


def test_safetensors_reads_an_index(tiny_set, monkeypatch):
    by_hand = run_example("def read_index", tiny_set, monkeypatch)
    found = run_example("safe_open", tiny_set, monkeypatch)
    assert found["header"] == by_hand["header"]
    assert found["arrays"].keys() == by_hand["arrays"].keys()
    for name, array in by_hand["arrays"].items():
        np.testing.assert_array_equal(found["arrays"][name], array)


def test_av_reads_every_picture(tiny_set, monkeypatch):
    found = run_example("av.open", tiny_set, monkeypatch)["pictures"]
    stored = members(tiny_set, "vision_left")
    names = {name.partition(".")[0]: pictures for name, pictures in found.items()}
    assert names.keys() <= stored.keys()
    for key, pictures in names.items():
        ours = np.zeros_like(pictures)
        decode_pictures(
            stored[key], spec=read_manifest(tiny_set).recipe.streams["vision_left"], out=ours
        )
        np.testing.assert_array_equal(ours, pictures)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_zarr_join_columns_by_key(tiny_set, monkeypatch):
    joined = run_example("webdataset.", tiny_set, monkeypatch)["joined"]
    index = open_index(tiny_set / "train-000000.index")
    assert sorted(joined) == sorted(index.key(row) for row in range(index.num_samples))
    for row in range(index.num_samples):
        sample = joined[index.key(row)]
        expected = chunk(tiny_set / "train-000000.touch.zarr.zip", f"touch/c/{row}/0/0", "<f4")
        np.testing.assert_array_equal(sample["touch"], expected)
        streams = {name.partition(".")[0] for name in sample if not name.startswith("__")}
        tars = {"vision_left", "audio", "internal_text"}
        assert streams - {"touch"} == tars & set(index.present_streams(row))


def test_tensorstore_reads_a_chunk_of_a_zarr_column(tiny_set, monkeypatch):
    found = run_example("tensorstore", tiny_set, monkeypatch)
    expected = chunk(tiny_set / "train-000000.touch.zarr.zip", "touch/c/0/0/0", "<f4")
    np.testing.assert_array_equal(found["row"], expected)
    assert found["touch"].domain.labels == ("segment", "time", "value")


def test_xarray_reads_a_chunk_of_a_zarr_column(tiny_set, monkeypatch):
    found = run_example("xarray", tiny_set, monkeypatch)
    expected = chunk(tiny_set / "train-000000.audio.dmel.zarr.zip", "dmel/c/0/0/0", "u1")
    np.testing.assert_array_equal(found["dmel"].to_numpy(), expected)
    assert found["dmel"].dims == ("frame", "channel")


# --- in the peers' environment ---------------------------------------------------------------


@pytest.fixture
def peers_bin():
    if not (PEERS / ".installed").exists():
        pytest.skip(f"no {PEERS}; `make bench-peers` makes it")
    return PEERS / "bin"


@pytest.fixture
def copied_set(tiny_set, tmp_path):
    return shutil.copytree(tiny_set, tmp_path / "set")


def run(code, folder, peers_bin):
    """Run `code` in `folder` by the peers' Python; return the value that it leaves in `found`."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONWARNINGS": "ignore"}
    program = f"{code}\nimport json\nprint(json.dumps(found))"
    done = subprocess.run(
        [peers_bin / "python", "-c", program],
        cwd=folder,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_hugging_face_datasets_streams_a_column(copied_set, peers_bin):
    found = run(f"{code_with('load_dataset')}\nfound = texts", copied_set, peers_bin)
    expected = {key: json.loads(text) for key, text in members(copied_set, "internal_text").items()}
    assert found == expected
    assert len(found) > 10


@pytest.mark.slow
def test_energon_prepares_and_reads_a_column(copied_set, peers_bin):
    path = f"{peers_bin}:{os.environ['PATH']}"
    command = ["bash", "-e", "-c", code_with("energon prepare", "bash")]
    done = subprocess.run(
        command, cwd=copied_set, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = run(textwrap.dedent(READ_BY_ENERGON), copied_set, peers_bin)
    expected = members(copied_set, "vision_left")
    assert found == {key: len(content) for key, content in expected.items()}
    assert len(found) > 10


READ_BY_ENERGON = """
    from megatron import energon

    @energon.edataclass
    class Eye(energon.Sample):
        member: bytes

    @energon.stateless
    def cook(sample):
        (name,) = (n for n in sample if not n.startswith("__"))
        return Eye(**energon.basic_sample_keys(sample), member=sample[name])

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(cook)]

    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        "energon/vision_left", worker_config=worker, batch_size=None, shuffle_buffer_size=None,
        max_samples_per_sequence=None, task_encoder=Encoder(), repeat=False)
    found = {sample.__key__: len(sample.member) for sample in energon.get_loader(dataset)}
"""
