"""``train run``: puts source, loader, model and trainer together, and says at the end what came of
it.
"""

from __future__ import annotations

import itertools
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from rich.console import Console

from shared.errors import ConfigError, SessionError
from shared.recipe import TEXT_STREAMS
from train.checkpoints import list_checkpoints, load_checkpoint
from train.data.loader import Loader, open_source
from train.data.pixels import to_model_inputs
from train.data.session_source import SessionSource
from train.loop.checkpoint_manager import check_writable, find_latest_checkpoint, refuse_checkpoints
from train.loop.trainer import Trainer
from train.machine import distributed
from train.machine.runtime import choose_device, choose_dtype, translate_errors
from train.model.baselines import Baselines, compare
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature
from train.summary import print_summary, remarks

if TYPE_CHECKING:
    from train.config import DataConfig, TrainConfig
    from train.data.batch import SampleSource
    from train.loop.meter import TrainSummary

MAX_LEFT_OUT_LINES = 20
"""Sessions and windows named one by one that are in no batch."""

BASELINE_BATCHES = 200
"""At most so many batches of the train split fit the baselines."""

_DEMO_SET: Final = "shards/demo"
"""What `make demo` makes, with sessions and a recipe of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything of a run before its first step."""

    loader: Loader
    val_loader: Loader | None
    model: MultiModalCreature
    left_out: tuple[str, ...]
    """What of sessions read directly is in no batch, and why; shards have rejected.jsonl."""
    not_held_out: str | None
    """Why there are no held-out batches, where there are none."""


def run_training(
    config: TrainConfig, *, origin: Path, resume: str | None = None, weights: Path | None = None
) -> TrainSummary | None:
    """Train, evaluate on held-out sessions and print a summary.

    Args:
        config: the whole configuration.
        origin: its file, for messages.
        resume: "auto" takes the newest checkpoint of ``checkpointing.save_dir`` if there is one;
            else a checkpoint file.
        weights: checkpoint whose weights a run that is not resumed begins with.

    Returns:
        What happened; None where the checkpoint is at ``training.max_steps`` already.

    Raises:
        EngineError: the configuration, the data or a checkpoint can't be used.
    """
    require_paths(config, origin=origin)
    device = choose_device(config.training.device)
    with distributed.process_group(device), translate_errors():
        return _run(config, origin=origin, resume=resume, weights=weights)


def _run(
    config: TrainConfig, *, origin: Path, resume: str | None, weights: Path | None
) -> TrainSummary | None:
    """:func:`run_training` among the ranks that there are; only the main one says anything."""
    console = Console(quiet=not distributed.is_main(), markup=False)
    parts = open_parts(config)
    _tell_left_out(console, parts)
    _tell_remarks(console, parts, config)
    baselines = distributed.on_main(lambda: fit_baselines(config, parts.loader.source))
    for head, counts in baselines.counts.items():
        if not counts.sum():
            console.print(
                f"no train sample has a target for {head}: its loss stays 0 and says nothing; "
                f"set training.loss_weights.{head}: 0 to leave the head out",
                soft_wrap=True,
            )
    trainer = Trainer(
        parts.model,
        config,
        parts.loader,
        val_loader=parts.val_loader,
        console=console,
        checkpoint_extra={"baselines": baselines.as_dict()},
    )
    if not _resume(trainer, config, resume, console):
        return None
    if weights is not None and trainer.step == 0:
        means_the_same = trainer.load_weights(weights)
        console.print(f"beginning with the weights of {weights}", soft_wrap=True)
        if not means_the_same:
            console.print(
                "its tokenizer is another one, so that tokens mean other words; build the shards "
                "with text.tokenizer: the tokenizer.json of its shard set",
                style="yellow",
                soft_wrap=True,
            )
    before = trainer.evaluate() if parts.val_loader is not None else {}
    summary = trainer.train()
    if not distributed.is_main():
        return summary
    rows = compare(summary.last_val_losses, baseline_losses(baselines, parts.val_loader, config))
    session = (parts.val_loader or parts.loader).source.key(0, 0).rpartition("/")[0]
    print_summary(console, config, summary, before, rows, origin=origin, session=session)
    return summary


