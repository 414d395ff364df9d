"""The stream of batches: positions -> samples -> read, decode and collate into shared memory.

::

    Task(i, slot)           which batch, and where in the ring of shared memory (ring.py)
      -> worker i % W       a process of webdataset's WebLoader
           BatchOrder.plan  which samples: arithmetic
           BatchMaker      pread, checksum, decode into the slot; substitute corrupt ones
      -> Loader             batches in order, views of their slots; stops when too many samples are
                            corrupt

Worker w makes batches w, w + W, ...; WebLoader takes them from the workers in turn. So the batches
are the same for any number of workers, and the state is one number.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
import webdataset as wds

from shared.errors import ConfigError
from shared.recipe import Recipe, Split, load_recipe
from train.data.batch import WindowShapes, array_forms, compose_batch
from train.data.batch_maker import BatchMaker, CorruptSampleBudget, Task, init_worker
from train.data.cached_set import CacheSettings, default_cache_dir
from train.data.mixture import MixedOrder, MixedSource, integer_weights
from train.data.order import BatchOrder, SampleOrder
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource
from train.data.shared_pool import SharedBatchPool
from train.machine.runtime import translate_worker_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shared.timing import StageTimer
    from train.config import TrainConfig
    from train.data.batch import Batch, SampleSource

_SILENT_TIMEOUT_S = 600

_MAX_NEXT_BATCH = 1 << 40
"""Far beyond any run; positions of samples are int64."""

_ORDER_KEYS = ("last_batch", "shuffle_block_shards")
"""Keys of ``data`` that decide which samples batch number i holds."""


class Loader:
    """Batches of a source, in the order of the seed, from any position on.

    Iterating gives ``docs/architecture.md``'s batches with "index", "epoch" and "skipped"; of a mix
    also "samples_of": how many samples of the global batch each set gives. The train loader goes on
    for ever; one with `num_epochs` ends. Every iteration begins anew where the loader was told to:
    at its beginning, or at the loaded state. What stands in for a corrupt sample has the weight of
    one in the endless stream and 0 in a finite one, which is there to measure.

    Args:
        source: the samples.
        config: streams, batch size, workers, seed.
        is_shuffled: False gives the stored order.
        num_epochs: how many passes, each complete whatever ``data.last_batch`` says; None never
            ends.
        rank: which share of each global batch to give.
        world_size: number of shares; the global batches and the state do not depend on it.
        timer: measure how batches are made: each then has "stages_s", the seconds of each stage,
            "made_s", when it was ready by ``time.perf_counter``, and where a GPU trains the first
            one "pin_s".

    Raises:
        ConfigError: there is no sample, no batch can be made, the ranks can't share it equally, or
            the tick rate does not fit.
    """

    def __init__(
        self,
        source: SampleSource,
        config: TrainConfig,
        *,
        is_shuffled: bool = True,
        num_epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        timer: StageTimer | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.shapes = WindowShapes.from_recipe(
            source.recipe, tick_rate_hz=config.model.tick_rate_hz
        )
        if not source.shard_sizes.sum():
            raise ConfigError(
                f"{config.data.source_description}: there is no sample in this "
                "split to make batches of; "
                "record more sessions, or let the recipe hold out fewer (split.val_fraction, or "
                "another split.salt), and build shards again"
            )
        try:
            self.order = self._make_order(is_shuffled=is_shuffled, is_endless=num_epochs is None)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._num_epochs = num_epochs
        self._timer = timer
        self._start = 0
        self._has_begun = False

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return self.order.batches_per_epoch

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """All that is needed to go on at global batch `next_batch`: plain ints and strings."""
        state = {
            "fingerprint": self.source.fingerprint,
            "seed": self.config.training.seed,
            "batch_size": self.config.data.batch_size,
            **{name: getattr(self.config.data, name) for name in _ORDER_KEYS},
            "next_batch": next_batch,
        }
        if isinstance(self.source, MixedSource):
            sets = {name: part.fingerprint for name, part in self.source.sources.items()}
            state |= {"mix": self.source.weights, "sets": sets}
        if isinstance(self.order, MixedOrder):
            del state["last_batch"]  # there is none
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin where another loader stopped; before the first batch is taken.

        Raises:
            ConfigError: iteration has begun, or see :meth:`position_of`.
        """
        if self._has_begun:
            raise ConfigError("the loader has begun to read; load its state before the first batch")
        self._start = self.position_of(state)

    def position_of(self, state: Mapping[str, Any]) -> int:
        """Number of the global batch that begins where another loader stopped, whose batches may
        have been larger or smaller.

        Raises:
            ConfigError: the state is of other data or of another order, or no batch begins there.
        """
        next_batch = state.get("next_batch")
        if type(next_batch) is not int or not 0 <= next_batch <= _MAX_NEXT_BATCH:
            raise ConfigError(
                f"the checkpoint's stream has next_batch {next_batch!r}, which is no position; "
                "resume from another checkpoint, or start anew without --resume"
            )
        own = self.state_at(next_batch)
        for name in ("mix", "sets", "fingerprint", "seed", *_ORDER_KEYS):
            if state.get(name) != own.get(name):
                raise ConfigError(_describe_other(name, state.get(name), own.get(name)))
        return self._number_here(next_batch, state.get("batch_size"))

    def _number_here(self, next_batch: int, batch_size: object) -> int:
        """Number of the batch that begins where batch `next_batch` of another size would.

        Raises:
            ConfigError: none does.
        """
        own = self.config.data.batch_size
        found = None
        if type(batch_size) is int and 0 < batch_size <= _MAX_NEXT_BATCH:
            found = self.order.number_of(next_batch, batch_size=batch_size)
        if found is None or found > _MAX_NEXT_BATCH:
            raise ConfigError(
                f"the checkpoint's stream is at batch {next_batch} of {batch_size!r} samples, "
                f"where none of {own} begins; set data.batch_size to {batch_size!r} or a divisor "
                "of it, or start anew without --resume"
            )
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._has_begun = True
        limit = CorruptSampleBudget(max_fraction=self.config.data.max_bad_fraction)
        for batch in self._batches():
            if self.world_size == 1:  # else the trainer counts those of all ranks
                limit.count(len(batch["keys"]), batch["skipped"])
            yield batch

    def _make_order(self, *, is_shuffled: bool, is_endless: bool) -> BatchOrder | MixedOrder:
        """Only the endless, shuffled stream is mixed; else sets come one after the other."""
        data, source = self.config.data, self.source

        def samples_of(part: SampleSource) -> SampleOrder:
            return SampleOrder(
                part.shard_sizes,
                fingerprint=part.fingerprint,
                seed=self.config.training.seed,
                block_shards=data.shuffle_block_shards,
                is_shuffled=is_shuffled,
            )

        shares = {
            "batch_size": data.batch_size,
            "rank": self.rank,
            "world_size": self.world_size,
        }
        if isinstance(source, MixedSource) and is_shuffled and is_endless:
            orders = {name: samples_of(part) for name, part in source.sources.items()}
            return MixedOrder(orders, source.weights, **shares)
        last_batch = data.last_batch if is_endless else "pad"
        return BatchOrder(samples_of(source), last_batch=last_batch, **shares)

    def _batches(self) -> Iterator[Batch]:
        """Batches as they come from the workers, each a view of its slot."""
        data = self.config.data
        ring = SharedBatchPool(
            array_forms(self.order.share_size, config=self.config, shapes=self.shapes),
            num_recycled=num_recycled_slots(self.config),
        )
        messages = wds.WebLoader(
            BatchMaker(
                self.source,
                self.order,
                ring,
                config=self.config,
                shapes=self.shapes,
                is_measured=self._num_epochs is not None,
                timer=self._timer,
            ),
            sampler=self._tasks(ring),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            timeout=_SILENT_TIMEOUT_S if data.num_workers else 0,
            worker_init_fn=init_worker,
        )
        # A few held-out batches are not worth locking memory: tenths of a second per GB.
        is_worth_it = self._num_epochs is None and self.config.training.device != "cpu"
        is_pinned = is_worth_it and torch.cuda.is_available()
        with translate_worker_errors():
            for number, message in enumerate(messages):
                if "error" in message:
                    raise message["error"]
                if number == 0 and is_pinned:
                    began_s = time.perf_counter()
                    ring.pin()
                    if self._timer is not None:
                        message["rest"]["pin_s"] = time.perf_counter() - began_s
                if isinstance(self.order, MixedOrder):
                    message["rest"]["samples_of"] = self.order.samples_of(message["rest"]["index"])
                arrays = {**ring.view(message["slot"]), **message["dense"]}
                if is_pinned:
                    arrays |= {
                        n: torch.from_numpy(a).pin_memory() for n, a in message["dense"].items()
                    }
                yield compose_batch(arrays, self.config) | message["rest"]

    def _tasks(self, ring: SharedBatchPool) -> Iterator[Task]:
        """What is to be made next and where; drawn in this process when a worker gets work."""
        if self._num_epochs is None:
            indices: Iterable[int] = itertools.count(self._start)
        else:
            indices = range(self._start, self._num_epochs * self.batches_per_epoch)
        return (Task(index, ring.acquire()) for index in indices)


