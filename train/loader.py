"""The stream of batches: positions -> samples -> read and decode -> collate -> pin, in order.

::

    BatchOrder.plan(i)      which samples: arithmetic
      -> worker i % W       webdataset's DataPipeline in WebLoader's processes
           ReadBatches      pread, checksum, decode into the batch's arrays; substitute corrupt ones
      -> Loader             batches in order; stops when too many samples are corrupt

Worker w makes batches w, w + W, ...; WebLoader takes them from the workers in turn. So the batches
are the same for any number of workers, and the state is one number.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from shared.errors import ConfigError, CorruptError, CreatureError, TooManyBadSamplesError
from shared.recipe import Recipe, Split, WindowShapes, load_recipe
from train.assemble import Place, array_forms, compose_batch, fill_arrays
from train.dataset import SessionSource
from train.order import BatchOrder, BatchPlan, SampleOrder
from train.reader import ShardSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from shared.fields import Text
    from train.config import TrainConfig
    from train.source import SampleSource

MAX_SUBSTITUTES = 16
"""So many corrupt samples after each other for one place stop the run."""

_MIN_SAMPLES_JUDGED = 200
"""The share of corrupt samples is judged after so many samples."""

_SILENT_TIMEOUT_S = 600

_ORDER_KEYS = ("batch_size", "last_batch", "shuffle_block_shards")
"""Keys of ``data`` that decide which samples batch number i holds."""


class BatchPlans(IterableDataset[BatchPlan]):
    """Source stage: the plans of this worker's batches, from `start` to `stop` (None: for ever)."""

    def __init__(self, order: BatchOrder, *, start: int, stop: int | None) -> None:
        self._order = order
        self._start = start
        self._stop = stop

    def __iter__(self) -> Iterator[BatchPlan]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index = self._start + first
        while self._stop is None or index < self._stop:
            yield self._order.plan(index)
            index += step


class ReadBatches:
    """Stage: turns plans into batches."""

    def __init__(
        self,
        source: SampleSource,
        order: SampleOrder,
        *,
        config: TrainConfig,
        shapes: WindowShapes,
    ) -> None:
        self._source = source
        self._order = order
        self._config = config
        self._shapes = shapes

    def __call__(self, plans: Iterable[BatchPlan]) -> Iterator[dict[str, Any]]:
        """Read, decode and collate each plan."""
        for plan in plans:
            try:
                yield self._batch(plan)
            except CreatureError as error:  # torch would wrap it in a worker's traceback
                yield {"error": error}
                return

    def _batch(self, plan: BatchPlan) -> dict[str, Any]:
        skipped: list[dict[str, Any]] = []
        places = [(int(s), int(r)) for s, r in zip(plan.shards, plan.rows, strict=True)]

        def read(i: int, out: dict[str, NDArray[Any]]) -> tuple[Place, Text | None]:
            return self._read(plan, i, places[i], out, skipped)

        forms = array_forms(len(places), config=self._config, shapes=self._shapes)
        arrays: dict[str, NDArray[Any]] = {name: np.empty(*form) for name, form in forms.items()}
        arrays["weight"][...] = plan.weight
        dense, keys = fill_arrays(
            self._source, places, arrays, config=self._config, shapes=self._shapes, read=read
        )
        batch = {**compose_batch(arrays | dense, self._config), "keys": keys}
        return batch | {"index": plan.index, "epoch": plan.epoch, "skipped": skipped}

    def _read(
        self,
        plan: BatchPlan,
        i: int,
        place: Place,
        out: dict[str, NDArray[Any]],
        skipped: list[dict[str, Any]],
    ) -> tuple[Place, Text | None]:
        """Read one sample; while it is corrupt, the one that stands in for it."""
        streams = (*self._config.input_streams, *self._config.target_streams)
        with_text = any(s.endswith("_text") for s in streams)
        wanted = place
        for attempt in range(MAX_SUBSTITUTES):
            try:
                return place, self._source.read_into(*place, out, with_text=with_text)
            except CorruptError as error:
                skipped.append(self._describe(place, error))
                position = int(plan.positions[i])
                stand_in = self._order.substitute(plan.epoch, position, attempt)
                place = self._order.locate_one(plan.epoch, stand_in)
        raise TooManyBadSamplesError(
            f"sample {wanted} and {MAX_SUBSTITUTES - 1} others in its place are corrupt; "
            f"the last: {skipped[-1]['error']}; run `python -m preprocess verify`"
        )

    def _describe(self, place: Place, error: CorruptError) -> dict[str, Any]:
        """A corrupt sample for the log; its key where the index can still be read."""
        try:
            key = self._source.key(*place)
        except CorruptError:
            key = "?"
        return {"key": key, "shard": place[0], "row": place[1], "error": str(error)}


