"""The stream of batches: positions -> samples -> read, decode and collate into shared memory.

::

    Task(index, slot)      which batch, and which slot of the shared pool it goes to
      -> worker index % W    a process of webdataset's WebLoader
           BatchOrder.plan     which samples: arithmetic
           BatchMaker          pread, checksum, decode into the slot; substitute corrupt samples
      -> Loader              batches in order, as views of their slots; stops the run when too many
                             samples are corrupt

Worker w makes batches w, w + W, ..., and WebLoader takes them from the workers in turn. The batches
are therefore the same for any number of workers, and the state is one number.
"""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import webdataset as wds

from shared.errors import ConfigError, EngineError
from shared.machine import describe_disk, machine_error
from shared.recipe import Recipe, Split, load_recipe
from shared.storage import DISK_FULL
from train.data.batch import array_forms, compose_batch
from train.data.batch_maker import BatchMaker, CorruptSampleBudget, Task, init_worker
from train.data.cached_set import CacheSettings
from train.data.mixture import MixedSource, integer_weights
from train.data.order import OrderSettings
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource
from train.data.shared_pool import SharedBatchPool
from train.data.windows import WindowGrid
from train.machine.runtime import translate_worker_errors
from train.shapes import WindowShapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shared.timing import StageTimer
    from train.config import TrainConfig
    from train.data.batch import Batch, SampleSource
    from train.data.batch_maker import MadeBatch

_SEMAPHORES = "/dev/shm"  # noqa: S108 (a file system, no file)

_SILENT_TIMEOUT_S = 600
"""A loader process that sends nothing for this long is an error."""

_MAX_NEXT_BATCH = 1 << 40
"""Far beyond any run; positions of samples are int64."""

_WINDOW_KEYS = {
    "tick_rate_hz": "model.tick_rate_hz",
    "window_s": "data.window.duration_s",
    "stride_s": "data.window.stride_s",
    "period_s": "data.modalities and training.loss_weights",
}
"""Keys of a state about windows, and the configuration keys that decide each."""

_ELASTIC_KEYS = ("batch_size", "next_batch")
"""Keys of a state that may differ; if others do, batch i of two loaders has other samples."""


