"""Command line ``python -m preprocess``: turn recorded sessions into shard sets."""

from __future__ import annotations

from shared.interrupts import catch_interrupts

if __name__ == "__main__":
    catch_interrupts()  # before the imports below, which take long enough to be interrupted

import os
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from shared.cli import CommandGroup, ContinuableCommand, widen_pipes
from shared.errors import EngineError, MachineError
from shared.recipe import Recipe, load_recipe
from shared.session.names import typed_name
from shared.storage import Store, parse_location, redact_url

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from preprocess.build.job import BuildSummary
    from preprocess.build.only import Only
    from preprocess.validate.console import Form
    from preprocess.validate.page import ReportPage
    from shared.shardset.manifest import Manifest

_RECIPE_OPTION = click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    default=None,
    help="Recipe file; the default recipe if omitted (see configs/recipe.yaml).",
)
_WORKERS_OPTION = click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=0),
    default=lambda: os.cpu_count() or 1,
    show_default="one per core",
    help="Local worker processes; 0 runs in this process, without Dask.",
)
_SCHEDULER_OPTION = click.option(
    "--scheduler", default=None, help="Address of a running Dask scheduler."
)
_VERDICTS_OPTION = click.option(
    "--verdicts",
    "verdicts_at",
    metavar="FOLDER",
    default=None,
    help="Folder or URL of what is kept of each session; SESSIONS/.verdicts if omitted.",
)
_KEEP_OLD_OPTION = click.option(
    "--keep-old",
    "keep_old_h",
    type=click.FloatRange(min=0),
    metavar="HOURS",
    default=24,
    show_default=True,
    help="How long files of a replaced set behind a URL are kept for its readers.",
)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Turn recorded VR sessions into shard sets for training.

    \b
    Steps:   validate -> shards -> verify, show -> python -m train run
    Try it:  python -m preprocess demo-sessions data/demo
    """  # noqa: D301 (click wants the character, not its name)


@cli.command(cls=ContinuableCommand)
@click.argument("locations", metavar="SESSIONS...", nargs=-1, required=True)
@click.option(
    "--fix", is_flag=True, help="Repair what has exactly one correct repair; keeps *.orig."
)
@click.option("--strict", is_flag=True, help="Treat warnings as failures.")
@click.option("--summary", "form", flag_value="table", help="Print one table instead of reports.")
@click.option("--json", "form", flag_value="json", help="Print one JSON report per line.")
@click.option(
    "--report",
    "page_path",
    metavar="FILE.html",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Also write an HTML page with timelines, curves and pictures of every session; of more "
    "than 50 sessions, the details are in the folder FILE_files beside it.",
)
@click.option("--init", is_flag=True, help="Print a recipe for recordings like one good session.")
@_RECIPE_OPTION
@click.option("--quick", is_flag=True, help="Read lines and headers only, and decode nothing.")
@click.option("--all", "force", is_flag=True, help="Look again at sessions that did not change.")
@_VERDICTS_OPTION
@_WORKERS_OPTION
@_SCHEDULER_OPTION
@click.pass_context
def validate(
    ctx: click.Context,
    locations: tuple[str, ...],
    *,
    fix: bool,
    strict: bool,
    form: Form | None,
    page_path: Path | None,
    init: bool,
    recipe_path: Path | None,
    quick: bool,
    force: bool,
    verdicts_at: str | None,
    num_workers: int,
    scheduler: str | None,
) -> None:
    """Check sessions, or single video and sound files; exit with code 1 if a check fails.

    The code is 3 if none fails, but the machine could not read some of them.

    SESSIONS are session folders, folders of session folders, or URLs of them. What is found of each
    session is kept, so that the next run looks only at sessions that are new or have changed.
    docs/verdicts.md says what builds and trainings make of what it finds.

    \b
    python -m preprocess validate data/sessions --summary
    python -m preprocess validate data/sessions --quick
    python -m preprocess validate s3://bucket/sessions --summary
    python -m preprocess validate data/sessions/session_001 --fix
    python -m preprocess validate data/sessions --report out.html
    python -m preprocess validate camera.mp4 microphone.wav
    python -m preprocess validate --init data/sessions/session_001 > recipe.yaml
    """  # noqa: D301
    from preprocess.cluster import Cluster
    from preprocess.validate.console import ReportPrinter
    from preprocess.validate.job import Settings, find_jobs, run_jobs

    if init:
        _print_proposal(locations)
        return
    if fix:
        _require_local(locations)
    console = Console(stderr=form == "json")
    recipe = _recipe(recipe_path)
    settings = Settings(
        recipe=recipe,
        depth="quick" if quick else "full",
        force=force,
        fix=fix,
        wants_page=page_path is not None,
    )
    with ExitStack() as stack:
        page = stack.enter_context(_open_page(page_path))
        cluster = Cluster(scheduler=scheduler, num_workers=num_workers, console=console)
        stack.enter_context(cluster)
        jobs = find_jobs(locations, recipe, verdicts_at=verdicts_at)
        printer = ReportPrinter(console, form=form, num_sessions=len(jobs))
        results = run_jobs(jobs, settings, cluster=cluster, page=page)
        for result in stack.enter_context(closing(results)):
            printer.add(result)
        printer.add_duplicates(jobs, recipe, page)
    printer.finish()
    if code := printer.exit_code(strict=strict):
        ctx.exit(code)


def _print_proposal(locations: tuple[str, ...]) -> None:
    """Print the recipe that one session suggests."""
    from preprocess.validate.propose import propose_recipe

    folders = [
        location for location in map(parse_location, locations) if isinstance(location, Path)
    ]
    if len(locations) != 1 or not folders:
        raise click.UsageError("--init reads one session folder; fix: give one")
    click.echo(propose_recipe(folders[0]), nl=False)


@cli.command(cls=ContinuableCommand)
@_RECIPE_OPTION
@click.option(
    "--sessions",
    default="data/sessions",
    show_default=True,
    help="Folder of session folders, or its URL (s3://...).",
)
@click.option(
    "--out",
    default="shards/default",
    show_default=True,
    help="Folder of the shard set, or its URL.",
)
@_WORKERS_OPTION
@_SCHEDULER_OPTION
@click.option(
    "--task-seconds",
    "task_s",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Seconds of video per task; longer sessions are split. Changes no byte of the set.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be written, and why; write only caches of scans and verdicts.",
)
@_KEEP_OLD_OPTION
@click.option(
    "--verify", is_flag=True, help="Check every byte of the set first, and rebuild what is corrupt."
)
@click.option(
    "--compact", is_flag=True, help="Pack as a fresh build would; rows of the set are copied."
)
@click.option(
    "--only",
    type=click.Choice(["passed", "warnings", "any"]),
    default=None,
    help="Validate sessions that changed, use those with this verdict or a better one, and write "
    "the verdicts into the flags of the samples. If omitted, nothing is validated.",
)
@_VERDICTS_OPTION
def shards(
    *,
    recipe_path: Path | None,
    sessions: str,
    out: str,
    num_workers: int,
    scheduler: str | None,
    task_s: float,
    dry_run: bool,
    keep_old_h: float,
    verify: bool,
    compact: bool,
    only: Only | None,
    verdicts_at: str | None,
) -> None:
    """Build a shard set, or update it: only what changed is rebuilt.

    \b
    python -m preprocess shards --sessions data/sessions --out shards/default
    python -m preprocess shards --sessions data/sessions --out shards/default --dry-run
    python -m preprocess shards --sessions data/sessions --out shards/good --only warnings
    """  # noqa: D301
    from preprocess.build.job import build_shards
    from preprocess.cluster import Cluster

    if verdicts_at and not only:
        raise click.UsageError("--verdicts is for builds by verdict; fix: give --only, too")
    console = Console()
    recipe = _recipe(recipe_path)
    with Cluster(scheduler=scheduler, num_workers=num_workers, console=console) as cluster:
        summary = build_shards(
            sessions,
            out,
            recipe=recipe,
            cluster=cluster,
            dry_run=dry_run,
            task_s=task_s,
            keep_old_s=keep_old_h * 3600,
            verify=verify,
            compact=compact,
            only=only,
            verdicts_at=verdicts_at,
        )
    _print_build(summary, parse_location(out))


def _print_build(summary: BuildSummary, location: Path | Store) -> None:
    """Print what a build wrote or would write, and the state of the set."""
    from preprocess.build.explain import PAST, explain_left_out, explain_plan

    for warning in summary.warnings:
        click.echo(f"warning: {warning}", err=True)
    lines = explain_plan(summary.plan)
    for verb, line in lines:
        click.echo(f"{PAST[verb] if summary.manifest else f'would {verb}'} {line}")
    if summary.manifest is None:
        if summary.plan.is_empty and not lines:
            click.echo(f"{location} is up to date")
        for note in explain_left_out(summary.left_out, summary.num_sessions):
            click.echo(note)
        return
    counts = summary.manifest.counts
    state = "is up to date" if summary.plan.is_empty and not lines else "is ready"
    click.echo(
        f"{location} {state}: {counts['sessions']} sessions, {counts['samples']} segments "
        f"({summary.manifest.num_samples('val')} held out) + {counts['segments_rejected']} rejected"
    )
    for note in summary.notes:
        click.echo(note)
    if summary.rejected:
        click.echo(f"what the set lacks, and why: {location}/rejected.jsonl")


@cli.command()
@click.argument("shard_set", metavar="SHARD_SET")
def upgrade(shard_set: str) -> None:
    """Upgrade a shard set of format 2 (a folder or a URL) in its place, without its recordings.

    Nothing is decoded. A build onto such a set upgrades it first.

    \b
    python -m preprocess upgrade shards/default
    """  # noqa: D301
    from preprocess.build.upgrade import upgrade_set
    from shared.shardset.store import open_shard_set

    summary = upgrade_set(shard_set)
    if summary is None:
        with open_shard_set(parse_location(shard_set)) as store:
            store.read_manifest()
        click.echo(f"{redact_url(shard_set)} is up to date")
        return
    click.echo(
        f"{redact_url(shard_set)} is upgraded: {summary.num_segments} segments in "
        f"{summary.num_shards} shards; {summary.kept_files} video files kept, "
        f"{summary.copied_members} members copied, {summary.rewritten_members} rewritten"
    )
    for line in summary.gaps:
        click.echo(f"gap: {line}; fix: run `python -m preprocess shards` with its sessions")


@cli.command()
@click.argument("shard_set", metavar="SHARD_SET")
@click.pass_context
def verify(ctx: click.Context, shard_set: str) -> None:
    """Check every byte of a shard set (a folder or a URL); exit with code 1 on any problem.

    The code is 3 if there is none, but files could not be read.

    \b
    python -m preprocess verify shards/default
    python -m preprocess verify s3://bucket/set
    """  # noqa: D301
    from preprocess.sets.verify import verify_set

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("shards")
        result = verify_set(
            shard_set, progress=lambda done, total: bars.update(bar, completed=done, total=total)
        )
    for problem in (*result.problems, *result.unread):
        click.echo(problem, err=True)
    outcome = f"{len(result.problems)} problems" if result.problems else "all good"
    if result.unread:
        outcome = f"{len(result.problems)} problems, {len(result.unread)} files could not be read"
    click.echo(
        f"{redact_url(shard_set)}: {result.num_samples} samples in {result.num_shards} shards, "
        f"{result.num_members} members, {result.length_bytes / 2**20:.1f} MiB: " + outcome
    )
    if result.problems or result.unread:
        ctx.exit(EngineError.exit_code if result.problems else MachineError.exit_code)


@cli.command()
@click.argument("shard_set", metavar="SHARD_SET")
@click.argument("key", required=False)
def show(shard_set: str, key: str | None) -> None:
    """Show a shard set (a folder or a URL), or one sample of it by its key SESSION/SEGMENT.

    \b
    python -m preprocess show shards/default
    python -m preprocess show shards/default session_001/000004
    """  # noqa: D301
    from preprocess.sets.verify import describe_sample, describe_set

    lines = describe_set(shard_set) if key is None else describe_sample(shard_set, typed_name(key))
    for name, value in lines:
        click.echo(f"{name:>18}  {value}")


@cli.group()
def sessions() -> None:
    """List, drop, split and merge the sessions of shard sets (folders or URLs), without decoding.

    \b
    python -m preprocess sessions list shards/default
    python -m preprocess sessions drop shards/default session_007
    python -m preprocess sessions split shards/default shards/few session_001 session_002
    python -m preprocess sessions merge shards/all shards/default shards/more
    """  # noqa: D301


@sessions.command("list")
@click.argument("shard_set", metavar="SHARD_SET")
def list_of_sessions(shard_set: str) -> None:
    """List the sessions of a set with split, samples, rejected segments, size and shards."""
    from preprocess.sets.edit import list_sessions

    listed = list_sessions(shard_set)
    width = max((len(s.name) for s in listed), default=0)
    for s in listed:
        click.echo(
            f"{s.name:{width}}  {s.split:5}  {s.num_samples:6} samples  {s.num_rejected:5} rejected"
            f"  {s.length_bytes / 2**20:9.1f} MiB  {', '.join(s.shards)}"
        )


@sessions.command()
@click.argument("shard_set", metavar="SHARD_SET")
@click.argument("names", nargs=-1, required=True)
@_KEEP_OLD_OPTION
def drop(shard_set: str, names: tuple[str, ...], *, keep_old_h: float) -> None:
    """Remove sessions from a set; shards without them stay unchanged."""
    from preprocess.sets.edit import drop_sessions

    names = tuple(map(typed_name, names))
    _print_manifest(drop_sessions(shard_set, names, keep_old_s=keep_old_h * 3600), shard_set)
    click.echo(
        f"the next `make shards` into it brings {', '.join(dict.fromkeys(names))} back if the "
        "folders are still below its --sessions; fix: move them away first"
    )


@sessions.command()
@click.argument("shard_set", metavar="SHARD_SET")
@click.argument("out")
@click.argument("names", nargs=-1, required=True)
def split(shard_set: str, out: str, names: tuple[str, ...]) -> None:
    """Make a set of some sessions of another set, which stays unchanged."""
    from preprocess.sets.edit import split_sessions

    _print_manifest(split_sessions(shard_set, out, [*map(typed_name, names)]), out)


@sessions.command()
@click.argument("out")
@click.argument("shard_sets", metavar="SHARD_SETS...", nargs=-1, required=True)
def merge(out: str, shard_sets: tuple[str, ...]) -> None:
    """Make one set of several with the same recipe and tokenizer; these stay unchanged."""
    from preprocess.sets.edit import merge_sets

    _print_manifest(merge_sets(out, shard_sets), out)


def _print_manifest(manifest: Manifest, location: str) -> None:
    counts = manifest.counts
    click.echo(
        f"{redact_url(location)}: {counts['sessions']} sessions, {counts['samples']} samples "
        f"({manifest.num_samples('val')} held out) in {len(manifest.shards)} shards"
    )


@cli.command("demo-sessions", cls=ContinuableCommand)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--sessions", "num_sessions", type=click.IntRange(min=1), default=24, show_default=True
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=1),
    default=40.0,
    show_default=True,
    help="Seconds.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def demo_sessions(out: Path, *, num_sessions: int, duration_s: float, seed: int) -> None:
    """Make sessions of a small simulated world; existing sessions are kept."""
    from preprocess.demo.world import write_demo_sessions

    made: list[str] = []

    def log(name: str) -> None:
        made.append(name)
        click.echo(name)

    write_demo_sessions(
        out, num_sessions=num_sessions, duration_s=duration_s, seed=seed, progress=log
    )
    click.echo(f"{out}: {num_sessions} demo sessions" + ("" if made else ", all of which existed"))


def _require_local(locations: Iterable[str]) -> None:
    """Refuse URLs: repairs keep the originals next to the files, in folders."""
    for location in map(parse_location, locations):
        if isinstance(location, Store):
            raise click.UsageError(
                f"{location}: --fix repairs sessions in folders only; fix: copy them to this "
                "machine, repair them and copy them back"
            )


def _open_page(path: Path | None) -> AbstractContextManager[ReportPage | None]:
    """Open the report page, if one is wanted; jinja2 is loaded only then."""
    if path is None:
        return nullcontext()
    from preprocess.validate.page import ReportPage

    return ReportPage(path)


def _recipe(path: Path | None) -> Recipe:
    return Recipe() if path is None else load_recipe(path)


if __name__ == "__main__":
    widen_pipes()
    cli(prog_name="python -m preprocess")