class Loader:
    """Batches of a source, in the order of the seed, from any position on.

    Iterating gives ``docs/architecture.md``'s batches with "index", "epoch" and "skipped". The
    train loader goes on for ever; one with `num_epochs` ends. Every iteration begins anew where the
    loader was told to: at its beginning, or at the loaded state.

    Args:
        source: the samples.
        config: streams, batch size, workers, seed.
        is_shuffled: False gives the stored order.
        num_epochs: how many passes, each complete whatever ``data.last_batch`` says; None never
            ends.

    Raises:
        ConfigError: no batch can be made, or the tick rate does not fit.
    """

    def __init__(
        self,
        source: SampleSource,
        config: TrainConfig,
        *,
        is_shuffled: bool = True,
        num_epochs: int | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.shapes = WindowShapes.from_recipe(
            source.recipe, tick_rate_hz=config.model.tick_rate_hz
        )
        self._samples = SampleOrder(
            source.shard_sizes,
            fingerprint=source.fingerprint,
            seed=config.training.seed,
            block_shards=config.data.shuffle_block_shards,
            is_shuffled=is_shuffled,
        )
        try:
            self.order = BatchOrder(
                self._samples,
                batch_size=config.data.batch_size,
                last_batch=config.data.last_batch if num_epochs is None else "pad",
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._num_epochs = num_epochs
        self._start = 0
        self._has_begun = False

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return self.order.batches_per_epoch

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """All that is needed to go on at global batch `next_batch`: plain ints and strings."""
        return {
            "fingerprint": self.source.fingerprint,
            "seed": self.config.training.seed,
            **{name: getattr(self.config.data, name) for name in _ORDER_KEYS},
            "next_batch": next_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin where another loader stopped; before the first batch is taken.

        Raises:
            ConfigError: iteration has begun, or the state is of other data or of another order.
        """
        if self._has_begun:
            raise ConfigError("the loader has begun to read; load its state before the first batch")
        own = self.state_at(int(state["next_batch"]))
        for name in ("fingerprint", "seed", *_ORDER_KEYS):
            if state.get(name) != own[name]:
                raise ConfigError(
                    f"the checkpoint's stream has {name} {state.get(name)!r}, this one "
                    f"{own[name]!r}; resume with the same data, seed and {', '.join(_ORDER_KEYS)}, "
                    "or start anew without --resume"
                )
        self._start = own["next_batch"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._has_begun = True
        num_read, num_bad = 0, 0
        for batch in self._batches():
            if "error" in batch:
                raise batch["error"]
            num_read += len(batch["keys"])
            num_bad += len(batch["skipped"])
            limit = self.config.data.max_bad_fraction
            if num_bad > limit * max(num_read, _MIN_SAMPLES_JUDGED):
                last = batch["skipped"][-1]["error"] if batch["skipped"] else "see above"
                raise TooManyBadSamplesError(
                    f"{num_bad} of {num_read} samples are corrupt, data.max_bad_fraction allows "
                    f"{limit:g}; run `python -m preprocess verify`; the last: {last}"
                )
            yield batch

    def _batches(self) -> Iterable[dict[str, Any]]:
        data = self.config.data
        stop = None if self._num_epochs is None else self._num_epochs * self.batches_per_epoch
        pipeline = wds.DataPipeline(
            BatchPlans(self.order, start=self._start, stop=stop),
            ReadBatches(self.source, self._samples, config=self.config, shapes=self.shapes),
        )
        loader: Iterable[dict[str, Any]] = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            timeout=_SILENT_TIMEOUT_S if data.num_workers else 0,
            worker_init_fn=_leave_stopping_to_the_trainer,
        )
        return loader


def _leave_stopping_to_the_trainer(_worker: int) -> None:
    """Ignore what a terminal or a scheduler sends to the whole process group.

    The trainer still needs its batch to finish the step and save; then it dismisses the workers, at
    the latest by a SIGTERM of its own. They notice by themselves when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_when_the_trainer_says_so, daemon=True).start()


def _end_when_the_trainer_says_so() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def open_source(config: TrainConfig, *, split: Split) -> SampleSource:
    """The source that a configuration names.

    Raises:
        ConfigError: it names none.
        ShardError: the shard set can't be read.
        SessionError: no session can be used.
    """
    data = config.data
    if data.shards is not None:
        return ShardSource(data.shards, split=split)
    if data.root_dir is None:
        raise ConfigError(
            "no data is named; set data.shards (a shard set, fast) or data.root_dir (sessions)"
        )
    recipe = Recipe() if data.recipe is None else load_recipe(data.recipe)
    return SessionSource(data.root_dir, recipe=recipe, split=split)
