"""Training on several ranks, compared with the same training in one process.

Losses, gradient norms and weights agree to a relative 1e-5: ranks add the same float32 numbers in
another order.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from experiments.ranks import PARALLEL, WAYS, compare_ways
from helpers import sets as tiny_sets
from helpers.rank_program import train_among_ranks, train_once
from helpers.training import corrupt_sample

from shared.errors import ConfigError, TooManyCorruptSamplesError
from train.data.batch import join_batches
from train.data.batch_maker import CorruptSampleBudget
from train.data.loader import Loader
from train.data.shard_source import ShardSource
from train.machine import distributed

TOLERANCE = 1e-5
TEXT_ONLY = {"loss_weights": {"audio": 0.0, "animation": 0.0}}
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
# One process of pytest-xdist runs them all: the fixture `pair` takes most of the time.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("distributed")]


# --- the loader's shares ---------------------------------------------------------------------


def share(shards, rank, world_size, *, split="train", num_epochs=None, **options):
    config = tiny_sets.make_config(shards, **{"batch_size": 4, **options})
    source = ShardSource(shards, split=split)
    return Loader(source, config, num_epochs=num_epochs, rank=rank, world_size=world_size)


def joined(loaders, count):
    """Join the shares of all ranks to the first global batches."""
    batches = [list(itertools.islice(loader, count)) for loader in loaders]
    return [
        {
            **join_batches(shares),
            "skipped": [one for s in shares for one in s["skipped"]],
            "index": {s["index"] for s in shares},
        }
        for shares in zip(*batches, strict=True)
    ]


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for name in ("keys", "skipped", "index"):
            assert one[name] == other[name]
        assert torch.equal(one["weight"], other["weight"])
        for group in ("inputs", "targets"):
            for name, tensor in one[group].items():
                assert torch.equal(tensor, other[group][name]), name


@few_cores
@pytest.mark.parametrize("heads", [tiny_sets.HEADS, tiny_sets.TEXT_HEADS])
@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_the_shares_of_all_ranks_are_the_global_batches(tiny_set, world_size, num_workers, heads):
    options = {"heads": heads, "num_workers": num_workers}
    shares = [share(tiny_set, rank, world_size, **options) for rank in range(world_size)]
    assert_same(joined(shares, 7), joined([share(tiny_set, 0, 1, heads=heads)], 7))


def test_a_corrupt_sample_has_the_same_substitute_whatever_the_rank(tiny_set, tmp_path):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "shards")
    tiny_sets.flip_byte(min(shards.glob("train-*.vision_left.tar")), 700)
    options = {"max_bad_fraction": 1.0}
    whole = joined([share(shards, 0, 1, **options)], 8)  # an epoch: the sample is in one of them
    assert any(batch["skipped"] for batch in whole)
    halves = joined([share(shards, rank, 2, **options) for rank in range(2)], 8)
    seen = set()
    for batch in halves:  # windows share the member, and each rank reports it once
        found = {(s["file"], s["offset"]): s for s in reversed(batch["skipped"])}
        batch["skipped"] = [s for member, s in found.items() if member not in seen]
        seen |= found.keys()
    assert_same(halves, whole)


def test_a_loaders_state_depends_on_no_rank_and_no_world_size(tiny_set):
    states = [share(tiny_set, rank, size).state_at(3) for rank, size in [(0, 1), (1, 2), (3, 4)]]
    assert states == states[:1] * 3


def test_a_world_size_that_does_not_divide_the_batch_is_refused(tiny_set):
    with pytest.raises(ConfigError, match=r"start 2 or 4 ranks .*data\.batch_size to 3 or 6"):
        share(tiny_set, 0, 3)


def test_a_trainer_refuses_a_loader_of_another_share(tiny_set):
    with pytest.raises(ConfigError, match=r"yields share 1 of 2 to rank 0 of 1"):
        distributed.check_share(share(tiny_set, 1, 2))


def test_processes_of_torchrun_without_a_process_group_are_refused(tiny_set, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"with train\.machine\.distributed\.process_group"):
        distributed.check_share(share(tiny_set, 0, 2))


def test_corrupt_members_are_limited_by_their_share_of_all_members_read():
    limit = CorruptSampleBudget(max_fraction=0.01)
    for number in range(2):
        limit.add(8, [corrupt_sample(number)])
        limit.check()  # of the first 200 members two may be corrupt
    assert limit.add(8, [corrupt_sample(1)]) == []  # counts once, however often it is read
    limit.check()
    limit.add(8, [corrupt_sample(2)])
    with pytest.raises(TooManyCorruptSamplesError, match=r"3 of 32 stored segments.*differs 2"):
        limit.check()
    larger = CorruptSampleBudget(max_fraction=0.01, num_read=1000)
    larger.add(8, [corrupt_sample(number) for number in range(10)])
    larger.check()


def test_a_restarted_attempt_sees_no_keys_of_earlier_attempts():
    """Ranks join a persistent store in any order, or die before they have joined."""
    store, chance = dist.HashStore(), random.Random(0)
    store.set("id/1", "of a rank that died before it met the others")
    names = []
    for _ in range(20):
        delays_s = [chance.uniform(0, 0.05) for _ in range(3)]

        def meet(number, delays_s=delays_s):
            time.sleep(delays_s[number])
            return distributed.fresh_store(store, number, 3)

        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(meet, range(3)))
        assert not any(one.check(["address"]) for one in stores)
        stores[2].set("address", "2")
        names.append([one.get("address").decode() for one in stores])
    assert names == [["2"] * 3] * 20


# --- training --------------------------------------------------------------------------------


def keys_of(ranks):
    """Return the keys of the global batches, in order."""
    return [[key for r in ranks for key in r["keys"][i]] for i in range(len(ranks[0]["keys"]))]


def assert_same_numbers(ranks, alone):
    """Check that every rank measured the same as the one process."""
    for result in ranks:
        assert len(result["metrics"]) == len(alone["metrics"])
        for here, there in zip(result["metrics"], alone["metrics"], strict=True):
            names = [n for n in there if n.startswith(("loss_", "grad_norm"))]
            assert {n: here[n] for n in names} == pytest.approx(
                {n: there[n] for n in names}, rel=TOLERANCE
            )
        assert result["val"] == pytest.approx(alone["val"], rel=TOLERANCE)


def assert_same_checkpoint(path, other):
    """Check that two checkpoints have equal weights and moments under the same keys."""
    one, two = torch.load(path), torch.load(other)
    assert one["model"].keys() == two["model"].keys()
    for name, tensor in two["model"].items():
        torch.testing.assert_close(one["model"][name], tensor, rtol=1e-4, atol=1e-5)
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for index, moments in two["optimizer"]["state"].items():
        for name, tensor in moments.items():
            found = one["optimizer"]["state"][index][name]
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6)
    assert one["stream"] == two["stream"]
    assert one["step"] == two["step"]


KINDS = {
    "ddp": {"parallel": "ddp", "save_interval": 2},
    "fsdp": {"parallel": "fsdp", "num_workers": 1, "save_interval": 2},
    "accumulated": {"accumulation_steps": 2, "max_steps": 2},
    "accumulated fsdp": {"accumulation_steps": 2, "max_steps": 2, "parallel": "fsdp"},
    "dense text": TEXT_ONLY,
    "recomputing ddp": {"parallel": "ddp", "gradient_checkpointing": True},
    "recomputing fsdp": {"parallel": "fsdp", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def pair(tiny_set, tmp_path_factory):
    """Yield the folder, and by name the results of one process and those of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")

    def runs(where, kinds):
        return [
            {"shards": str(tiny_set), "folder": str(folder / where / name), **options}
            for name, options in kinds.items()
        ]

    bad = tiny_sets.copy_set(tiny_set, folder / "bad")
    tiny_sets.flip_byte(min(bad.glob("train-*.vision_left.tar")), 700)
    tiny_sets.flip_byte(min(bad.glob("val-*.vision_left.tar")), 600)  # of a sample and of padding
    corrupt = {"corrupt": {"shards": str(bad), "max_bad_fraction": 1.0, "max_steps": 8}}
    whole = {"alone": {"save_interval": 2}, "accumulated": KINDS["accumulated"]}
    whole |= {"dense text": TEXT_ONLY, **corrupt}
    alone = [train_once(**run) for run in runs("alone", whole)]
    start = str(folder / "alone" / "alone" / "checkpoints" / "model_step_2.pt")
    resumed = {f"resumed {p}": {"parallel": p, "resume": start} for p in ("ddp", "fsdp")}
    stopped = {"stopped": {"signal_at": (1, 2), "max_steps": 50}}
    kinds = {**KINDS, **resumed, **stopped, **corrupt}
    among = train_among_ranks(2, runs("two", kinds), folder / "out")
    return folder, dict(zip(whole, alone, strict=True)), dict(zip(kinds, among, strict=True))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("ddp", "alone"),
        ("fsdp", "alone"),
        ("accumulated", "accumulated"),
        ("accumulated fsdp", "accumulated"),
        ("dense text", "dense text"),
        ("recomputing ddp", "alone"),
        ("recomputing fsdp", "alone"),
    ],
)
def test_two_ranks_train_on_the_same_batches_with_the_same_losses(pair, name, reference):
    _, alone, two = pair
    assert keys_of(two[name]) == alone[reference]["keys"]
    assert_same_numbers(two[name], alone[reference])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_equals_that_of_one_process(pair, name):
    folder, _, _ = pair
    for file in ("model_step_2.pt", "model_final.pt"):
        saved = folder / "two" / name / "checkpoints" / file
        assert_same_checkpoint(saved, folder / "alone" / "alone" / "checkpoints" / file)


