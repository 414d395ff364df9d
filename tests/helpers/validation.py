"""Validate sessions as the command does, and return what it yields."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from preprocess.cluster import Cluster
from preprocess.validate.job import Settings, find_jobs, run_jobs
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.job import ValidatedSession
    from preprocess.validate.page import ReportPage
    from preprocess.validate.probe import Depth


def validated(
    *locations: Path | str,
    recipe: Recipe | None = None,
    depth: Depth = "full",
    fix: bool = False,
    force: bool = False,
    verdicts_at: str | None = None,
    page: ReportPage | None = None,
    cluster: Cluster | None = None,
) -> list[ValidatedSession]:
    """Validate everything at some locations, by default in this process."""
    recipe = Recipe() if recipe is None else recipe
    console = Console(file=io.StringIO())
    cluster = cluster or Cluster(scheduler=None, num_workers=0, console=console)
    jobs = find_jobs([str(location) for location in locations], recipe, verdicts_at=verdicts_at)
    settings = Settings(
        recipe=recipe, depth=depth, force=force, fix=fix, wants_page=page is not None
    )
    return [*run_jobs(jobs, settings, cluster=cluster, page=page)]
