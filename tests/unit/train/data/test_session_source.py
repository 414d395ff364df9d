"""Sessions read directly: the walkthrough's calls, and real recordings."""

from __future__ import annotations

import errno
import io
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import zarr
from helpers import sets as tiny_sets
from helpers.sets import make_config, open_windows, read_sample, set_recipe
from rich.console import Console
from torch.utils.data import DataLoader

from preprocess.build.job import build_shards
from preprocess.cluster import Cluster
from shared.errors import ConfigError, CorruptError, MachineError, SessionError
from shared.recipe import Recipe
from shared.session.folder import survey_sessions
from shared.session.reader import SessionReader
from shared.streams import DEFAULT_STREAMS, Kind
from train import RealMultiModalDataset, real_data_collate_fn
from train.data import session_source
from train.data.loader import Loader
from train.data.pixels import to_model_inputs
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource
from train.model.losses import Objective, compute_losses
from train.model.multimodal import MultiModalCreature


@pytest.fixture(scope="module")
def dataset(tiny_sessions):
    return RealMultiModalDataset(root_dir=tiny_sessions, recipe=set_recipe(), config=make_config())


@pytest.fixture(scope="module")
def raw_shards(raw_set):
    return ShardSource(raw_set)


def test_the_walkthroughs_loader_gives_batches_of_four(dataset):
    loader = DataLoader(dataset, batch_size=4, collate_fn=real_data_collate_fn)
    batches = list(loader)
    assert [len(b["keys"]) for b in batches[:-1]] == [4] * ((len(dataset) - 1) // 4)
    keys = [key for batch in batches for key in batch["keys"]]
    assert len(set(keys)) == len(dataset) == int(dataset.source.window_counts.sum()) > 20
    for batch in batches:
        assert batch["inputs"]["vision_left"].shape == (len(batch["keys"]), 5, 48, 32)


def test_worker_processes_give_the_same_batches(dataset):
    alone = list(DataLoader(dataset, batch_size=9, collate_fn=real_data_collate_fn))
    loader = DataLoader(dataset, batch_size=9, collate_fn=real_data_collate_fn, num_workers=2)
    for one, other in zip(loader, alone, strict=True):
        assert one["keys"] == other["keys"]
        for name, tensor in one["inputs"].items():
            assert torch.equal(tensor, other["inputs"][name]), name


def test_the_default_recipe_and_config_do(tmp_path):
    sessions = tiny_sets.write_sessions(tmp_path / "sessions")
    shutil.rmtree(sessions / "eve")
    shutil.rmtree(sessions / "dan")
    dataset = RealMultiModalDataset(root_dir=sessions)
    assert len(dataset) == 3  # ann, bob and cat, whose windows of 4 s reach beyond their ends
    keys = [dataset[i]["keys"][0] for i in range(3)]
    assert keys == ["ann@0", "bob@0", "cat@0"]
    assert dataset[0]["inputs"]["vision_left"].shape == (1, 20, 336, 224)


@pytest.mark.parametrize("pixels", ["yuv420", "rgb"])
def test_a_batch_of_sessions_is_that_of_raw_shards(tiny_sessions, raw_shards, pixels):
    config = make_config(pixels=pixels)
    recipe = raw_shards.recipe
    sessions = SessionSource(tiny_sessions, recipe=recipe, split="train")
    batches = []
    for source in (raw_shards, sessions):
        loader = Loader(source, config, is_shuffled=False, num_epochs=1)
        rows = {}
        for batch in loader:
            for i, key in enumerate(batch["keys"]):
                rows[key] = {name: tensor[i] for name, tensor in batch["inputs"].items()}
        batches.append(rows)
    from_shards, from_sessions = batches
    assert set(from_shards) == set(from_sessions)
    for key, row in from_shards.items():
        for name, tensor in row.items():
            assert torch.equal(tensor, from_sessions[key][name]), (key, name)


def test_indices_count_from_both_ends(dataset):
    assert dataset[-1]["keys"] == dataset[len(dataset) - 1]["keys"]
    count = len(dataset)
    with pytest.raises(IndexError, match=f"window {count} of {count}"):
        dataset[count]
    with pytest.raises(IndexError):
        dataset[-count - 1]


def test_splits_divide_the_sessions(tiny_sessions):
    recipe = set_recipe()
    sides = {
        split: {
            source.key(shard, 0).partition("@")[0]
            for source in [open_windows(SessionSource(tiny_sessions, recipe=recipe, split=split))]
            for shard in range(len(source.shard_sizes))
        }
        for split in ("train", "val")
    }
    assert sides == {"train": {"ann", "cat", "dan", "eve"}, "val": {"bob"}}


def test_another_recipe_or_session_is_another_fingerprint(tiny_sessions, tmp_path):
    copied = shutil.copytree(tiny_sessions, tmp_path / "sessions")
    recipe = set_recipe()
    here = SessionSource(tiny_sessions, recipe=recipe).fingerprint
    assert SessionSource(copied, recipe=recipe).fingerprint == here
    other = set_recipe(sensor={"max_gap_s": 0.2})
    assert SessionSource(tiny_sessions, recipe=other).fingerprint != here
    shutil.rmtree(copied / "dan")
    assert SessionSource(copied, recipe=recipe).fingerprint != here


def test_a_deleted_file_is_a_corrupt_sample(tiny_sessions, tmp_path):
    copied = shutil.copytree(tiny_sessions, tmp_path / "sessions")
    source = SessionSource(copied, recipe=set_recipe())
    shutil.rmtree(copied / "ann")
    with pytest.raises(CorruptError, match=r"ann/audio\.wav") as found:
        read_sample(open_windows(source), (0, 0))
    assert found.value.file == "ann/audio.wav"
    loader = Loader(source, make_config(max_bad_fraction=1.0), num_epochs=1)
    skipped = [skip for batch in loader for skip in batch["skipped"]]
    assert {skip["key"].partition("@")[0] for skip in skipped} == {"ann"}
    assert [skip["file"] for skip in skipped] == ["ann/audio.wav"]


def test_overlapping_windows_decode_each_segment_once(tiny_sessions, monkeypatch):
    source = open_windows(SessionSource(tiny_sessions, recipe=set_recipe()))
    decoded = []
    original = SessionReader.read_sensor

    def note(self, stream, segment):
        decoded.append((self.scan.session, stream, segment.index))
        return original(self, stream, segment)

    monkeypatch.setitem(
        session_source._READERS, Kind.SENSOR, partial(session_source._read_each, note)
    )
    for location in tiny_sets.sample_locations(source):
        read_sample(source, location)
    assert len(decoded) == len(set(decoded)) > 10


def test_decoded_segments_stay_within_their_memory(tiny_sessions, monkeypatch):
    monkeypatch.setattr(session_source, "MAX_SEGMENT_BYTES", 20_000)
    source = open_windows(SessionSource(tiny_sessions, recipe=set_recipe()))
    expected = open_windows(SessionSource(tiny_sessions, recipe=set_recipe()))
    for location in tiny_sets.sample_locations(source):
        own, whole = (read_sample(each, location)[0] for each in (source, expected))
        for name, values in whole.items():
            np.testing.assert_array_equal(own[name], values)
        kept = source._decoded._segments.values()
        assert source._decoded._bytes == sum(map(session_source._bytes_of, kept)) <= 20_000


@pytest.mark.parametrize("window_s", [0.4, 1.0])
def test_a_long_session_is_cut_where_shards_cut_it(tiny_sessions, tmp_path, window_s):
    recipe = set_recipe(video={"codec": "raw"}, shard={"target_bytes": 1 << 16})  # few segments
    shards = ShardSource(tiny_sets.build_set(tiny_sessions, tmp_path / "set", recipe))
    sessions = SessionSource(tiny_sessions, recipe=recipe, split="train")
    config = make_config(window={"duration_s": window_s})
    keys = [
        sorted(source.key(*p) for p in tiny_sets.sample_locations(source))
        for source in (open_windows(shards, config), open_windows(sessions, config))
    ]
    assert keys[0] == keys[1]
    assert len(sessions.shard_sizes) > 4  # sessions


def test_a_folder_without_a_usable_session_says_why(tiny_sessions, tmp_path):
    shutil.copytree(tiny_sessions / "eve", tmp_path / "eve")
    with pytest.raises(SessionError, match="no session can be used: eve: "):
        SessionSource(tmp_path, recipe=Recipe())


def test_a_tokenizer_larger_than_the_recipes_vocabulary_is_refused(tiny_sessions, tiny_set):
    recipe = set_recipe(text={"vocab_size": 264})
    with pytest.raises(ConfigError, match=r"set text\.vocab_size: \d+"):
        RealMultiModalDataset(
            root_dir=tiny_sessions, recipe=recipe, tokenizer=tiny_set / "tokenizer.json"
        )


# --- real recordings -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_set(real_sessions, tmp_path_factory):
    """Build a set of every real session, with small frames so that it is quick."""
    out = tmp_path_factory.mktemp("real") / "shards"
    recipe = Recipe.model_validate(
        {
            "video": {"size": 32},
            "split": {"val_fraction": 0},
            "streams": {n: {**spec, "required": False} for n, spec in DEFAULT_STREAMS.items()},
        }
    )
    with Cluster(scheduler=None, num_workers=0, console=Console(file=io.StringIO())) as cluster:
        return build_shards(real_sessions[0].parent, out, recipe=recipe, cluster=cluster)


def test_every_real_session_is_in_the_shards_or_rejected(real_set, real_sessions):
    source = open_windows(ShardSource(real_set.manifest.root))
    keys = [source.key(*location) for location in tiny_sets.sample_locations(source)]
    named = {key.partition("@")[0] for key in keys} | {r["session"] for r in real_set.rejected}
    recipe = source.recipe
    assert named == {path.name for path in survey_sessions(real_sessions[0].parent, recipe).folders}
    counts = real_set.manifest.counts
    rows = 0
    for path in real_set.manifest.root.glob("*.proprio.zarr.zip"):
        with zarr.storage.ZipStore(path, mode="r") as store:
            rows += zarr.open_group(store, mode="r")["proprio"].shape[0]
    assert rows == source.shard_sizes.sum()
    rejected = sum(
        r.get("segments", 1) for r in real_set.rejected if r["level"] in ("session", "segment")
    )
    assert counts["segments_planned"] == rows + rejected
    assert rows > 0


def test_every_real_sample_gives_finite_losses_and_gradients(real_set):
    config = make_config(real_set.manifest.root, batch_size=8, window={"duration_s": 4.0})
    loader = Loader(ShardSource(real_set.manifest.root), config, num_epochs=1)
    torch.manual_seed(0)
    model = MultiModalCreature(config, loader.shapes)
    objective = Objective.from_config(config, loader.shapes)
    seen = set()
    for batch in loader:
        assert batch["skipped"] == []
        seen |= {key.partition("@")[0] for key in batch["keys"]}
        model.zero_grad()
        outputs = model(to_model_inputs(batch["inputs"]))
        losses = compute_losses(outputs, batch["targets"], batch["weight"], objective=objective)
        losses["loss_total"].backward()
        assert all(torch.isfinite(loss) for loss in losses.values()), (batch["keys"], losses)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(g).all() for g in gradients)
    assert len(seen) >= 6


def test_a_disk_that_fails_ends_the_run_and_makes_no_sample_corrupt(
    tiny_sessions, monkeypatch, quick_retries
):
    source = open_windows(SessionSource(tiny_sessions, recipe=tiny_sets.set_recipe()))
    location, *_ = tiny_sets.sample_locations(source)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        with pytest.raises(MachineError, match=r"Input/output error.*fix: look for the device"):
            read_sample(source, location)
    read_sample(source, location)