@pytest.mark.parametrize("name", ["resumed ddp", "resumed fsdp"])
def test_two_ranks_resume_from_the_checkpoint_of_one_process(pair, name):
    _, alone, two = pair
    assert keys_of(two[name]) == alone["alone"]["keys"][2:]
    assert_same_numbers(two[name], {**alone["alone"], "metrics": alone["alone"]["metrics"][2:]})


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_resumes_from_the_checkpoint_of_two_ranks(pair, tiny_set, tmp_path, name):
    folder, alone, _ = pair
    start = folder / "two" / name / "checkpoints" / "model_step_2.pt"
    result = train_once(shards=str(tiny_set), folder=str(tmp_path), resume=str(start))
    assert result["keys"] == alone["alone"]["keys"][2:]
    assert_same_numbers([result], {**alone["alone"], "metrics": alone["alone"]["metrics"][2:]})


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_one_checkpoint(pair):
    folder, _, two = pair
    outcomes = {(result["steps"], result["stopped_by"]) for result in two["stopped"]}
    assert outcomes == {(3, "signal")}
    saved = [path.name for path in (folder / "two" / "stopped" / "checkpoints").iterdir()]
    assert saved == ["model_step_3.pt"]


def test_samples_of_all_ranks_are_counted(pair):
    _, alone, two = pair
    for result in two["ddp"]:
        assert result["num_samples"] == alone["alone"]["num_samples"]


