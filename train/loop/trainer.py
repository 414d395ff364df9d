"""Trainer: a model, a configuration and a loader in; a trained model and its curves out.

The loop is ``Trainer.train``. It knows tensors and steps; batches come from ``BatchFeed`` (the next
one is already on its way), numbers go through ``StepMeter`` and ``RunLog``, files are
``checkpoint``'s. A resumed run equals the uninterrupted one: on the CPU to the bit. Under torchrun
each rank trains on its share of every global batch, and all numbers are those of the whole batch.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from train.config import TrainConfig, as_train_config
from train.data.batch_maker import CorruptSampleBudget
from train.data.pixels import to_model_inputs
from train.loop.checkpoint_manager import CheckpointManager
from train.loop.evaluation import measure
from train.loop.health import QUIET_STEPS
from train.loop.meter import Progress, StepMeter, TrainSummary, gradient_norms
from train.loop.metrics import RunLog, default_run_name
from train.loop.optim import (
    SpikeWatch,
    clip_gradient,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    step_if,
)
from train.loop.prefetch import BatchFeed, one_epoch, position_in
from train.loop.state import TrainState, require_heads, schedule_dict, window_shapes
from train.machine import distributed, runtime
from train.machine.parallel import averaging_gradients, parallelize
from train.model.losses import added, compute_losses, loss_counts
from train.trained_model import check_windows, checkpoint_extras

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

    from train.data.batch import Batch


class Trainer:
    """Trains a model on a loader's batches.

    Args:
        model: takes a batch's inputs, gives each head's output; moved to the device.
        config: a TrainConfig, or the plain dict of ``yaml.safe_load``.
        loader: any iterable of batches (docs/architecture.md); a finite one is repeated. Under
            torchrun: one that gives this rank its share, such as a ``Loader`` with its rank.
        device: "auto", "cpu", "cuda", ...; "auto" defers to ``training.device``.
        val_loader: held-out batches, at most ``training.eval_batches`` of which are measured.
        run_name: folder below ``training.log_dir``; None: that of the run resumed in its own
            ``save_dir``, or the time and the host.
        console: where lines go; None: the terminal.
        checkpoint_extra: more plain values for checkpoints, beside recipe and tokenizer.

    Raises:
        ConfigError: a wrong key or value, a loss of what the model does not predict, a device that
            is not here, or a loader that does not give this rank its share.
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
        training = self.config.training
        for given in filter(None, (loader, val_loader)):
            distributed.check_share(given)
            check_windows(given, self.config)
        self.device = distributed.own_device(
            runtime.choose_device(training.device if device == "auto" else device)
        )
        self._dtype = runtime.choose_dtype(training.precision, self.device)
        runtime.set_up_math(
            num_threads=runtime.choose_num_threads(
                training.num_threads,
                self.device,
                num_workers=self.config.data.num_workers,
                num_ranks=distributed.local_world_size(),
            )
        )
        self.model = model.to(self.device)
        self._parallel = parallelize(self.model, parallel=training.parallel, dtype=self._dtype)
        self._forward = torch.compile(self._parallel) if training.compile else self._parallel
        self._state = TrainState(
            model=self.model,
            optimizer=make_optimizer(self.model, training.optimizer),
            scaler=runtime.make_scaler(
                self.device, self._dtype, num_ranks=distributed.world_size()
            ),
            spikes=SpikeWatch(training.spike_sigma, self.device),
            config=self.config,
            shapes=window_shapes(self.model),
            bad_samples=CorruptSampleBudget(max_fraction=self.config.data.max_bad_fraction),
            extra={**checkpoint_extras(loader), **(checkpoint_extra or {})},
            run_name=run_name,
        )
        self._keeper = CheckpointManager(self._state, training.checkpointing)
        self._loader, self._val_loader = loader, val_loader
        self._console = console
        self._feed: BatchFeed | None = None
        self._resumed: dict[str, Any] | None = None
        self._progress = Progress(meter=StepMeter(self.device))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    def train(self) -> TrainSummary:
        """Train up to ``training.max_steps``, or until Ctrl-C or SIGTERM, which save and return.

        Returns:
            What happened, with the first and last losses.

        Raises:
            DivergedError: losses or gradients stayed non-finite, or far above what they were.
            CheckpointError: no checkpoint can be written, or the last one could not.
            EngineError: the GPU's memory does not suffice, or the loader gave up.
        """
        training, state = self.config.training, self._state
        optimizer, scaler = state.optimizer, state.scaler
        self._keeper.prepare()
        # torchrun may repeat a signal, and ends by itself whoever takes too long.
        stop = runtime.StopSignals(is_patient=distributed.world_size() > 1)
        with stop, self._open_log() as log, runtime.translate_errors():
            feed = self._restore(log)
            while state.step < training.max_steps and not distributed.any_of(stop.requested):
                set_learning_rate(optimizer, learning_rate(state.step, training))
                batches = self._take_batches(feed, log)
                counts = self._counts(batches)
                losses = self._forward_and_backward(batches, counts)
                grad_norm = clip_gradient(optimizer, scaler, max_norm=training.grad_clip)
                is_good = state.spikes.judge(losses["loss_total"], grad_norm)
                step_if(is_good, optimizer, scaler)
                feed.fetch_ahead()
                state.step += 1
                self._measure(losses, counts, grad_norm=grad_norm, is_good=is_good)

                if self._is_due(training.log_interval):
                    self._log(log, feed)
                if self._is_due(training.eval_interval):
                    self._evaluate(log)
                self._keeper.save_if_due(feed.state, self._progress.meter)
            return self._finish(log, feed)

    def evaluate(self) -> dict[str, float]:
        """Losses over the held-out batches: exact means, whatever the batches' valid shares.

        At most ``training.eval_batches`` batches of one epoch are measured, without the bad samples
        in them. The model's mode and all random states are left as they were.

        Returns:
            loss_total and loss_<head>; empty where the val_loader has no batch.

        Raises:
            ConfigError: the trainer has no val_loader.
            TooManyCorruptSamplesError: more are bad than ``data.max_bad_fraction`` allows.
        """
        if self._val_loader is None:
            raise ConfigError("there is nothing to evaluate on; give Trainer a val_loader")
        was_training, num_batches = self.model.training, self.config.training.eval_batches
        self.model.eval()
        with torch.no_grad(), runtime.separate_rng(self.config.training.seed):
            batches = one_epoch(self._val_loader, self.device, max_batches=num_batches)
            self._progress.held_out = measure(batches, self._predict, self._state)
        self.model.train(was_training)
        return dict(self._progress.held_out.losses)

    def save_checkpoint(self, path: Path | str) -> Path:
        """Save everything that going on from here needs; all ranks call it, the main one writes.

        Raises:
            CheckpointError: it could not be written.
        """
        return self._state.save(path, stream=self._feed.state() if self._feed is not None else None)

    def load_checkpoint(self, path: Path | str) -> None:
        """Go on from a checkpoint; the next :meth:`train` continues behind its step.

        Raises:
            CheckpointError: missing, damaged, foreign, of another model or kind of loader.
            ConfigError: it was trained on other data, or in another order.
        """
        check = partial(position_in, self._loader)
        rest = self._state.load(path, device=self.device, check_stream=check)
        self._resumed = {"path": str(path), **rest}
        self._keeper.newest = Path(path)
        self._feed = None

    def load_weights(self, path: Path | str) -> bool:
        """Begin with a checkpoint's weights, and else anew: other data, another schedule.

        Returns:
            Whether its tokens mean what the loader's do, as far as both tell.

        Raises:
            CheckpointError: missing, damaged, foreign, or of another model.
        """
        return self._state.load_weights(path, device=self.device)

    def _open_log(self) -> RunLog:
        """The run's folder; a resumed run goes on in its old one."""
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
        """Bring random states and the stream to where the checkpoint was, or to the beginning."""
        self._progress = Progress(meter=StepMeter(self.device))
        self._keeper.warn = log.warn
        self.model.train()
        seed, rank = self.config.training.seed, distributed.rank()
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            log.say(f"resuming at step {self.step} from {resumed['path']}")
            if (schedule := schedule_dict(self.config.training)) != resumed["schedule"]:
                log.say(
                    f"  the schedule was {resumed['schedule']}, it is now {schedule}",
                    style="yellow",
                )
            self._feed = BatchFeed(self._loader, self.device, seed=seed, state=resumed["stream"])
            if resumed["rng"] is None:  # there were fewer ranks
                runtime.seed_everything(runtime.rank_seed(seed, rank=rank, step=self.step))
            else:
                runtime.set_rng_state(resumed["rng"])
        elif self._feed is None:
            log.write_config(self.config.model_dump(mode="json"))
            runtime.seed_everything(runtime.rank_seed(seed, rank=rank))
            self._feed = BatchFeed(self._loader, self.device, seed=seed)
        return self._feed

    def _take_batches(self, feed: BatchFeed, log: RunLog) -> list[Batch]:
        """One step's micro-batches on the device; bad samples in them are written down."""
        batches = feed.take(self.config.training.accumulation_steps)
        skipped = distributed.gather([one for b in batches for one in b.get("skipped", ())])
        log.write_skipped(self.step, skipped, split="train")
        for batch in batches:
            self._state.samples_of.update(batch.get("samples_of", {}))
        num_read = distributed.world_size() * sum(len(batch["weight"]) for batch in batches)
        self._state.bad_samples.count(num_read, skipped)
        if self._progress.to_first_batch_s is None:
            self._progress.to_first_batch_s = time.perf_counter() - self._progress.began_s
            feed.take_waits_s()  # the start is no wait of a running stream
            self._progress.meter.restart_clock()
        return batches

    def _counts(self, batches: list[Batch]) -> dict[str, Tensor]:
        """What the losses of one step are divided by, over its micro-batches and all ranks; and
        "num_samples".
        """
        config, shapes = self.config, self._state.shapes
        return distributed.add_up(
            added(
                {
                    **loss_counts(batch["targets"], batch["weight"], config=config, shapes=shapes),
                    "num_samples": batch["weight"].sum(),
                }
                for batch in batches
            )
        )

    def _forward_and_backward(
        self, batches: list[Batch], counts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients and losses of one step; micro-batches and ranks weigh as in one large batch."""
        self._state.optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch in batches:
            with averaging_gradients(self._parallel, is_due=batch is batches[-1]):
                outputs = self._predict(batch)
                losses = compute_losses(
                    outputs, batch["targets"], batch["weight"], config=self.config, counts=counts
                )
                total = losses["loss_total"] * distributed.world_size()  # the average is a sum
                self._state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            parts.append({name: loss.detach() for name, loss in losses.items()})
        return distributed.add_up(added(parts))

    def _predict(self, batch: Batch) -> dict[str, Tensor]:
        inputs = to_model_inputs(batch["inputs"], dtype=self._dtype)
        with runtime.autocast(self.device, self._dtype):
            outputs: dict[str, Tensor] = self._forward(inputs)
        return outputs

    def _measure(
        self,
        losses: dict[str, Tensor],
        counts: Mapping[str, Tensor],
        *,
        grad_norm: Tensor,
        is_good: Tensor,
    ) -> None:
        """Add a step to the meter; on the CPU, where looking is free, stop a diverged run."""
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
            meter.check_divergence(self.step, newest=self._keeper.newest)

    def _is_due(self, interval: int) -> bool:
        """Whether what is done every `interval` steps, and at the end, is to be done now."""
        return self.step % interval == 0 or self.step == self.config.training.max_steps

    def _log(self, log: RunLog, feed: BatchFeed) -> None:
        progress = self._progress
        runtime.synchronize(self.device)
        waits_s = distributed.largest(feed.take_waits_s())  # a step waits for its slowest rank
        (memory_mb,) = distributed.largest([runtime.memory_allocated_mb(self.device)])
        metrics = {
            **progress.meter.take(waits_s),
            **gradient_norms(self.model),
            "memory_allocated_mb": memory_mb,
            "lr": float(self._state.optimizer.param_groups[0]["lr"]),
            "skipped_samples": float(self._state.bad_samples.num_bad),
            **{f"samples_of/{name}": float(n) for name, n in self._state.samples_of.items()},
        }
        progress.skipped_steps += int(metrics["skipped_steps"])
        if not progress.metrics:
            metrics["time_to_first_batch_s"] = progress.to_first_batch_s or 0.0
        progress.metrics = metrics
        log.write_metrics(self.step, metrics)
        progress.meter.check_divergence(self.step, newest=self._keeper.newest)

    def _evaluate(self, log: RunLog) -> None:
        """Measure on held-out batches, where there are any."""
        if self._val_loader is None:
            return
        progress = self._progress
        with progress.meter.pause():
            losses = self.evaluate()
            progress.first_val = progress.first_val or losses
            skipped = progress.held_out.skipped
            log.write_skipped(self.step, skipped, split="val")
            log.write_validation(self.step, {**losses, "skipped_samples": len(skipped)})
            log.write_window(self.step, progress.held_out.window, self._state.extra)

    def _finish(self, log: RunLog, feed: BatchFeed) -> TrainSummary:
        """Log and save what is not yet, and say what happened."""
        progress = self._progress
        is_complete = self.step >= self.config.training.max_steps
        if progress.meter.has_steps:
            self._log(log, feed)
        if is_complete:
            feed.close()
        is_pruned = not progress.meter.is_in_bad_steps()
        self._keeper.save_last(feed.state(), is_complete=is_complete, is_pruned=is_pruned)
        progress.checkpoint = self._keeper.newest
        if not is_complete:
            log.say(
                f"stopped at step {self.step}; go on with the same command and `--resume auto`, "
                f"or with trainer.load_checkpoint({str(progress.checkpoint)!r})"
            )
        return progress.summary(
            steps=self.step,
            is_complete=is_complete,
            skipped_samples=self._state.bad_samples.num_bad,
            log_dir=log.folder,
        )
