"""``train run``: open the data, make the model, train, and print a summary."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from rich.console import Console

from shared.errors import ConfigError, SessionError
from shared.recipe import Recipe, load_recipe
from shared.streams import Kind
from train.checkpoints import list_checkpoints, load_checkpoint
from train.data.loader import Loader, open_source
from train.data.pixels import to_model_inputs
from train.data.session_source import SessionSource
from train.loop.checkpoint_manager import check_writable, find_latest_checkpoint, refuse_checkpoints
from train.loop.run_lock import hold_folder
from train.loop.trainer import Trainer
from train.machine import distributed
from train.machine.runtime import choose_device, choose_dtype, translate_errors
from train.model.baselines import Baselines, compare
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes
from train.statistics import heads_without_target, standardize
from train.summary import describe_streams, print_summary, startup_warnings

if TYPE_CHECKING:
    from train.config import DataConfig, TrainConfig
    from train.data.batch import SampleSource
    from train.loop.meter import TrainSummary

MAX_REJECTED_LINES: Final = 20
"""Rejected sessions and segments that are named one by one."""

BASELINE_BATCHES: Final = 200
"""Largest number of train batches that the baselines are fitted on."""

_READ_COST: Final = {Kind.SENSOR: 0, Kind.AUDIO: 1, Kind.VIDEO: 2}
"""How much reading a stream costs, in order, by its kind."""

_DEMO_SET: Final = "shards/demo"
"""The set that `make demo` builds, with sessions and a recipe of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup:
    """Data and model of a run before its first step."""

    loader: Loader
    val_loader: Loader | None
    model: MultiModalCreature
    rejected: tuple[str, ...]
    """Sessions and segments read directly that no batch uses, with reasons; of shards,
    rejected.jsonl has them."""
    no_val_reason: str | None
    """Why there are no held-out batches; None if there are some."""


def run_training(
    config: TrainConfig, *, origin: Path, resume: str | None = None, weights: Path | None = None
) -> TrainSummary | None:
    """Train, evaluate on held-out sessions, and print a summary.

    `resume`: a checkpoint file, or "auto" for the newest checkpoint of
        ``checkpointing.save_dir``, if there is one.
    `weights`: checkpoint whose weights a run that is not resumed starts with.

    Returns:
        The summary; None if the checkpoint has reached ``training.max_steps`` already.
    """
    require_paths(config, origin=origin)
    device = choose_device(config.training.device)
    save_dir = config.training.checkpointing.save_dir
    with distributed.process_group(device), translate_errors():
        # Only the main one of the ranks prints.
        console = Console(quiet=not distributed.is_main(), markup=False, soft_wrap=True)
        with hold_folder(save_dir, log=console.print):
            return _run(config, console, origin=origin, resume=resume, weights=weights)


def _run(
    config: TrainConfig,
    console: Console,
    *,
    origin: Path,
    resume: str | None,
    weights: Path | None,
) -> TrainSummary | None:
    """Run training as one of the ranks."""
    setup = set_up_run(config, origin=origin)
    console.print(describe_streams(setup.loader.shapes), highlight=False)
    _print_warnings(console, setup, config)
    baselines = distributed.on_main(lambda: fit_baselines(setup, config, console))
    trainer = Trainer(
        setup.model,
        config,
        setup.loader,
        val_loader=setup.val_loader,
        console=console,
        checkpoint_extra={"baselines": baselines.as_dict()},
    )
    has_steps_left = _resume(trainer, config, resume, console)
    if weights is not None:
        _load_weights(trainer, weights, console)
    if not has_steps_left:
        return None
    trainer.standardize()
    first_val_losses = trainer.evaluate() if setup.val_loader is not None else {}
    summary = trainer.train()
    if not distributed.is_main():
        return summary
    print_summary(
        summary,
        config=config,
        first_val_losses=first_val_losses,
        comparisons=compare(summary.last_val_losses, baseline_losses(baselines, setup, config)),
        origin=origin,
        session=(setup.val_loader or setup.loader).source.key(0, 0).rpartition("@")[0],
        recipe=setup.loader.source.recipe,
        console=console,
    )
    return summary


