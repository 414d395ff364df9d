"""``python -m train``: from a shard set to a trained creature."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from shared.cli import CommandGroup, widen_pipes
from train.config import load_train_config

_CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    required=True,
    help="A training configuration, such as configs/training_config.yaml.",
)
_CHECKPOINT_OPTION = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="A model_final.pt or model_step_N.pt.",
)
_DEVICE_OPTION = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train multi-modal creatures on shard sets, and let them live through sessions.

    \b
    The road:  run -> tensorboard --logdir=runs/ -> infer
    Try it:    make train CONFIG=configs/demo.yaml
    """  # noqa: D301 (click wants the character, not its name)
    # Before torch is imported. OpenMP's threads otherwise burn a core that another process needs
    # while they wait. On two busy cores training's 10 samples/s became 20, and 2 where they spin
    # for long; of a life's ticks the slowest in a hundred took 30 ms instead of 530.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@cli.command()
@_CONFIG_OPTION
@click.option("--resume", default=None, help="auto: the newest checkpoint; or a checkpoint file.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    default=None,
    help="Begin a new run with a checkpoint's weights: other data, another schedule.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Check the configuration and one step on one batch; train nothing.",
)
@click.argument("overrides", nargs=-1)
def run(
    *,
    config_path: Path,
    resume: str | None,
    weights: Path | None,
    check: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train as a configuration file says.

    OVERRIDES are key=value pairs laid over the file, such as training.max_steps=200.

    \b
    python -m train run --config configs/demo.yaml --check
    python -m train run --config configs/demo.yaml --resume auto training.max_steps=2000
    """  # noqa: D301
    from train.run import check_config, run_training

    config = load_train_config(config_path, overrides, say=_warn)
    if weights is not None and resume not in {None, "auto"}:
        raise click.UsageError(
            "--weights begins a run and --resume FILE goes on with one; give one"
        )
    if check:
        check_config(config, origin=config_path, resume=resume, weights=weights)
    else:
        run_training(config, origin=config_path, resume=resume, weights=weights)


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often the run is killed and resumed.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Steps of the whole run.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Decides when it is killed, and the numbers of ranks and processes it goes on with.",
)
@click.argument("overrides", nargs=-1)
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
    """Check on your data that a run that is killed and resumed is the one that was left alone.

    Kills (SIGKILL) at random steps, resumes by other numbers of ranks and loader processes, and
    compares the samples, their bytes and the weights. The model is a tiny one, on the CPU.

    \b
    python -m train selftest --config configs/demo.yaml
    """  # noqa: D301
    from train.run import require_paths
    from train.tools.selftest import run_selftest

    config = load_train_config(config_path, overrides, say=_warn)
    require_paths(config, origin=config_path)
    if not run_selftest(config, num_kills=kills, num_steps=steps, seed=seed, log=click.echo):
        ctx.exit(1)


@cli.command()
@_CHECKPOINT_OPTION
@click.option(
    "--input",
    "session",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of one session; any streams will do.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("predictions"),
    show_default=True,
    help="Folder in which a folder of the session's name is made.",
)
@_DEVICE_OPTION
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest tokens and levels of sound; 1 draws them as the model says.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=None,
    help="Draw among so many of the likeliest only.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=None,
    help="Draw among the fewest that together have this probability only.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Of all that is drawn.",
)
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
) -> None:
    """Let a creature live through a session tick by tick and write what it predicts.

    Below OUT it makes a folder of the session's name; open its index.html in a browser.

    \b
    python -m train infer --checkpoint checkpoints/demo/model_final.pt \\
        --input data/demo/session_001 --out predictions
    """  # noqa: D301
    from train.infer.run import infer as infer_session

    out = out / session.resolve().name
    with click.progressbar(length=1, label=session.name) as bar:

        def tell(done: int, total: int) -> None:
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
            progress=tell,
        )
    click.echo(json.dumps(metrics, indent=1))
    click.echo(f"written to {out}; look at {out / 'index.html'}")


@cli.command()
@_CHECKPOINT_OPTION
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=None,
    help="Names the data, where that of the training is not wanted.",
)
@_DEVICE_OPTION
def ablate(*, checkpoint: Path, config_path: Path | None, device: str) -> None:
    """Measure on held-out sessions what each head loses without each modality.

    \b
    python -m train ablate --checkpoint checkpoints/demo/model_final.pt
    """  # noqa: D301
    from train.tools.ablate import run_ablation

    data = None if config_path is None else load_train_config(config_path).data
    run_ablation(checkpoint, data=data, device=device)


@cli.command()
@_CONFIG_OPTION
@click.option("--sizes", is_flag=True, help="A line for each model.size, instead.")
@click.argument("overrides", nargs=-1)
def estimate(*, config_path: Path, sizes: bool, overrides: tuple[str, ...]) -> None:
    """Estimate parameters, memory, FLOPs and the largest batches, without data or a GPU.

    OVERRIDES are key=value pairs laid over the file.

    \b
    python -m train estimate --config configs/training_config.yaml model.size=large
    python -m train estimate --config configs/training_config.yaml --sizes
    """  # noqa: D301
    from train.tools.estimate import print_estimate, print_sizes

    config = load_train_config(config_path, overrides, say=_warn)
    (print_sizes if sizes else print_estimate)(config, origin=config_path)


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("profiler_output"),
    show_default=True,
    help="Folder of the report and the trace.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Steps of each measurement, unless it takes too long.",
)
@click.argument("overrides", nargs=-1)
def profile(*, config_path: Path, out: Path, steps: int, overrides: tuple[str, ...]) -> None:
    """Measure where each second of training goes, and what would make it faster.

    Writes OUT/profile_report.json and a trace for Perfetto (or TensorBoard with torch-tb-profiler);
    trains nothing that is kept. OVERRIDES are key=value pairs laid over the file.

    \b
    python -m train profile --config configs/demo.yaml
    """  # noqa: D301
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of memory older than the profiler
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # that it begins and ends
    from train.tools.profile import run_profile

    config = load_train_config(config_path, overrides, say=_warn)
    run_profile(config, origin=config_path, out=out, num_steps=steps)


def _warn(message: str) -> None:
    click.echo(message, err=True)


if __name__ == "__main__":
    widen_pipes()
    cli(prog_name="python -m train")