class Loader:
    """Batches of a source in the order of a seed, from any position.

    Iterating yields the batches of ``docs/batch.md`` with "index", "epoch", "num_members" and
    "skipped"; for a mix also "samples_of": how many samples of the global batch come from each set.
    The training loader never ends; one with `num_epochs` does. Every iteration starts over at the
    loader's start: its first batch, or the loaded state. A finite loader exists for measuring: its
    windows touch, whatever `data.window.stride_s` is, and the substitute of a corrupt sample has
    weight 0 in it; in the endless stream, 1.

    Args:
        num_epochs: number of passes, each complete whatever ``data.last_batch`` says; None never
            ends.
        rank: which share of each global batch to give.
        world_size: number of shares; global batches and state do not depend on it.
        timer: measures how batches are made: each then has "stages_s", the seconds of each stage,
            and "made_s", when it was ready by ``time.perf_counter``. If its memory is pinned for a
            GPU, the first one has "pin_s".

    Raises:
        ConfigError: there are no samples, no batch can be made, the ranks can't share it equally,
            or windows or streams do not fit the recipe.
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
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.shapes = WindowShapes.from_recipe(source.recipe, config)
        grid = WindowGrid.from_config(config)
        if num_epochs is not None:
            grid = grid.as_touching()
        self.source = source.open_windows(self.shapes, grid)
        if not source.shard_sizes.sum():
            raise ConfigError(
                f"{config.data.source_description}: this split has no samples; fix: record more "
                "sessions, or hold out fewer in the recipe (lower split.val_fraction or change "
                "split.salt) and rebuild the shards"
            )
        settings = OrderSettings(
            seed=config.training.seed,
            grid=grid,
            block_shards=config.data.shuffle_block_shards,
            batch_size=config.data.batch_size,
            last_batch=config.data.last_batch if num_epochs is None else "pad",
            is_shuffled=is_shuffled,
            is_endless=num_epochs is None,
            rank=rank,
            world_size=world_size,
        )
        try:
            self.order = self.source.batch_order(settings)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._num_epochs = num_epochs
        self._timer = timer
        self._start = 0
        self._has_begun = False

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of batches of one pass over the data."""
        return self.order.batches_per_epoch

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """Return what is needed to resume at global batch `next_batch`: numbers and strings."""
        return {
            **self.source.identity(),
            **self.order.state,
            "period_s": self.shapes.period_s,
            "seed": self.config.training.seed,
            "batch_size": self.config.data.batch_size,
            "next_batch": next_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start where another loader stopped; call it before the first batch is taken."""
        if self._has_begun:
            raise ConfigError(
                "the loader has begun to read; fix: load its state before the first batch"
            )
        self._start = self.resume_index(state)

    def resume_index(self, state: Mapping[str, Any]) -> int:
        """Return the index of the global batch that starts where another loader stopped.

        The other loader's batches may have been larger or smaller.

        Raises:
            ConfigError: the state is of other data or of another order, or no batch starts there.
        """
        next_batch = state.get("next_batch")
        if type(next_batch) is not int or not 0 <= next_batch <= _MAX_NEXT_BATCH:
            raise ConfigError(
                f"checkpoint resumes at next_batch {next_batch!r}, which is not a batch index; "
                "fix: resume from another checkpoint, or start a new run without --resume"
            )
        own = self.state_at(next_batch)
        for name in dict.fromkeys(("mix", "sets", "fingerprint", *_WINDOW_KEYS, *own)):
            if name not in _ELASTIC_KEYS and state.get(name) != own.get(name):
                raise ConfigError(_describe_mismatch(name, state.get(name), own.get(name)))
        return self._rescale_index(next_batch, state.get("batch_size"))

    def _rescale_index(self, next_batch: int, batch_size: object) -> int:
        """Return the index of the batch that starts where `next_batch` of another size does."""
        index = None
        if type(batch_size) is int and 0 < batch_size <= _MAX_NEXT_BATCH:
            index = self.order.rescale_index(next_batch, batch_size=batch_size)
        if index is None or index > _MAX_NEXT_BATCH:
            raise ConfigError(
                f"checkpoint resumes at batch {next_batch} of size {batch_size!r}, where no batch "
                f"of size {self.config.data.batch_size} starts; fix: set data.batch_size to "
                f"{batch_size!r} or a divisor of it, or start a new run without --resume"
            )
        return index

    def __iter__(self) -> Iterator[Batch]:
        self._has_begun = True
        budget = CorruptSampleBudget(max_fraction=self.config.data.max_bad_fraction)
        for batch in self._batches():
            batch["skipped"] = budget.add(batch["num_members"], batch["skipped"])
            if self.world_size == 1:  # otherwise the trainer counts those of all ranks
                budget.check()
            yield batch

    def _batches(self) -> Iterator[Batch]:
        """Yield batches as the workers finish them, each as a view of its slot."""
        pixels, share_size = self.config.data.pixels, self.order.share_size
        pool = SharedBatchPool(
            array_forms(share_size, shapes=self.shapes, pixels=pixels),
            num_recycled=num_recycled_slots(self.config),
        )
        # Pinning costs tenths of a second per GB, too much for a few held-out batches.
        is_worth_pinning = self._num_epochs is None and self.config.training.device != "cpu"
        is_pinned = is_worth_pinning and torch.cuda.is_available()
        with translate_worker_errors(), _start_errors():
            for number, made in enumerate(self._make_batches(pool)):
                if isinstance(made, EngineError):
                    raise made
                if number == 0 and is_pinned:
                    began_s = time.perf_counter()
                    pool.pin()
                    if self._timer is not None:
                        made.extras["pin_s"] = time.perf_counter() - began_s
                if samples_of := self.order.samples_per_set(made.extras["index"]):
                    made.extras["samples_of"] = samples_of
                arrays: dict[str, Any] = {**pool.view(made.slot), **made.packed_text}
                if is_pinned:
                    arrays |= {
                        n: torch.from_numpy(a).pin_memory() for n, a in made.packed_text.items()
                    }
                yield compose_batch(arrays, self.shapes) | made.extras

    def _make_batches(self, pool: SharedBatchPool) -> Iterable[MadeBatch | EngineError]:
        """Return batches that loader processes make in the slots of a pool, in order."""
        data = self.config.data
        maker = BatchMaker(
            self.source,
            self.order,
            pool,
            is_measured=self._num_epochs is not None,
            timer=self._timer,
        )
        return wds.WebLoader(  # type: ignore[no-any-return]
            maker,
            sampler=self._tasks(pool),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            timeout=_SILENT_TIMEOUT_S if data.num_workers else 0,
            worker_init_fn=init_worker,
        )

    def _tasks(self, pool: SharedBatchPool) -> Iterator[Task]:
        """Yield the next batch to make and its slot; runs in this process, on demand."""
        if self._num_epochs is None:
            indices: Iterable[int] = itertools.count(self._start)
        else:
            indices = range(self._start, self._num_epochs * self.batches_per_epoch)
        return (Task(index, pool.acquire()) for index in indices)


@contextmanager
def _start_errors() -> Iterator[None]:
    """Name the full file system if loader processes can't get a semaphore."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in DISK_FULL:
            raise
        fix = (
            f"no space for the semaphores of loader processes ({describe_disk(_SEMAPHORES)}); fix: "
            "enlarge it (docker run --shm-size), or set data.num_workers: 0"
        )
        raise machine_error(error, _SEMAPHORES, fix=fix) from error


def num_recycled_slots(config: TrainConfig) -> int:
    """Return the number of slots that keep their memory.

    That is one for each batch that the workers make ahead, one for each batch that the trainer's
    current step holds, and one for each batch of the next step.
    """
    data = config.data
    return data.num_workers * data.prefetch_batches + 2 * config.training.accumulation_steps


def open_source(config: TrainConfig, *, split: Split) -> SampleSource:
    """Open the source that a configuration names.

    Raises:
        ConfigError: it names none.
        ShardError: the shard set can't be read.
        StorageError: the shard set is behind a URL that can't be reached.
        SessionError: no session can be used.
    """
    data = config.data
    if data.sets:
        cache = CacheSettings(folder=data.cache_dir, limit_bytes=round(data.cache_gb * 1e9))
        if data.mix is None:
            return ShardSource(data.sets["shards"], split=split, cache=cache)
        weights = integer_weights([entry.weight for entry in data.mix])
        entries = sorted(zip(data.mix, weights, strict=True), key=lambda pair: pair[0].title)
        sources = {e.title: ShardSource(e.shards, split=split, cache=cache) for e, _ in entries}
        return MixedSource(sources, {entry.title: weight for entry, weight in entries})
    if data.root_dir is None:
        raise ConfigError(
            "no data is named; fix: set data.shards (a shard set, fast), data.mix (several) or "
            "data.root_dir (sessions)"
        )
    recipe = Recipe() if data.recipe is None else load_recipe(data.recipe)
    return SessionSource(data.root_dir, recipe=recipe, split=split)


def _describe_mismatch(name: str, expected: object, value: object) -> str:
    """Say how this stream differs from the checkpoint's, and how to continue."""
    if name in _WINDOW_KEYS:
        key = _WINDOW_KEYS[name]
        return (
            f"checkpoint was trained on windows with {name} {expected!r}, this run has {value!r}; "
            f"fix: set {key} as then, or start a new run with its weights by --weights"
        )
    if name in {"fingerprint", "sets"}:
        return (
            f"checkpoint was trained on other data ({name} {expected!r}, this run has {value!r}), "
            "whose order this run can't continue; fix: name the data it was trained on, or start "
            "a new run with its weights by --weights"
        )
    return (
        f"checkpoint has {name} {expected!r}, this run has {value!r}; fix: resume with the "
        "checkpoint's value, or start a new run without --resume"
    )


def _unchanged(message: MadeBatch | EngineError) -> MadeBatch | EngineError:
    """Return a message as it is: torch must not collate it."""
    return message