def check_config(
    config: TrainConfig, *, origin: Path, resume: str | None = None, weights: Path | None = None
) -> None:
    """Check a configuration without training, and write no file.

    Checks the machine and all sizes. If the data exists, runs one forward and one backward pass on
    one batch.

    `resume`: a checkpoint file to resume from; "auto" is not checked, because a run skips
        checkpoints that it cannot use.
    """
    console = Console(soft_wrap=True, markup=False)
    choose_dtype(config.training.precision, choose_device(config.training.device))
    save_dir = config.training.checkpointing.save_dir
    check_writable(save_dir)
    checkpoint = None if resume in {None, "auto"} else load_checkpoint(resume, map_location="meta")
    sources = list(config.data.sets.values()) or list(filter(None, [config.data.root_dir]))
    missing = [source for source in sources if not _exists(source)]
    setup = None if missing or not sources else set_up_run(config, origin=origin)
    if setup is None:
        recipe = Recipe() if config.data.recipe is None else load_recipe(config.data.recipe)
        shapes = window_shapes(recipe, config, origin=origin)
        model = MultiModalCreature(config, shapes)
    else:
        shapes, model = setup.loader.shapes, setup.model
    console.print(f"{origin}: keys and values are valid")
    if not _resumes_in(save_dir, resume) and list_checkpoints(save_dir):
        console.print(
            f"  {save_dir} holds checkpoints: a run needs --resume auto or another folder"
        )
    console.print(f"  {describe_streams(shapes)}")
    if setup is None:
        reason = f"{missing[0]} does not exist yet" if missing else "no data is configured"
        unread = "data" if weights is None and checkpoint is None else "data and checkpoint"
        console.print(f"  model: {_count(model):,} parameters")
        console.print(f"  NOT checked: {unread}, because {reason}; no batch was read")
        return
    _print_warnings(console, setup, config)
    standardize(model, setup.loader)
    _check_one_batch(setup, config, console)
    loader = setup.loader
    if weights is not None:
        Trainer(model, config, loader).load_weights(weights)
        console.print(f"  {weights}: a run can start with its weights")
    if resume is not None and checkpoint is not None:
        Trainer(model, config, Loader(loader.source, config)).load_checkpoint(resume)
        console.print(f"  {resume}: a run can resume from it, at step {checkpoint['step']}")


def _check_one_batch(setup: RunSetup, config: TrainConfig, console: Console) -> None:
    """Print sizes of the data and the model; run one forward and one backward pass."""
    loader, model = setup.loader, setup.model
    console.print(
        f"  data: {int(loader.source.window_counts.sum())} train samples, "
        f"{loader.batches_per_epoch} batches of {config.data.batch_size} per epoch"
    )
    console.print(f"  model: {_count(model):,} parameters")
    batch = next(iter(loader))
    for name, tensor in batch["inputs"].items():
        console.print(
            f"  {name:>20} {str(tensor.dtype).removeprefix('torch.'):8} {list(tensor.shape)}"
        )
    outputs = model(to_model_inputs(batch["inputs"]))
    losses = compute_losses(
        outputs, batch["targets"], batch["weight"], objective=setup.model.objective
    )
    losses["loss_total"].backward()  # type: ignore[no-untyped-call]
    line = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
    console.print(f"  one forward and backward: {line}; nothing was trained")


def require_paths(config: TrainConfig, *, origin: Path) -> None:
    """Refuse a configuration whose data does not exist."""
    data = config.data
    paths: dict[str, tuple[Path | str | None, str]] = {
        key: (path, f"build it by `{_build_command(data, path)}`")
        for key, path in data.sets.items()
    }
    if not paths:
        paths["root_dir"] = (data.root_dir, "set it to the folder that holds the session folders")
        paths["recipe"] = (data.recipe, "remove the key to use the default recipe")
    for key, (path, fix) in paths.items():
        if path is not None and not _exists(path):
            raise ConfigError(f"{origin}: key 'data.{key}' is {path}: does not exist; fix: {fix}")


def _build_command(data: DataConfig, path: Path | str) -> str:
    """Return the command that builds a shard set."""
    if str(path) == _DEMO_SET:
        return "make demo"
    options = {"--out": path, "--sessions": data.root_dir, "--recipe": data.recipe}
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join(["python", "-m", "preprocess", "shards", *words])


def _exists(path: Path | str) -> bool:
    """Return whether a folder or file exists; a URL counts, as opening it gives a better error."""
    return isinstance(path, str) or path.exists()


