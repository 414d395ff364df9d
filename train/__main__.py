"""``python -m train``: the commands that train a model on shard sets and run it."""

from __future__ import annotations

from shared.interrupts import catch_interrupts, exit_code

if __name__ == "__main__":
    catch_interrupts()  # before the imports below, which take long enough to be interrupted

import json
import os
from pathlib import Path

import click

from shared.cli import CommandGroup, widen_pipes
from train.config import load_train_config

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)

_CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=_PATH,
    required=True,
    help="Training configuration, such as configs/training_config.yaml.",
)
_CHECKPOINT_OPTION = click.option(
    "--checkpoint",
    type=_PATH,
    required=True,
    help="Checkpoint file: model_final.pt or model_step_N.pt.",
)
_DEVICE_OPTION = click.option(
    "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N."
)
_OVERRIDES = click.argument("overrides", nargs=-1)


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
def cli() -> None:
    """Train a multimodal model on shard sets, and run it on recorded sessions.

    \b
    Workflow:  run -> tensorboard --logdir=runs/ -> infer
    Try it:    make train CONFIG=configs/demo.yaml
    """  # noqa: D301 (click wants the character, not its name)
    # This must be set before torch is imported. Otherwise OpenMP's threads spin while they wait, on
    # a core that another process needs. On two busy cores it doubled training from 10 to
    # 20 samples/s (2 with long spinning). In inference the slowest tick of a hundred took 30 ms
    # instead of 530.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--resume",
    help="Checkpoint file to continue from; auto: the newest intact checkpoint of the run's "
    "save_dir, if there is one.",
)
@click.option(
    "--weights",
    type=_PATH,
    help="Checkpoint whose weights a new run starts with, for other data or another schedule.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Check the configuration, the data and one pass over one batch, without training.",
)
@_OVERRIDES
@click.pass_context
def run(
    ctx: click.Context,
    *,
    config_path: Path,
    resume: str | None,
    weights: Path | None,
    check: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train a model as a configuration file says.

    Metrics go to TensorBoard, checkpoints to training.checkpointing.save_dir. OVERRIDES are
    key=value pairs that replace keys of the file, such as training.max_steps=200. All keys are
    explained in train/config.py.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop; the exit code is then 130, 143 or 129.
    It is 0 only if training.max_steps was reached.

    \b
    python -m train run --config configs/demo.yaml --check
    python -m train run --config configs/demo.yaml --resume auto training.max_steps=2000
    """  # noqa: D301
    from train.run import check_config, run_training

    config = load_train_config(config_path, overrides, warn=_warn)
    if weights is not None and resume not in {None, "auto"}:
        raise click.UsageError(
            "--weights starts a new run, but --resume FILE continues one; fix: give one of them"
        )
    if check:
        check_config(config, origin=config_path, resume=resume, weights=weights)
    else:
        summary = run_training(config, origin=config_path, resume=resume, weights=weights)
        if summary is not None and summary.signal_number is not None:
            ctx.exit(exit_code(summary.signal_number))


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--kills", type=_COUNT, default=2, help="Number of times the run is killed and resumed."
)
@click.option("--steps", type=_COUNT, default=40, help="Optimizer steps of the whole run.")
@click.option(
    "--seed",
    type=int,
    default=0,
    help="Decides when the run is killed, and with how many ranks and loader processes it resumes.",
)
@_OVERRIDES
@click.pass_context
def selftest(
    ctx: click.Context,
    *,
    config_path: Path,
    kills: int,
    steps: int,
    seed: int,
    overrides: tuple[str, ...],
) -> None:
    """Check on your data that a killed and resumed run equals an uninterrupted one.

    Kills the run (SIGKILL) at random steps, resumes it with other numbers of ranks and loader
    processes, and compares the samples, their bytes and the weights. Uses a tiny model on the CPU.

    \b
    python -m train selftest --config configs/demo.yaml
    """  # noqa: D301
    from train.run import require_paths
    from train.tools.selftest import run_selftest

    config = load_train_config(config_path, overrides, warn=_warn)
    require_paths(config, origin=config_path)
    if not run_selftest(config, num_kills=kills, num_steps=steps, seed=seed, log=click.echo):
        ctx.exit(1)


@cli.command()
@_CHECKPOINT_OPTION
@click.option(
    "--input",
    "session",
    type=_PATH,
    required=True,
    help="Folder of one session; it may have any of the streams.",
)
@click.option(
    "--out",
    type=_PATH,
    default=Path("predictions"),
    help="Output folder; the session gets a folder of its name in it.",
)
@_DEVICE_OPTION
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    help="0 picks the most likely tokens and sound levels; 1 samples them from the model's "
    "probabilities.",
)
@click.option("--top-k", type=_COUNT, help="Sample among this many most likely values only.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Sample among the fewest values whose probabilities sum up to this (nucleus sampling).",
)
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, help="Seed of the sampling."
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures, as in metrics.json.")
def infer(
    *,
    checkpoint: Path,
    session: Path,
    out: Path,
    device: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run a trained model through a session, tick by tick, and write its predictions.

    They are written to OUT/SESSION; open the index.html there in a browser.

    \b
    python -m train infer --checkpoint checkpoints/demo/model_final.pt \\
        --input data/demo/session_001 --out predictions
    """  # noqa: D301
    from rich.console import Console

    from train.infer.page import PAGE_NAME
    from train.infer.run import infer as infer_session
    from train.infer.run import print_inference

    out = out / session.resolve().name
    with click.progressbar(length=1, label=session.name) as bar:

        def update(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        metrics = infer_session(
            checkpoint,
            session,
            out,
            device=device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            progress=update,
        )
    if as_json:
        click.echo(json.dumps(metrics, indent=1))
    else:
        print_inference(metrics, out / PAGE_NAME, Console(markup=False, highlight=False))


@cli.command()
@_CHECKPOINT_OPTION
@click.option(
    "--config",
    "config_path",
    type=_PATH,
    help="Configuration that names the data; by default the checkpoint's own.",
)
@_DEVICE_OPTION
def ablate(*, checkpoint: Path, config_path: Path | None, device: str) -> None:
    """Measure on held-out sessions how much each head's loss rises without each modality.

    \b
    python -m train ablate --checkpoint checkpoints/demo/model_final.pt
    """  # noqa: D301
    from train.tools.ablate import run_ablation

    data = None if config_path is None else load_train_config(config_path).data
    run_ablation(checkpoint, data=data, device=device)


@cli.command()
@_CONFIG_OPTION
@click.option("--sizes", is_flag=True, help="Print one line for each model.size instead.")
@_OVERRIDES
def estimate(*, config_path: Path, sizes: bool, overrides: tuple[str, ...]) -> None:
    """Estimate parameters, memory, FLOPs and the largest batches, without data or a GPU.

    OVERRIDES are key=value pairs that replace keys of the file.

    \b
    python -m train estimate --config configs/training_config.yaml model.size=large
    python -m train estimate --config configs/training_config.yaml --sizes
    """  # noqa: D301
    from train.tools.estimate import print_estimate, print_sizes

    config = load_train_config(config_path, overrides, warn=_warn)
    (print_sizes if sizes else print_estimate)(config, origin=config_path)


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--out",
    type=_PATH,
    default=Path("profiler_output"),
    help="Output folder of the report and the trace.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    help="Steps per measurement; fewer if they take too long.",
)
@_OVERRIDES
def profile(*, config_path: Path, out: Path, steps: int, overrides: tuple[str, ...]) -> None:
    """Measure where training spends its time, and advise what makes it faster.

    Writes OUT/profile_report.json and a trace for Perfetto (or TensorBoard with torch-tb-profiler).
    No weights are kept. OVERRIDES are key=value pairs that replace keys of the file.

    \b
    python -m train profile --config configs/demo.yaml
    """  # noqa: D301
    # Hide messages about memory that is older than the profiler, and about its start and end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from train.tools.profile import run_profile

    config = load_train_config(config_path, overrides, warn=_warn)
    run_profile(config, origin=config_path, out=out, num_steps=steps)


def _warn(message: str) -> None:
    click.echo(message, err=True)


if __name__ == "__main__":
    widen_pipes()
    cli(prog_name="python -m train")
