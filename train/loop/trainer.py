"""Trainer: train a model on a loader's batches.

The loop is ``Trainer.train``. It knows tensors and steps. Batches come from ``BatchFeed``, which
prefetches the next step's; metrics go through ``StepMeter`` and ``RunLog``; files are written by
``CheckpointManager``. A resumed run equals the uninterrupted one, on the CPU bit for bit. Under
torchrun each rank trains on its share of every global batch, and all metrics are those of the
global batch.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from shared.errors import ConfigError
from train.checkpoints import save_checkpoint
from train.config import TrainConfig, as_train_config
from train.data.pixels import to_model_inputs
from train.loop.checkpoint_manager import CheckpointManager
from train.loop.evaluation import HeldOut, evaluate, iter_one_epoch, members_read
from train.loop.health import QUIET_STEPS
from train.loop.meter import Progress, StepMeter, TrainSummary, gradient_norms
from train.loop.optim import clip_gradient, learning_rate, set_learning_rate, step_if
from train.loop.prefetch import BatchFeed, resume_index
from train.loop.run_lock import hold_folder
from train.loop.run_log import RunLog, default_run_name
from train.loop.state import TrainState, require_heads, schedule_dict
from train.machine import distributed, runtime
from train.machine.parallel import average_gradients, parallelize
from train.model.losses import compute_losses, loss_counts, sum_by_name
from train.statistics import heads_without_target, standardize
from train.trained_model import check_windows, checkpoint_extras

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from train.data.batch import Batch


class Trainer:
    """Trains a model on a loader's batches.

    Args:
        model: maps a batch's inputs to the output of each head; moved to the device.
        config: a TrainConfig, or the plain dict that ``yaml.safe_load`` returns.
        loader: any iterable of batches (docs/batch.md); a finite one is repeated. Under
            torchrun it must yield this rank's share, as a ``Loader`` with its rank does.
        device: "auto", "cpu", "cuda", ...; "auto" uses ``training.device``.
        val_loader: held-out batches; at most ``training.eval_batches`` of them are measured.
        run_name: folder name below ``training.log_dir``. None: the name of the run that is resumed
            from its own ``save_dir``, else the time and the host name.
        console: where terminal output goes; None: to the terminal.
        checkpoint_extra: more plain values for checkpoints, besides recipe and tokenizer.

    Raises:
        ConfigError: a wrong key or value, a loss of a head that the model does not have, a device
            that this machine does not have, or a loader that does not yield this rank's share.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig | Mapping[str, Any],
        loader: Iterable[Batch],
        device: str = "auto",
        *,
        val_loader: Iterable[Batch] | None = None,
        run_name: str | None = None,
        console: Console | None = None,
        checkpoint_extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = as_train_config(config)
        require_heads(model, self.config)
        for each in filter(None, (loader, val_loader)):
            distributed.check_share(each)
            check_windows(each, self.config)
        training = self.config.training
        self.device = distributed.own_device(
            runtime.choose_device(training.device if device == "auto" else device)
        )
        self._dtype = runtime.choose_dtype(training.precision, self.device)
        num_threads = runtime.choose_num_threads(
            training.num_threads,
            self.device,
            num_workers=self.config.data.num_workers,
            num_ranks=distributed.local_world_size(),
        )
        runtime.set_up_math(num_threads=num_threads)
        self.model = model.to(self.device)
        self._parallel = parallelize(self.model, parallel=training.parallel, dtype=self._dtype)
        self._forward = torch.compile(self._parallel) if training.compile else self._parallel
        self._state = TrainState.initial(
            self.model, self.config, device=self.device, dtype=self._dtype
        )
        untrained = {"untrained_heads": heads_without_target(loader)}
        self._state.extra = {**checkpoint_extras(loader), **untrained, **(checkpoint_extra or {})}
        self._state.run_name = run_name
        self._is_standardized = getattr(model, "has_statistics", False)
        self._checkpoints = CheckpointManager(
            training.checkpointing, save_interval=training.save_interval
        )
        self._loader, self._val_loader = loader, val_loader
        self._console = console
        self._feed: BatchFeed | None = None
        self._resumed: dict[str, Any] | None = None
        self._progress = Progress(meter=StepMeter(self.device))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    def standardize(self) -> None:
        """Give the model the statistics of the loader's sensors, once when a new run begins.

        :meth:`train` and :meth:`evaluate` call it. A model that has statistics keeps them, such as
        those of a checkpoint.
        """
        is_done, self._is_standardized = self._is_standardized, True
        if not is_done:
            standardize(self.model, self._loader)

    def train(self) -> TrainSummary:
        """Train up to ``training.max_steps``, or until a signal, after which it saves and returns.

        The signals are Ctrl-C, SIGTERM and, unless it is ignored, SIGHUP.

        Raises:
            DivergedError: losses or gradients were non-finite, or far above the steps before, for
                many steps in a row.
            CheckpointError: another run writes into the folder of checkpoints, it is not writable,
                or the last checkpoint was not written.
            EngineError: memory ran out, or the loader failed.
        """
        training, state = self.config.training, self._state
        optimizer, scaler = state.optimizer, state.scaler
        # torchrun may repeat a signal, and kills a rank that takes too long by itself.
        stop = runtime.StopSignals(ignores_repeats=distributed.world_size() > 1)
        holding = hold_folder(training.checkpointing.save_dir, log=self._print)
        with stop, holding, self._open_log() as log, runtime.translate_errors():
            self.standardize()
            feed = self._restore(log)
            while state.step < training.max_steps and not distributed.any_rank(stop.number > 0):
                set_learning_rate(optimizer, learning_rate(state.step, training))
                batches = self._take_batches(feed, log)
                counts = self._counts(batches)
                losses = self._forward_and_backward(batches, counts)
                grad_norm = clip_gradient(optimizer, scaler, max_norm=training.grad_clip)
                is_good = state.spikes.judge(losses["loss_total"], grad_norm)
                step_if(is_good, optimizer, scaler)
                feed.fetch_ahead()
                state.step += 1
                self._update_meter(losses, counts, grad_norm=grad_norm, is_good=is_good)

                if self._is_due(training.log_interval):
                    self._log(log, feed)
                if self._is_due(training.eval_interval):
                    self._evaluate(log)
                if self._checkpoints.is_due(state.step):
                    self._save(feed)
            (number,) = distributed.max_over_ranks([stop.number])
            return self._finish(log, feed, signal_number=int(number))

    def evaluate(self) -> dict[str, float]:
        """Return the exact mean losses over the held-out batches.

        At most ``training.eval_batches`` batches of one epoch are measured; corrupt samples do not
        count. The model's mode and all random states are restored.

        Returns:
            loss_total and loss_<head>; empty if the val_loader has no batch.

        Raises:
            ConfigError: the trainer has no val_loader.
            TooManyCorruptSamplesError: more samples are corrupt than ``data.max_bad_fraction``
                allows.
        """
        return dict(self._measure_held_out().losses)

    def save_checkpoint(self, path: Path | str) -> Path:
        """Save everything that resuming needs; all ranks call it, and the main one writes."""
        state = self._state.as_dict(self._feed.state() if self._feed is not None else None)
        return distributed.on_main(lambda: save_checkpoint(path, state))

    def load_checkpoint(self, path: Path | str) -> None:
        """Resume from a checkpoint; the next :meth:`train` continues after its step.

        Raises:
            CheckpointError: the file is missing, damaged, foreign, or of another model or kind of
                loader.
            ConfigError: the run was trained on other data, or in another order.
        """
        check = partial(resume_index, self._loader, origin=path)
        resumed = self._state.load(path, device=self.device, check_stream=check)
        self._resumed = {"path": str(path), **resumed}
        self._is_standardized = True
        self._checkpoints.newest = Path(path)
        self._feed = None

    def load_weights(self, path: Path | str) -> bool:
        """Load a checkpoint's weights and nothing else, for other data or another schedule.

        Returns:
            False if both the checkpoint and the loader have a tokenizer and these differ.

        Raises:
            CheckpointError: the file is missing, damaged, foreign, or of another model.
        """
        has_same_tokens = self._state.load_weights(path, device=self.device)
        self._is_standardized = True
        return has_same_tokens

    def _print(self, message: str) -> None:
        (self._console or Console(soft_wrap=True)).print(message, markup=False, highlight=False)

    def _open_log(self) -> RunLog:
        """Open the run's log folder; a resumed run continues in its old one."""
        training = self.config.training
        name = self._state.run_name or default_run_name()
        self._state.run_name = distributed.on_main(lambda: name)
        return RunLog(
            training.log_dir / self._state.run_name,
            first_step=self.step,
            max_steps=training.max_steps,
            quiet_steps=max(QUIET_STEPS, training.optimizer.warmup_steps),
            console=self._console,
            is_silent=not distributed.is_main(),
        )

    def _restore(self, log: RunLog) -> BatchFeed:
        """Set random states and the stream to the checkpoint's position, or to the beginning."""
        self._progress = Progress(meter=StepMeter(self.device))
        self._checkpoints.warn = log.warn
        self.model.train()
        seed, rank = self.config.training.seed, distributed.rank()
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            log.print(f"resuming at step {self.step} from {resumed['path']}")
            if (schedule := schedule_dict(self.config.training)) != resumed["schedule"]:
                log.print(
                    f"  the schedule was {resumed['schedule']} and is now {schedule}",
                    style="yellow",
                )
            self._feed = BatchFeed(self._loader, self.device, seed=seed, state=resumed["stream"])
            if resumed["rng"] is None:  # the saved run had fewer ranks
                runtime.seed_everything(runtime.rank_seed(seed, rank=rank, step=self.step))
            else:
                runtime.set_rng_state(resumed["rng"])
        elif self._feed is None:
            log.write_config(
                self.config.model_dump(mode="json"), heads=list(self._state.objective.weights)
            )
            runtime.seed_everything(runtime.rank_seed(seed, rank=rank))
            self._feed = BatchFeed(self._loader, self.device, seed=seed)
        return self._feed

    def _take_batches(self, feed: BatchFeed, log: RunLog) -> list[Batch]:
        """Take one step's micro-batches on the device, and log the corrupt samples in them."""
        batches = feed.take(self.config.training.accumulation_steps)
        skipped = self._state.count_members([members_read(batch) for batch in batches])
        log.write_skipped(self.step, skipped, split="train")
        for batch in batches:
            self._state.samples_of.update(batch.get("samples_of", {}))
        self._state.corrupt_samples.check()
        if self._progress.time_to_first_batch_s is None:
            self._progress.time_to_first_batch_s = time.perf_counter() - self._progress.began_s
            feed.take_waits_s()  # waiting for the loader to start does not count
            self._progress.meter.restart_clock()
        return batches

    def _counts(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Count what the losses of one step are divided by, over its micro-batches and all ranks.

        "num_samples" is among the counts.
        """
        objective = self._state.objective
        return distributed.sum_over_ranks(
            sum_by_name(
                {
                    **loss_counts(batch["targets"], batch["weight"], objective=objective),
                    "num_samples": batch["weight"].sum(),
                }
                for batch in batches
            )
        )

    def _forward_and_backward(
        self, batches: list[Batch], counts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute gradients and losses of one step, weighted as in one large batch."""
        self._state.optimizer.zero_grad(set_to_none=True)
        objective = self._state.objective
        losses_per_batch = []
        for batch in batches:
            with average_gradients(self._parallel, is_due=batch is batches[-1]):
                outputs = self._predict(batch)
                losses = compute_losses(
                    outputs, batch["targets"], batch["weight"], objective=objective, counts=counts
                )
                total = (
                    losses["loss_total"] * distributed.world_size()
                )  # undoes the averaging of gradients over ranks
                self._state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            losses_per_batch.append({name: loss.detach() for name, loss in losses.items()})
        return distributed.sum_over_ranks(sum_by_name(losses_per_batch))

    def _predict(self, batch: Batch) -> dict[str, Tensor]:
        inputs = to_model_inputs(batch["inputs"], dtype=self._dtype)
        with runtime.autocast(self.device, self._dtype):
            outputs: dict[str, Tensor] = self._forward(inputs)
        return outputs

    def _update_meter(
        self,
        losses: dict[str, Tensor],
        counts: Mapping[str, Tensor],
        *,
        grad_norm: Tensor,
        is_good: Tensor,
    ) -> None:
        """Add a step to the meter; on the CPU, where it costs no wait, stop a diverged run."""
        meter = self._progress.meter
        overflow = self._state.spikes.is_loss_good & ~torch.isfinite(grad_norm)
        meter.add(
            losses,
            grad_norm=grad_norm,
            is_good=is_good,
            num_samples=counts["num_samples"],
            is_overflow=overflow if self._state.scaler.is_enabled() else None,
        )
        if self.device.type == "cpu":
            meter.check_divergence(self.step, newest=self._checkpoints.newest)

    def _is_due(self, interval: int) -> bool:
        """Return whether this step is a multiple of `interval` or the last one."""
        return self.step % interval == 0 or self.step == self.config.training.max_steps

    def _log(self, log: RunLog, feed: BatchFeed) -> None:
        """Log the metrics since the last log; stop a diverged run."""
        progress = self._progress
        runtime.synchronize(self.device)
        # A step waits for its slowest rank.
        waits_s = distributed.max_over_ranks(feed.take_waits_s())
        (memory_mb,) = distributed.max_over_ranks([runtime.memory_allocated_mb(self.device)])
        metrics = {
            **progress.meter.take(waits_s),
            **gradient_norms(self.model),
            "memory_allocated_mb": memory_mb,
            "lr": float(self._state.optimizer.param_groups[0]["lr"]),
            "skipped_samples": float(self._state.corrupt_samples.num_corrupt),
            **{f"samples_of/{name}": float(n) for name, n in self._state.samples_of.items()},
        }
        progress.skipped_steps += int(metrics["skipped_steps"])
        if not progress.metrics:
            metrics["time_to_first_batch_s"] = progress.time_to_first_batch_s or 0.0
        progress.metrics = metrics
        log.write_metrics(self.step, metrics)
        progress.meter.check_divergence(self.step, newest=self._checkpoints.newest)

    def _evaluate(self, log: RunLog) -> None:
        """Measure on held-out batches and log the result, if there is a val_loader."""
        if self._val_loader is None:
            return
        progress = self._progress
        with progress.meter.pause():
            held_out = progress.held_out = self._measure_held_out()
            progress.first_val_losses = progress.first_val_losses or held_out.losses
            log.write_skipped(self.step, held_out.skipped, split="val")
            metrics = {**held_out.losses, "skipped_samples": len(held_out.skipped)}
            log.write_validation(self.step, metrics)
            log.write_window(self.step, held_out.window, self._state.extra)

    def _measure_held_out(self) -> HeldOut:
        if self._val_loader is None:
            raise ConfigError("the trainer has no held-out batches; fix: give Trainer a val_loader")
        self.standardize()
        was_training, num_batches = self.model.training, self.config.training.eval_batches
        self.model.eval()
        with torch.no_grad(), runtime.separate_rng(self.config.training.seed):
            batches = iter_one_epoch(self._val_loader, self.device, max_batches=num_batches)
            held_out = evaluate(batches, self._predict, self._state)
        self.model.train(was_training)
        return held_out

    def _save(self, feed: BatchFeed) -> None:
        """Save the checkpoint that is due, unless the newest step was skipped.

        Then it stays due until the next good step: whatever ruined the weights may have happened
        just before the skipped steps, and saving would prune the checkpoints from before.
        """
        meter = self._progress.meter
        if meter.is_in_bad_steps():
            return
        with meter.pause():
            self._checkpoints.save_or_warn(self._state.as_dict(feed.state()))

    def _finish(self, log: RunLog, feed: BatchFeed, *, signal_number: int) -> TrainSummary:
        """Log the last steps, save the last checkpoint, and return the summary."""
        progress = self._progress
        is_complete = self.step >= self.config.training.max_steps
        if progress.meter.has_steps:
            self._log(log, feed)
        if is_complete:
            feed.close()
        self._checkpoints.save_last(
            self._state.as_dict(feed.state()),
            is_complete=is_complete,
            is_pruned=not progress.meter.is_in_bad_steps(),
        )
        checkpoint = self._checkpoints.newest
        if not is_complete:
            log.print(
                f"stopped at step {self.step}; resume with the same command and `--resume auto`, "
                f"or with trainer.load_checkpoint({str(checkpoint)!r})"
            )
        return progress.summary(
            steps=self.step,
            signal_number=None if is_complete else signal_number,
            skipped_samples=self._state.corrupt_samples.num_corrupt,
            checkpoint=checkpoint,
            log_dir=log.folder,
        )