def check_config(
    config: TrainConfig, *, origin: Path, resume: str | None = None, weights: Path | None = None
) -> None:
    """Validate a configuration: the machine, sizes and, where data is there, one batch, one forward
    and one backward. Nothing is left behind.

    Args:
        config: the whole configuration.
        origin: its file, for messages.
        resume: a checkpoint file that is to be gone on from; "auto" finds what it can use.
        weights: a checkpoint whose weights are to be begun with.

    Raises:
        EngineError: something can't be used.
    """
    console = Console(soft_wrap=True, markup=False)
    choose_dtype(config.training.precision, choose_device(config.training.device))
    check_writable(config.training.checkpointing.save_dir)
    checkpoint = None if resume in {None, "auto"} else load_checkpoint(resume, map_location="meta")
    console.print(f"{origin}: keys and values are good")
    save_dir = config.training.checkpointing.save_dir
    if not _goes_on_in(save_dir, resume) and list_checkpoints(save_dir):
        console.print(f"  {save_dir} has checkpoints: a run needs --resume auto, or another folder")
    streams = ", ".join(config.input_streams)
    console.print(f"  sees {streams}; predicts {', '.join(config.heads)}")
    places = list(config.data.sets.values()) or list(filter(None, [config.data.root_dir]))
    missing = [place for place in places if not _is_there(place)]
    if missing or not places:
        model = MultiModalCreature(config)
        why = f"{missing[0]} is not there yet" if missing else "no data is named"
        console.print(f"  model: {_count(model):,} parameters; {why}, so none is read")
        if weights is not None or checkpoint is not None:
            console.print("  whether the checkpoint fits is seen when the data is there")
        return
    parts = open_parts(config)
    _tell_left_out(console, parts)
    _tell_remarks(console, parts, config)
    loader, model = parts.loader, parts.model
    console.print(
        f"  data: {int(loader.source.shard_sizes.sum())} train samples, "
        f"{loader.batches_per_epoch} batches of {config.data.batch_size} per epoch"
    )
    console.print(f"  model: {_count(model):,} parameters")
    batch = next(iter(loader))
    for name, tensor in batch["inputs"].items():
        console.print(
            f"  {name:>20} {str(tensor.dtype).removeprefix('torch.'):8} {list(tensor.shape)}"
        )
    outputs = model(to_model_inputs(batch["inputs"]))
    losses = compute_losses(outputs, batch["targets"], batch["weight"], config=config)
    losses["loss_total"].backward()  # type: ignore[no-untyped-call]
    line = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
    console.print(f"  one forward and backward: {line}; nothing was trained")
    if weights is not None:
        Trainer(model, config, loader).load_weights(weights)
        console.print(f"  {weights}: its weights can be begun with")
    if resume is not None and checkpoint is not None:
        Trainer(model, config, Loader(loader.source, config)).load_checkpoint(resume)
        console.print(f"  {resume}: can be gone on from, at step {checkpoint['step']}")


def require_paths(config: TrainConfig, *, origin: Path) -> None:
    """Refuse a configuration that names data which is not there.

    Raises:
        ConfigError: it names the key, the path and how to make it.
    """
    data = config.data
    named: dict[str, tuple[Path | str | None, str]] = {
        key: (place, f"make it by `{_building(data, place)}`") for key, place in data.sets.items()
    }
    if not named:
        named["root_dir"] = (data.root_dir, "set it to the folder where the session folders lie")
        named["recipe"] = (data.recipe, "leave the key out for the default recipe")
    for key, (path, mend) in named.items():
        if path is not None and not _is_there(path):
            raise ConfigError(f"{origin}: key 'data.{key}' is {path}: not there; {mend}")


def _building(data: DataConfig, place: Path | str) -> str:
    """The command that makes a shard set."""
    if str(place) == _DEMO_SET:
        return "make demo"
    options = {"--out": place, "--sessions": data.root_dir, "--recipe": data.recipe}
    given = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join(["python", "-m", "preprocess", "shards", *given])


def _is_there(place: Path | str) -> bool:
    """Whether a folder or file exists; URLs are asked when they are opened, which says more."""
    return isinstance(place, str) or place.exists()


