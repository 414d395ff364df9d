"""Write the validation report as one HTML page (``preprocess validate --report FILE.html``).

The file contains its styles, SVG, and pictures; it needs no network and no script. Each session is
rendered when it is checked and kept on disk until the page is complete, so that memory does not
grow with the number of sessions. The page appears under its name only when it is complete.
"""

from __future__ import annotations

import functools
import math
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from preprocess.validate.panels import draw_session
from preprocess.validate.report import describe_stream, describe_totals
from shared.files import write_atomic
from shared.page import PLOT_WIDTH, format_time, page_environment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from jinja2 import Environment

    from preprocess.validate.report import CheckedSession, ValidationReport

LEFT_MARGIN = 132
"""Room for labels left of the time axis, in SVG units."""

RIGHT_MARGIN = 158


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedSession:
    """A session as the page shows it; a plain value that can be sent between processes."""

    row: Mapping[str, Any]
    """Its row of the table at the top; plain JSON values, see :func:`summary_row`."""
    html: bytes
    """Its section."""


def render_session(checked: CheckedSession) -> RenderedSession:
    """Render a session, with pictures of its files; runs in any process."""
    report = checked.report
    panels, problem = None, ""
    if checked.probe is not None:
        try:
            panels = draw_session(checked.folder, checked.probe)
        except Exception as error:  # Boundary, as in check_session: the report is still shown.
            problem = f"its panels cannot be drawn: {type(error).__name__}: {error}"
    html = (
        _environment()
        .get_template("section.html.j2")
        .render(
            report=report,
            properties=_describe_session(report),
            streams=[
                (name, report.streams[name], measured["kind"], describe_stream(measured))
                for name, measured in report.stats.get("streams", {}).items()
            ],
            panels=panels,
            problem=problem,
            left=LEFT_MARGIN,
            width=int(PLOT_WIDTH),
            total_width=int(LEFT_MARGIN + PLOT_WIDTH + RIGHT_MARGIN),
        )
    )
    return RenderedSession(row=summary_row(report), html=html.encode("utf-8", "backslashreplace"))


class ReportPage:
    """A page that sessions are added to; written when the ``with`` block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._lengths_bytes: list[int] = []
        self._sections: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Create the folder, so that a wrong path fails at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._sections = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Write the page, unless an error ends the block."""
        assert self._sections is not None
        with self._sections:
            if kind is None:
                self._write(self._sections)

    def has_details(self, session: str, key: str) -> bool:
        """Return whether an earlier page has the details of this session that a key stands for.

        The key names everything that the details depend on but this program: content and report.
        """
        return False

    def keep(self, report: ValidationReport, key: str) -> None:
        """Add a session whose details :meth:`has_details`, without reading it again."""
        raise NotImplementedError

    def add(self, rendered: RenderedSession, key: str = "") -> None:
        """Add a session, with a key by which a later page may find its details.

        Raises:
            OSError: the disk is full.
        """
        assert self._sections is not None
        self._lengths_bytes.append(self._sections.write(rendered.html))
        self._rows.append(rendered.row)

    def _write(self, sections: IO[bytes]) -> None:
        """Write the page, one section after the other."""
        sections.seek(0)
        stream = (
            _environment()
            .get_template("page.html.j2")
            .stream(
                rows=self._rows,
                totals=describe_totals(
                    [row["status"] for row in self._rows],
                    _format_length(sum(row["length_s"] or 0.0 for row in self._rows)),
                ),
                streams=list(dict.fromkeys(name for row in self._rows for name in row["cells"])),
                sections=(sections.read(length).decode() for length in self._lengths_bytes),
                format_length=_format_length,
            )
        )
        write_atomic(
            self._path, lambda file: stream.dump(file, encoding="utf-8", errors="backslashreplace")
        )


@functools.cache
def _environment() -> Environment:
    return page_environment("preprocess.validate")


def summary_row(report: ValidationReport) -> dict[str, Any]:
    """Return a session's row of the table at the top, from its report alone.

    Each declared stream has a cell: its CSS class (full, part, none, wrong) and its text.
    """
    return {
        "session": report.session,
        "status": report.status,
        "length_s": report.stats.get("length_s"),
        "cells": {name: _cell(name, report) for name in report.streams},
        "num_errors": len(report.errors),
        "num_warnings": len(report.warnings),
        "message": next(iter((*report.errors, *report.warnings)), ""),
    }


def _cell(name: str, report: ValidationReport) -> tuple[str, str]:
    """Return class and text of a stream's cell."""
    measured, status = report.stats.get("streams", {}).get(name), report.streams[name]
    if measured is None:
        state = report.stats.get("absent_states", {}).get(name, "?")
        return {"absent": ("none", "-"), "?": ("none", "?")}.get(state, ("wrong", state))
    share = measured["share_used"]
    is_full = share > 0.995 and not measured["flaws"] and status == "passed"
    style = "wrong" if status == "failed" else "full" if is_full else "part"
    return style, f"{math.floor(share * 100 + 0.5)}%"


def _format_length(duration_s: float | None) -> str:
    return "-" if duration_s is None else format_time(duration_s, resolution_s=0.1)


def _describe_session(report: ValidationReport) -> list[tuple[str, str]]:
    """Return the properties of a session as (name, value)."""
    stats = report.stats
    if "length_s" not in stats:
        return []
    properties = [("length", format_time(stats["length_s"]))]
    if stats["clock_offset_s"]:
        properties.append(("clock offset", f"{stats['clock_offset_s']:.3f} s"))
    properties += [(file, f"{count} lines") for file, count in stats["lines"].items() if count]
    return properties
