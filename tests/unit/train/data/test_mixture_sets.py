"""Mixed shard sets in training: files, workers, resuming, damage, TensorBoard."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import sets as tiny_sets
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.config import make_section
from shared.errors import ConfigError
from shared.streams import DEFAULT_STREAMS
from train import Loader, MultiModalCreature, Trainer
from train.__main__ import cli
from train.config import TrainConfig
from train.data.batch import assemble_batch
from train.data.loader import open_source
from train.data.shard_source import ShardSource

WEIGHTS = {"home": 2, "away": 1}


@pytest.fixture(scope="module")
def away_set(tiny_set, tmp_path_factory):
    """Build a set of other sessions (fay, gus) with JPEG frames and the same tokenizer."""
    root = tmp_path_factory.mktemp("mixed")
    sessions = tiny_sets.write_sessions(root / "sessions")
    for old, new in {"ann": "fay", "cat": "gus", "bob": "bob"}.items():
        (sessions / old).rename(sessions / new)
    for name in ("dan", "eve"):
        shutil.rmtree(sessions / name)
    tokenizer = {"tokenizer": tiny_set / "tokenizer.json"}
    recipe = tiny_sets.set_recipe(video={"codec": "mjpeg"}, text=tokenizer)
    return tiny_sets.build_set(sessions, root / "shards", recipe)


def make_config(home, away, *, weights=WEIGHTS, heads=tiny_sets.HEADS, **data):
    locations = {"home": home, "away": away}
    mix = [{"shards": locations[n], "weight": w, "name": n} for n, w in weights.items()]
    return tiny_sets.make_config(heads=heads, mix=mix, **data)


def make_loader(config, *, rank=0, world_size=1):
    source = open_source(config, split="train")
    return Loader(source, config, rank=rank, world_size=world_size)


def take(loader, count):
    """Copy the next batches, whose memory is recycled."""
    return [
        {**b, "inputs": {n: t.clone() for n, t in b["inputs"].items()}}
        for b in itertools.islice(loader, count)
    ]


def content(batches):
    """Return what two streams must agree in."""
    return [
        (b["index"], b["keys"], b["samples_of"], {n: t.tolist() for n, t in b["inputs"].items()})
        for b in batches
    ]


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_are_those_that_each_set_has(tiny_set, away_set, num_workers):
    config = make_config(tiny_set, away_set, num_workers=num_workers)
    loader = make_loader(config)
    sources = loader.source.sources
    by_key = {
        (name, source.key(*location)): location
        for name, source in sources.items()
        for location in tiny_sets.sample_locations(source)
    }
    seen = Counter()
    for batch in take(loader, 12):
        counts = Counter()
        for row, key in enumerate(batch["keys"]):
            name = "away" if key.partition("@")[0] in {"fay", "gus"} else "home"
            counts[name] += 1
            alone = assemble_batch(sources[name], [by_key[name, key]], pixels="yuv420")
            for stream, tensor in alone["inputs"].items():
                assert torch.equal(tensor[0], batch["inputs"][stream][row]), (key, stream)
        assert batch["samples_of"] == counts
        seen += counts
    assert abs(seen["home"] - 2 * seen["away"]) < 3
    assert seen.total() == 12 * 7


def test_a_stream_that_one_set_lacks_is_absent_and_segments_may_differ(tiny_set, tmp_path):
    streams = {n: {**DEFAULT_STREAMS[n], "required": False} for n in ("audio", "proprio")}
    other = tiny_sets.make_set(tmp_path, streams=streams, segment={"duration_s": 0.8})
    config = make_config(tiny_set, other, heads=("audio", "animation"))
    loader = make_loader(config)
    assert set(loader.shapes.streams) == set(DEFAULT_STREAMS)
    source = loader.source
    seen = Counter()
    for (shard, window), key in {
        (s, w): source.key(s, w) for s, w in tiny_sets.sample_locations(source)
    }.items():
        batch = assemble_batch(source, [(shard, window)], pixels="yuv420")
        is_other = source.shard_name(shard).startswith("away/")
        seen[is_other] += 1
        for name in DEFAULT_STREAMS:
            if is_other and name not in streams:
                assert not batch["inputs"][name].any()
                assert not batch["inputs"][f"{name}_valid"].any()
            elif key.startswith("cat@"):
                assert batch["inputs"][f"{name}_valid"].any()
    assert min(seen.values()) > 9


def test_run_lengths_are_those_of_every_set_and_of_the_sessions_read_directly(
    tiny_set, away_set, tiny_sessions, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_sets.set_recipe().model_dump_json())
    direct = tiny_sets.make_config(root_dir=tiny_sessions, recipe=recipe)
    sources = [
        open_source(config, split="train")
        for config in (tiny_sets.make_config(tiny_set), tiny_sets.make_config(away_set), direct)
    ]
    home, away, sessions = (source.run_lengths_s() for source in sources)
    longest_s = max(tiny_sets.LENGTHS_S[name] for name in ("ann", "cat", "dan", "eve"))
    assert max(home) == max(sessions) == pytest.approx(np.ceil(longest_s / 0.4) * 0.4)
    mixed = open_source(make_config(tiny_set, away_set), split="train")
    assert sorted(mixed.run_lengths_s()) == sorted(home + away)


def test_each_set_gives_each_of_its_samples_once_per_epoch_of_its_own(tiny_set, away_set):
    loader = make_loader(make_config(tiny_set, away_set, heads=tiny_sets.TEXT_HEADS))
    keys = [key for batch in take(loader, 30) for key in batch["keys"]]
    for location, names in ((tiny_set, {"ann", "cat", "dan", "eve"}), (away_set, {"fay", "gus"})):
        source = tiny_sets.open_windows(ShardSource(location))
        own = sorted(source.key(*each) for each in tiny_sets.sample_locations(source))
        stream = [key for key in keys if key.partition("@")[0] in names]
        epochs = [stream[i : i + len(own)] for i in range(0, len(stream), len(own))]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert sorted(epoch) == own
        assert epochs[0] != epochs[1]


def test_held_out_sessions_are_those_of_all_sets_once(tiny_set, away_set):
    config = make_config(tiny_set, away_set)
    source = open_source(config, split="val")
    loader = Loader(source, config, is_shuffled=False, num_epochs=1)
    found = [k for b in loader for k, w in zip(b["keys"], b["weight"], strict=True) if w]
    sources = loader.source.sources.values()
    assert found == [s.key(*p) for s in sources for p in tiny_sets.sample_locations(s)]


# --- the same stream, however it is read -----------------------------------------------------


def test_workers_ranks_and_resuming_change_nothing(tiny_set, away_set):
    config = make_config(tiny_set, away_set, batch_size=4)
    expected = content(take(make_loader(config), 9))
    with_workers = make_config(tiny_set, away_set, batch_size=4, num_workers=2)
    assert content(take(make_loader(with_workers), 9)) == expected

    ranks = [take(make_loader(config, rank=r, world_size=2), 9) for r in range(2)]
    assert [a["keys"] + b["keys"] for a, b in zip(*ranks, strict=True)] == [
        keys for _, keys, _, _ in expected
    ]
    assert all(a["samples_of"] == b["samples_of"] for a, b in zip(*ranks, strict=True))

    resumed = make_loader(with_workers)
    resumed.load_state_dict(json.loads(json.dumps(make_loader(config).state_at(4))))
    assert content(take(resumed, 5)) == expected[4:]


def test_a_state_of_another_mix_is_refused(tiny_set, away_set):
    state = make_loader(make_config(tiny_set, away_set)).state_at(3)
    other = make_loader(make_config(tiny_set, away_set, weights={"home": 1, "away": 1}))
    with pytest.raises(
        ConfigError, match=r"has mix \{'away': 1, 'home': 2\}, this run has \{'away': 1"
    ):
        other.load_state_dict(state)
    swapped = make_loader(make_config(away_set, tiny_set))
    with pytest.raises(ConfigError, match=r"other data \(sets \{'away': "):
        swapped.load_state_dict(state)
    alone = tiny_sets.make_config(tiny_set)
    with pytest.raises(ConfigError, match="this run has None"):
        Loader(ShardSource(tiny_set), alone).load_state_dict(state)


def test_equal_shares_written_differently_are_the_same_mix(tiny_set, away_set):
    loader = make_loader(make_config(tiny_set, away_set))
    weights = {"away": 0.25, "home": 0.5}
    same = make_loader(make_config(tiny_set, away_set, weights=weights, last_batch="drop"))
    same.load_state_dict(loader.state_at(3))
    assert content(take(same, 2)) == content(take(loader, 5))[3:]


def test_a_damaged_sample_is_replaced_from_its_own_set(tiny_set, away_set, tmp_path):
    damaged = tiny_sets.copy_set(away_set, tmp_path / "away")
    index = ShardSource(damaged).shard(0).index
    member = int(index.members("audio.dmel").offset[0])
    tiny_sets.flip_byte(damaged / index.columns["audio.dmel"]["file"], member)
    good = take(make_loader(make_config(tiny_set, away_set)), 8)
    found = take(make_loader(make_config(tiny_set, damaged, max_bad_fraction=1.0)), 8)
    skipped = [each for batch in found for each in batch["skipped"]]
    assert skipped
    assert all(each["key"].partition("@")[0] in {"fay", "gus"} for each in skipped)
    assert all(each["error"].startswith("away: ") for each in skipped)
    changed = [
        (old, new)
        for one, other in zip(good, found, strict=True)
        for old, new in zip(one["keys"], other["keys"], strict=True)
        if old != new
    ]
    assert changed
    assert all(key.partition("@")[0] in {"fay", "gus"} for pair in changed for key in pair)


# --- what is opened and prefetched ---------------------------------------------------------


def test_a_set_prefetches_only_its_own_blocks_and_each_once(tiny_set, away_set, monkeypatch):
    prefetched = []
    original = ShardSource.prefetch_shards

    def note(self, shards):
        prefetched.append((str(self.manifest.root), list(shards)))
        original(self, shards)

    monkeypatch.setattr(ShardSource, "prefetch_shards", note)
    take(make_loader(make_config(tiny_set, away_set, shuffle_block_shards=1, batch_size=2)), 40)
    for location in (tiny_set, away_set):
        own = [shards for root, shards in prefetched if root == str(location)]
        assert len(own) > 2
        assert all(one != other for one, other in itertools.pairwise(own))


def test_a_set_that_needs_cache_space_closes_files_of_the_others(tiny_set, away_set):
    source = open_source(make_config(tiny_set, away_set), split="train")
    home, away = source.sources["home"], source.sources["away"]
    home.shard(0), home.shard(1), away.shard(0)
    again = ForkingPickler.loads(ForkingPickler.dumps(source))  # as for another process
    assert not again.sources["away"]._evict_any()
    assert [away._evict_any() for _ in range(3)] == [True, True, False]
    assert (home._open.peek(0), home._open.peek(1)) == (None, None)
    assert away._open.peek(0) is not None  # its newest index stays
    again.sources["home"].shard(0)
    assert again.sources["away"]._evict_any()


# --- configuration ---------------------------------------------------------------------------


def test_sets_that_one_model_cannot_read_are_refused(tiny_set, tmp_path):
    changes = {"audio": {"dmel": {"channels": 8}}, "split": {"salt": "d"}}
    other = tiny_sets.make_set(tmp_path / "other", **changes)
    with pytest.raises(
        ConfigError, match=r"audio has dmel\.channels 8 in away, and 16 in home; fix: rebuild one"
    ):
        make_loader(make_config(tiny_set, other))
    with pytest.raises(
        ConfigError, match=r"home has another tokenizer than away, and external_text is read; fix"
    ):
        make_loader(make_config(tiny_set, other, heads=tiny_sets.TEXT_HEADS))
    make_loader(make_config(tiny_set, other, heads=("animation",), modalities=["touch"]))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"shards": "a", "mix": [{"shards": "b"}]}, "data.shards and data.mix both name"),
        (
            {"mix": [{"shards": "x/a"}, {"shards": "y/a"}]},
            "two sets called 'a'; fix: give",
        ),
        ({"mix": [{"shards": "/"}]}, "a set without a name; fix: give"),
        ({"mix": [{"shards": "a", "weight": 0}]}, "greater than 0"),
        ({"mix": [{"shards": "a", "weight": float("inf")}]}, "finite"),
        ({"mix": []}, "names no set"),
        ({"mix": [{"shards": "a", "wieght": 2}]}, "'data.mix.0.wieght'; did you mean 'weight'?"),
        ({"mix": [{"shards": "a", "name": "a/b"}]}, "match pattern"),
    ],
)
def test_invalid_mixes_are_refused(data, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        make_section(TrainConfig, {"data": data})
    assert len(str(caught.value).splitlines()) == 1


def test_a_signature_in_a_url_is_no_part_of_a_sets_name():
    (part,) = TrainConfig.model_validate(
        {"data": {"mix": [{"shards": "https://host/my set/?signature=abc"}]}}
    ).data.mix
    assert part.title == "my-set"


def test_a_missing_set_is_named(tiny_set, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: {{mix: [{{shards: {tiny_set}, name: home}}, {{shards: {tmp_path}/none}}]}}"
    )
    result = CliRunner().invoke(cli, ["run", "--config", str(path)])
    assert result.exit_code == 2
    assert (
        f"'data.mix[1].shards' is {tmp_path}/none: does not exist; fix: build it by"
        in result.output
    )


# --- training --------------------------------------------------------------------------------


def run_trainer(config, *, max_steps, resume=None):
    training = config.training.model_copy(update={"max_steps": max_steps})
    config = config.model_copy(update={"training": training})
    loader = make_loader(config)
    torch.manual_seed(1)
    model = MultiModalCreature(config, loader.shapes)
    trainer = Trainer(
        model, config, loader, "cpu", run_name="mixed", console=Console(file=io.StringIO())
    )
    if resume:
        trainer.load_checkpoint(resume)
    return trainer.train()


def test_tensorboard_has_the_samples_of_each_set_across_a_resume(tiny_set, away_set, tmp_path):
    config = make_config(tiny_set, away_set, heads=tiny_sets.TEXT_HEADS)
    training = config.training.model_copy(
        update={
            "log_interval": 2,
            "log_dir": tmp_path / "runs",
            "checkpointing": config.training.checkpointing.model_copy(
                update={"save_dir": tmp_path / "checkpoints"}
            ),
        }
    )
    config = config.model_copy(update={"training": training})
    first = run_trainer(config, max_steps=4)
    run_trainer(config, max_steps=8, resume=first.checkpoint)
    events = EventAccumulator(str(tmp_path / "runs" / "mixed")).Reload()
    keys = [b["keys"] for b in take(make_loader(config), 8)]
    for name, sessions in {"away": {"fay", "gus"}, "home": {"ann", "cat", "dan", "eve"}}.items():
        drawn = np.cumsum([sum(k.partition("@")[0] in sessions for k in batch) for batch in keys])
        curve = {e.step: e.value for e in events.Scalars(f"samples_of/{name}")}
        assert curve == {step: float(drawn[step - 1]) for step in (2, 4, 6, 8)}


@pytest.mark.slow
def test_the_self_test_passes_on_a_mix(tiny_set, away_set, tmp_path):
    path = tmp_path / "mine.yaml"
    config = make_config(tiny_set, away_set, batch_size=4)
    path.write_text(json.dumps(config.model_dump(mode="json")))
    arguments = ["selftest", "--config", str(path), "--kills", "2", "--steps", "12"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "PASS" in result.output