def num_recycled_slots(config: TrainConfig) -> int:
    """Slots of the ring that keep their memory.

    One for each batch that is ahead in the workers; one for each that a step of the trainer holds
    while the next step's are fetched, and one for each of these.
    """
    data = config.data
    return data.num_workers * data.prefetch_batches + 2 * config.training.accumulation_steps


def _describe_other(name: str, there: object, here: object) -> str:
    """What of a stream differs from the checkpoint's, and how to go on."""
    if name in {"fingerprint", "sets"}:
        return (
            f"the checkpoint was trained on other data ({name} {there!r}, here {here!r}), whose "
            "order this run can't continue; name the data it was trained on, or begin a new run "
            "with its weights by --weights"
        )
    return (
        f"the checkpoint's stream has {name} {there!r}, this one {here!r}; resume with what it "
        "had, or start anew without --resume"
    )


def _as_it_is(message: dict[str, Any]) -> dict[str, Any]:
    return message


def open_source(config: TrainConfig, *, split: Split) -> SampleSource:
    """The source that a configuration names.

    Raises:
        ConfigError: it names none.
        ShardError: the shard set can't be read.
        StorageError: it lies behind a URL that can't be reached.
        SessionError: no session can be used.
    """
    data = config.data
    if data.sets:
        folder = data.cache_dir or default_cache_dir()
        cache = CacheSettings(folder=folder, limit_bytes=round(data.cache_gb * 1e9))
        if data.mix is None:
            return ShardSource(data.sets["shards"], split=split, cache=cache)
        weights = integer_weights([each.weight for each in data.mix])
        parts = sorted(zip(data.mix, weights, strict=True), key=lambda part: part[0].title)
        sources = {e.title: ShardSource(e.shards, split=split, cache=cache) for e, _ in parts}
        return MixedSource(sources, {each.title: weight for each, weight in parts})
    if data.root_dir is None:
        raise ConfigError(
            "no data is named; set data.shards (a shard set, fast), data.mix (several) or "
            "data.root_dir (sessions)"
        )
    recipe = Recipe() if data.recipe is None else load_recipe(data.recipe)
    return SessionSource(data.root_dir, recipe=recipe, split=split)
