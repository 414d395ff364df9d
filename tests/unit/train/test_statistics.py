"""Statistics of sensors, against numpy over every stored sample."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.sets import build_set, make_config, set_recipe
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shared.clock import Segment
from shared.recipe import load_recipe
from shared.streams import ValueGroup
from train.config import CheckpointConfig
from train.data.loader import Loader, open_source
from train.data.mixture import MixedSource
from train.data.session_source import RealMultiModalDataset, real_data_collate_fn
from train.data.shard_source import ShardSource
from train.loop.trainer import Trainer
from train.model.multimodal import MultiModalCreature
from train.model.values import SensorValues
from train.statistics import heads_without_target, merge, moments_of, sensor_statistics


def open_direct(tiny_sessions, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(set_recipe().model_dump_json())
    config = make_config(root_dir=tiny_sessions, recipe=recipe)
    return Loader(open_source(config, split="train"), config).source


def every_sample(source, name):
    """Return every valid sample of a stream in the sessions of a source, float64 [N, D]."""
    readers = map(source.reader, range(len(source.shard_sizes)))
    segments = [
        reader.read_sensor(name, Segment(number, reader.recipe.segment_s))
        for reader in readers
        for number in reader.scan.stored_segments(reader.recipe)
        if name in reader.scan.present(number)
    ]
    rows = np.concatenate(segments).astype(np.float64)
    return rows[np.isfinite(rows).all(axis=1)]


@pytest.mark.parametrize("name", ["proprio", "touch"])
def test_statistics_of_sessions_and_of_their_set_are_those_of_all_samples(
    tiny_set, tiny_sessions, tmp_path, name
):
    source = open_direct(tiny_sessions, tmp_path)
    config = make_config(tiny_set)
    stored = Loader(open_source(config, split="train"), config).source
    samples = every_sample(source, name)
    for each in (source, stored):
        found = sensor_statistics(each)[name]
        assert found["count"] == len(samples)
        np.testing.assert_allclose(found["mean"], samples.mean(axis=0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found["std"], samples.std(axis=0), rtol=1e-9)


def test_heads_without_a_target_are_those_whose_stream_nobody_recorded(
    tiny_set, tiny_sessions, tmp_path
):
    config = make_config(tiny_set)
    stored = Loader(open_source(config, split="train"), config)
    assert heads_without_target(stored) == []
    bare = tmp_path / "bare"
    shutil.copytree(tiny_sessions, bare, ignore=shutil.ignore_patterns("audio.wav", "text.jsonl"))
    recipe = set_recipe().as_json()
    for stream in recipe["streams"].values():
        stream["required"] = False
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    config = make_config(root_dir=bare, recipe=tmp_path / "recipe.yaml")
    direct = Loader(open_source(config, split="train"), config)
    assert "audio" in heads_without_target(direct)
    assert "animation" not in heads_without_target(direct)
    config = make_config(build_set(bare, tmp_path / "set", load_recipe(tmp_path / "recipe.yaml")))
    built = Loader(open_source(config, split="train"), config)
    assert heads_without_target(built) == heads_without_target(direct)


def test_statistics_of_a_mix_are_merged_by_count(tiny_set):
    config = make_config(tiny_set)
    source = ShardSource(tiny_set, split="train")
    one = sensor_statistics(Loader(source, config).source)["proprio"]
    other = SimpleNamespace(statistics={"proprio": {**one, "count": 3 * one["count"]}})
    mixed = MixedSource({"a": source, "b": ShardSource(tiny_set, split="train")}, {"a": 1, "b": 1})
    mixed = Loader(mixed, config).source
    second = mixed.sources["b"]
    other.statistics["proprio"]["mean"] = [mean + 2.0 for mean in one["mean"]]
    second.manifest = other
    merged = sensor_statistics(mixed)["proprio"]
    assert merged["count"] == 4 * one["count"]
    np.testing.assert_allclose(merged["mean"], np.array(one["mean"]) + 1.5)
    np.testing.assert_allclose(merged["std"], np.sqrt(np.square(one["std"]) + 0.75))


def test_a_mix_merges_the_other_values_of_a_stream_with_a_quaternion(tiny_set):
    config = make_config(tiny_set)
    sources = {name: ShardSource(tiny_set, split="train") for name in ("a", "b")}
    mixed = Loader(MixedSource(sources, {"a": 1, "b": 1}), config).source
    values = {"mean": [1.0, *[None] * 4], "std": [0.0, *[None] * 4]}
    other = {"mean": [4.0, *[None] * 4], "std": [0.0, *[None] * 4]}
    for name, stored in (("a", {"count": 2, **values}), ("b", {"count": 1, **other})):
        mixed.sources[name].manifest = SimpleNamespace(statistics={"proprio": stored})
    merged = sensor_statistics(mixed)["proprio"]
    assert merged["mean"][0] == np.mean([1.0, 1.0, 4.0])
    assert merged["std"][0] == pytest.approx(np.std([1.0, 1.0, 4.0]))
    sensor = SensorValues(
        [ValueGroup(count=1, type="scalar"), ValueGroup(count=4, type="quaternion")]
    )
    sensor.set_statistics(merged, name="hand")
    assert sensor.mean.tolist() == [2.0, 0, 0, 0, 0]
    assert sensor.std[1:].tolist() == [1.0] * 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_parts_merge_to_the_statistics_of_all(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(1e3, 1e-2, size=(size, 2)).astype(np.float32) for size in sizes]
    merged = moments_of(parts[0])
    for part in parts[1:]:
        merged = merge(merged, moments_of(part))
    rows = np.concatenate(parts).astype(np.float64)
    assert merged.count == len(rows)
    np.testing.assert_allclose(merged.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.variance, rows.var(axis=0), rtol=1e-6, atol=1e-12)


def test_rows_with_a_missing_value_are_left_out():
    rows = np.array([[1.0, np.nan], [2.0, 3.0]], dtype=np.float32)
    assert moments_of(rows).mean.tolist() == [2.0, 3.0]
    assert moments_of(rows[:1]) is None


def test_a_model_standardizes_by_the_statistics(tiny_set):
    config = make_config(tiny_set)
    loader = Loader(open_source(config, split="train"), config)
    statistics = sensor_statistics(loader.source)
    model = MultiModalCreature(config, loader.shapes)
    model.set_statistics(statistics)
    expected = np.array(statistics["proprio"]["std"])[10:]  # velocities; angles keep their scale
    np.testing.assert_allclose(model.target_std["animation"][10:], expected, rtol=1e-6)


def python_trainer(sessions, config):
    """Return a trainer over a plain DataLoader, as in the README."""
    dataset = RealMultiModalDataset(sessions, recipe=set_recipe(), config=config)
    loader = DataLoader(dataset, batch_size=2, collate_fn=real_data_collate_fn)
    model = MultiModalCreature(config, dataset.shapes)
    return Trainer(model, config, loader, device="cpu", val_loader=loader), dataset.source


@pytest.fixture
def trained(tiny_sessions, tmp_path):
    config = make_config()
    checkpointing = CheckpointConfig(save_dir=tmp_path / "checkpoints")
    update = {"max_steps": 1, "log_dir": tmp_path / "runs", "checkpointing": checkpointing}
    config = config.model_copy(update={"training": config.training.model_copy(update=update)})
    trainer, source = python_trainer(tiny_sessions, config)
    return trainer, source, config


@pytest.mark.parametrize("first_call", ["train", "evaluate"])
def test_a_new_run_from_python_standardizes_by_the_loaders_sessions(trained, first_call):
    trainer, source, _ = trained
    getattr(trainer, first_call)()
    expected = np.array(sensor_statistics(source)["proprio"]["std"])[10:]
    np.testing.assert_allclose(trainer.model.target_std["animation"][10:], expected, rtol=1e-6)


@pytest.mark.parametrize("load", ["load_checkpoint", "load_weights"])
def test_a_checkpoints_statistics_are_kept(trained, tiny_sessions, load):
    trainer, _, config = trained
    trainer.model.set_statistics(
        {"proprio": {"count": 1, "mean": torch.ones(20).tolist(), "std": [7.0] * 20}}
    )
    trainer._is_standardized = True
    trainer.train()
    path = config.training.checkpointing.save_dir / "model_final.pt"
    other, _ = python_trainer(tiny_sessions, config)
    getattr(other, load)(path)
    other.evaluate()
    assert (other.model.target_std["animation"][10:] == 7.0).all()
