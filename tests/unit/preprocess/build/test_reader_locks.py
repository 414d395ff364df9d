"""Reader locks: files of a replaced set stay as long as a process reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from helpers.oracles import build, check_set, file_hashes, set_keys, tiny_recipe
from helpers.sets import make_config, open_windows

from shared.shardset.index import open_index
from shared.shardset.locks import read_manifest_locked
from shared.shardset.manifest import Manifest, read_manifest
from train.data.shard_source import ShardSource

OTHER_TEXT = tiny_recipe(text={"vocab_size": 264})
OTHER_SENSORS = tiny_recipe(sensor={"max_gap_s": 0.2})


def files_of(manifest: Manifest) -> set[str]:
    names = {manifest.tokenizer_file}
    for entry in manifest.shards:
        columns = open_index(manifest.root / entry.index_file).columns
        names |= {entry.index_file, *(c["file"] for c in columns.values())}
    return names


def test_files_of_a_locked_set_stay_until_the_reader_ends(recorded, out):
    config = make_config(window={"duration_s": 1.0, "stride_s": 1.0})
    source = open_windows(ShardSource(out), config)
    segments = [k.split("/") for k in set_keys(out) if not k.startswith("bob")]
    keys = [f"{session}@{10 * int(segment)}" for session, segment in segments]
    old = files_of(read_manifest(out))
    build(recorded, out, OTHER_TEXT)
    build(recorded, out, OTHER_SENSORS)
    assert old <= {p.name for p in out.iterdir()}
    assert [source.key(0, window) for window in range(len(keys))] == keys
    source.close()
    del source
    build(recorded, out, OTHER_SENSORS)
    names = {p.name for p in out.iterdir()}
    assert names == files_of(read_manifest(out)) | {
        "manifest.json",
        "rejected.jsonl",
        "sessions.jsonl",
    }


def test_a_set_updated_under_a_reader_has_the_bytes_of_one_without(recorded, out, tmp_path):
    other = Path(shutil.copytree(out, tmp_path / "other"))
    _, lock = read_manifest_locked(out)
    build(recorded, out, OTHER_TEXT)
    build(recorded, other, OTHER_TEXT)
    assert check_set(out) == check_set(other)
    assert lock is not None
    lock.close()
    build(recorded, out, OTHER_TEXT)
    assert file_hashes(out) == file_hashes(other)


def test_a_killed_reader_holds_no_lock(recorded, out):
    code = f"""
import sys
from pathlib import Path
from shared.shardset.locks import read_manifest_locked
lock = read_manifest_locked(Path({str(out)!r}))
print("locked", flush=True)
sys.stdin.read()
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with reader:
        assert reader.stdout.readline() == b"locked\n"
        build(recorded, out, OTHER_TEXT)
        assert (out / "manifest.g0.json").exists()
        assert (out / "train-000000.index").exists()
        reader.kill()
    build(recorded, out, OTHER_TEXT)
    assert not (out / "manifest.g0.json").exists()
    assert not (out / "train-000000.index").exists()