def test_corrupt_samples_of_all_ranks_are_counted_and_logged(pair):
    folder, alone, two = pair
    skipped = alone["corrupt"]["metrics"][-1]["skipped_samples"]
    assert skipped > 0
    assert [result["metrics"][-1]["skipped_samples"] for result in two["corrupt"]] == [skipped] * 2
    lists = [folder / where / "corrupt/runs/tiny/quarantine.jsonl" for where in ("alone", "two")]
    entries = [sorted(path.read_text().splitlines()) for path in lists]
    assert entries[0] == entries[1]
    splits = Counter(json.loads(entry)["split"] for entry in entries[0])
    assert splits == {"train": skipped, "val": 1}
    for result in two["corrupt"]:
        assert result["val"] == pytest.approx(alone["corrupt"]["val"], rel=TOLERANCE)


# --- all the rest: four ranks, every way, dying ranks ----------------------------------------


@few_cores
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("last_batch", ["pad", "drop"])
def test_any_number_of_ranks_and_workers_trains_on_the_same_batches(
    tiny_set, tmp_path, world_size, last_batch
):
    options = {"shards": str(tiny_set), "max_steps": 8, "last_batch": last_batch}
    alone = train_once(folder=str(tmp_path / "alone"), **options)
    ways = list(itertools.product(("ddp", "fsdp"), (0, 1, 2)))
    runs = [
        {"folder": str(tmp_path / f"{p}{n}"), "parallel": p, "num_workers": n, **options}
        for p, n in ways
    ]
    results = train_among_ranks(world_size, runs, tmp_path / "out")
    for ranks in results:
        assert keys_of(ranks) == alone["keys"]
        assert_same_numbers(ranks, alone)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_as_one_process_does_in_every_mode(tiny_set, tmp_path, world_size):
    """In fp16 the scale must be that of one process: 65536 times the ranks overflows here."""
    ways = {f"{parallel} {way.name}": way for way in WAYS for parallel in PARALLEL}
    found = compare_ways(tiny_set, tmp_path, world_size, WAYS)
    assert {name: f for name, f in found.items() if not f.is_good(ways[name])} == {}