def open_parts(config: TrainConfig) -> Parts:
    """Open the data and make the model that fits it.

    Raises:
        EngineError: the data can't be read, or does not fit the configuration.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    source = open_source(config, split="train")
    loader = Loader(source, config, rank=rank, world_size=world_size)
    torch.manual_seed(config.training.seed)
    model = MultiModalCreature(config, loader.shapes)
    val_loader, not_held_out = _open_val(config)
    sources = [each.source for each in (loader, val_loader) if each is not None]
    left_out = [line for source in sources for line in describe_left_out(source)]
    return Parts(
        loader=loader,
        val_loader=val_loader,
        model=model,
        left_out=tuple(left_out),
        not_held_out=not_held_out,
    )


def fit_baselines(config: TrainConfig, source: SampleSource) -> Baselines:
    """What trivial predictors know of the train split, which `source` has."""
    loader = Loader(source, _targets_only(config))
    batches = itertools.islice(loader, min(BASELINE_BATCHES, loader.batches_per_epoch))
    return Baselines.fit(batches, config=config, shapes=loader.shapes)


def baseline_losses(
    baselines: Baselines, val_loader: Loader | None, config: TrainConfig
) -> dict[str, float]:
    """Losses of the trivial predictors on the samples that the model is evaluated on, by baseline
    name; of these only the targets are read.
    """
    if val_loader is None:
        return {}
    loader = held_out(val_loader.source, _targets_only(config))
    losses = baselines.mean_losses(itertools.islice(loader, config.training.eval_batches))
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _targets_only(config: TrainConfig) -> TrainConfig:
    """A configuration by which no input is read; but for one where text would be packed densely
    without it, and so make other samples.
    """
    dense = {*config.target_streams} <= {*TEXT_STREAMS}
    others = [s for s in config.input_streams if s not in TEXT_STREAMS]
    kept = tuple(others[-1:]) if dense else ()  # the last ones are the sensors, cheap to read
    return config.model_copy(update={"data": config.data.model_copy(update={"modalities": kept})})


def _open_val(config: TrainConfig) -> tuple[Loader | None, str | None]:
    """This rank's share of the held-out batches, or why there are none."""
    try:
        source = open_source(config, split="val")
    except SessionError as error:
        return None, str(error)
    if int(source.shard_sizes.sum()) == 0:
        return None, f"{config.data.source_description} has no session in its val split"
    rank, world_size = distributed.rank(), distributed.world_size()
    return held_out(source, config, rank=rank, world_size=world_size), None


def held_out(
    source: SampleSource, config: TrainConfig, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """All batches of a held-out source in stored order, or a rank's share of them."""
    return Loader(source, config, is_shuffled=False, num_epochs=1, rank=rank, world_size=world_size)


def describe_left_out(source: SampleSource) -> list[str]:
    """What of a source is no sample: a line per session, and one for windows of the others."""
    rejected = source.rejected if isinstance(source, SessionSource) else {}
    windows = [key for key in rejected if "/" in key]
    lines = [f"{session}: {why}" for session, why in rejected.items() if "/" not in session]
    if windows:
        first = f"the first is {windows[0]}: {rejected[windows[0]]}"
        lines.append(f"{len(windows)} windows of sessions that are used; {first}")
    return lines


def _tell_left_out(console: Console, parts: Parts) -> None:
    """Name what is in no batch; of many, the first ones and how many there are."""
    for line in parts.left_out[:MAX_LEFT_OUT_LINES]:
        console.print(f"left out: {line}", soft_wrap=True, markup=False, highlight=False)
    if (more := len(parts.left_out) - MAX_LEFT_OUT_LINES) > 0:
        console.print(
            f"left out: {more} more; `python -m preprocess shards` lists all in rejected.jsonl"
        )


def _tell_remarks(console: Console, parts: Parts, config: TrainConfig) -> None:
    """Say once what is probably not meant, see :mod:`train.summary`."""
    lines = remarks(
        config,
        num_samples=int(parts.loader.source.shard_sizes.sum()),
        not_held_out=parts.not_held_out,
        num_ranks=distributed.world_size(),
    )
    for line in lines:
        console.print(line, style="yellow", soft_wrap=True, highlight=False)


def _goes_on_in(folder: Path, resume: str | None) -> bool:
    """Whether a run goes on from a checkpoint in its own folder."""
    if resume in {None, "auto"}:
        return resume == "auto"
    return Path(str(resume)).resolve().parent == folder.resolve()


def _resume(trainer: Trainer, config: TrainConfig, resume: str | None, console: Console) -> bool:
    """Go on from a checkpoint where asked to; False where there is nothing left to train.

    Raises:
        ConfigError: another run's checkpoints would be overwritten.
    """
    folder = config.training.checkpointing.save_dir
    if not _goes_on_in(folder, resume):
        distributed.on_main(lambda: refuse_checkpoints(folder))
    if resume is None:
        return True
    path: Path | str | None = resume
    if resume == "auto":
        path = distributed.on_main(lambda: find_latest_checkpoint(folder, on_skip=console.print))
    if path is None:
        console.print(f"no checkpoint in {folder} yet; starting at step 0")
        return True
    trainer.load_checkpoint(path)
    if trainer.step < config.training.max_steps:
        return True
    console.print(
        f"{path}: trained to step {trainer.step} already, nothing to do. To go on, raise "
        f"training.max_steps; to train anew, remove {folder} or set another "
        "training.checkpointing.save_dir",
        soft_wrap=True,
    )
    return False


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