def window_shapes(recipe: Recipe, config: TrainConfig, *, origin: Path) -> WindowShapes:
    """Return the sizes of a configuration's windows."""
    try:
        return WindowShapes.from_recipe(recipe, config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def set_up_run(config: TrainConfig, *, origin: Path) -> RunSetup:
    """Open the data and make the model that fits it; `origin` is the configuration's file."""
    rank, world_size = distributed.rank(), distributed.world_size()
    source = open_source(config, split="train")
    window_shapes(source.recipe, config, origin=origin)
    loader = Loader(source, config, rank=rank, world_size=world_size)
    torch.manual_seed(config.training.seed)
    model = MultiModalCreature(config, loader.shapes)
    val_loader, no_val_reason = _open_val(config)
    sources = [each.source for each in (loader, val_loader) if each is not None]
    rejected = [line for source in sources for line in describe_rejected(source)]
    return RunSetup(
        loader=loader,
        val_loader=val_loader,
        model=model,
        rejected=tuple(rejected),
        no_val_reason=no_val_reason,
    )


def fit_baselines(setup: RunSetup, config: TrainConfig, console: Console) -> Baselines:
    """Fit the baselines on the first batches of the train split."""
    loader = Loader(setup.loader.source, _targets_only(config, setup.loader.shapes))
    batches = itertools.islice(loader, min(BASELINE_BATCHES, loader.batches_per_epoch))
    for head in heads_without_target(setup.loader):
        console.print(
            f"no train sample has a target for {head}: its loss stays 0 and means nothing; "
            f"set training.loss_weights.{head}: 0 to train without this head"
        )
    return Baselines.fit(batches, objective=setup.model.objective)


def baseline_losses(baselines: Baselines, setup: RunSetup, config: TrainConfig) -> dict[str, float]:
    """Return the baselines' losses by name, on the samples that the model is evaluated on.

    Only the targets of these samples are read. It is empty without held-out samples.
    """
    if setup.val_loader is None:
        return {}
    val_loader = setup.val_loader
    loader = held_out_loader(val_loader.source, _targets_only(config, val_loader.shapes))
    scored = dataclasses.replace(baselines, objective=setup.model.objective)  # with its scales
    losses = scored.mean_losses(itertools.islice(loader, config.training.eval_batches))
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _targets_only(config: TrainConfig, shapes: WindowShapes) -> TrainConfig:
    """Return a configuration that reads no inputs beside the targets.

    If only text is trained, but other streams are inputs, one of those inputs stays: otherwise text
    would be packed densely, which makes other samples.
    """
    kept = tuple(dict.fromkeys(shapes.targets.values()))
    if not shapes.is_text_only and all(shapes.streams[n].kind is Kind.TEXT for n in kept):
        others = [name for name in shapes.inputs if name not in kept]
        kept += (min(others, key=lambda name: _READ_COST[shapes.streams[name].kind]),)
    return config.model_copy(update={"data": config.data.model_copy(update={"modalities": kept})})


def _open_val(config: TrainConfig) -> tuple[Loader | None, str | None]:
    """Open this rank's share of the held-out batches, or return why there are none."""
    try:
        source = open_source(config, split="val")
    except SessionError as error:
        return None, str(error)
    if int(source.shard_sizes.sum()) == 0:
        return None, f"{config.data.source_description} has no session in its val split"
    rank, world_size = distributed.rank(), distributed.world_size()
    return held_out_loader(source, config, rank=rank, world_size=world_size), None


def held_out_loader(
    source: SampleSource, config: TrainConfig, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Make a loader of a rank's share of a held-out source, once and in stored order."""
    return Loader(source, config, is_shuffled=False, num_epochs=1, rank=rank, world_size=world_size)


def describe_rejected(source: SampleSource) -> list[str]:
    """List why sessions of a source are not used, and in one line the segments of the others."""
    rejected = source.rejected if isinstance(source, SessionSource) else {}
    segments = [key for key in rejected if "/" in key]
    lines = [f"{session}: {reason}" for session, reason in rejected.items() if "/" not in session]
    if segments:
        first = f"the first is {segments[0]}: {rejected[segments[0]]}"
        lines.append(f"{len(segments)} segments of sessions that are used; {first}")
    return lines


def _print_warnings(console: Console, setup: RunSetup, config: TrainConfig) -> None:
    """Print what is rejected, and settings that are probably mistakes."""
    for line in setup.rejected[:MAX_REJECTED_LINES]:
        console.print(f"rejected: {line}", highlight=False)
    if (num_more := len(setup.rejected) - MAX_REJECTED_LINES) > 0:
        console.print(
            f"rejected: {num_more} more; `python -m preprocess shards` lists all in rejected.jsonl"
        )
    for line in startup_warnings(
        config,
        num_samples=int(setup.loader.source.window_counts.sum()),
        runs_s=setup.loader.source.run_lengths_s(),
        no_val_reason=setup.no_val_reason,
        num_ranks=distributed.world_size(),
    ):
        console.print(line, style="yellow", highlight=False)


def _resumes_in(folder: Path, resume: str | None) -> bool:
    """Return whether a run resumes from a checkpoint in its own folder."""
    if resume in {None, "auto"}:
        return resume == "auto"
    return Path(str(resume)).resolve().parent == folder.resolve()


def _resume(trainer: Trainer, config: TrainConfig, resume: str | None, console: Console) -> bool:
    """Resume from a checkpoint if asked to; return False if no step is left to train."""
    folder = config.training.checkpointing.save_dir
    if not _resumes_in(folder, resume):
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
        f"{path}: trained to step {trainer.step} already, nothing to do. To train longer, raise "
        f"training.max_steps; to start over, remove {folder} or set another "
        "training.checkpointing.save_dir"
    )
    return False


def _load_weights(trainer: Trainer, weights: Path, console: Console) -> None:
    """Start with a checkpoint's weights, unless resumed; warn if tokens have another meaning."""
    if trainer.step > 0:
        console.print(
            f"--weights {weights} is ignored, because the run resumes from its own checkpoint; "
            "fix: to start a new run, set training.checkpointing.save_dir to another folder",
            style="yellow",
        )
        return
    has_same_tokens = trainer.load_weights(weights)
    console.print(f"starting with the weights of {weights}")
    if not has_same_tokens:
        console.print(
            "its tokenizer differs, so its tokens stand for other text; fix: build the shards with "
            "text.tokenizer set to the tokenizer.json of its shard set",
            style="yellow",
        )


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