@pytest.mark.slow
def test_a_run_resumes_from_any_mode_in_any_other(tiny_set, tmp_path):
    """Alternate one process, DDP and FSDP on 2 and 4 ranks; compare with one process."""
    ways = [(1, "auto"), (2, "ddp"), (4, "fsdp"), (4, "ddp"), (2, "fsdp"), (1, "auto")]
    total = 2 * len(ways)
    options = {"shards": str(tiny_set), "max_steps": total, "save_interval": 2}
    alone = train_once(folder=str(tmp_path / "alone"), **options)
    folder = tmp_path / "ladder"
    keys, resume = [], None
    for number, (world_size, parallel) in enumerate(ways):
        # The schedule needs max_steps to stay: a signal ends each part.
        stop = {"signal_at": (0, 2 * number + 1)} if number < len(ways) - 1 else {}
        run = {"folder": str(folder), "parallel": parallel, "resume": resume, **options, **stop}
        ranks = (
            [train_once(**run)]
            if world_size == 1
            else train_among_ranks(world_size, [run], tmp_path / f"out{number}")[0]
        )
        keys += keys_of(ranks)
        resume = str(folder / "checkpoints" / f"model_step_{2 * number + 2}.pt")
        part = alone["metrics"][2 * number : 2 * number + 2]
        assert_same_numbers(ranks, {**alone, "metrics": part, "val": ranks[0]["val"]})
    assert keys == alone["keys"]
    assert_same_checkpoint(
        folder / "checkpoints/model_final.pt", tmp_path / "alone/checkpoints/model_final.pt"
    )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_dropout_of_each_rank_continues_where_it_stopped(tiny_set, tmp_path, parallel):
    options = {"shards": str(tiny_set), "parallel": parallel, "dropout": 0.3, "save_interval": 3}
    whole = {"folder": str(tmp_path / "whole"), "max_steps": 6, **options}
    start = str(tmp_path / "whole/checkpoints/model_step_3.pt")
    rest = {**whole, "folder": str(tmp_path / "rest"), "resume": start}
    uninterrupted, resumed = train_among_ranks(2, [whole, rest], tmp_path / "out")
    losses = [[m["loss_total"] for m in r[0]["metrics"]] for r in (uninterrupted, resumed)]
    assert losses[0][3:] == losses[1]
