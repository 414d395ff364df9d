"""Write the validation report as one HTML page (``preprocess validate --report FILE.html``).

The file contains its styles, SVG, and pictures; it needs no network and no script. Each session is
rendered when it is checked and kept on disk until the page is complete, so that memory does not
grow with the number of sessions. The page appears under its name only when it is complete.
"""

from __future__ import annotations

import math
import tempfile
from typing import IO, TYPE_CHECKING, Any

from preprocess.validate.panels import draw_session
from preprocess.validate.report import describe_stream, describe_totals
from shared.files import write_atomic
from shared.page import PLOT_WIDTH, format_time, page_environment

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from preprocess.validate.panels import SessionPanels
    from preprocess.validate.report import CheckedSession, ValidationReport

LEFT_MARGIN = 132
"""Room for labels left of the time axis, in SVG units."""

RIGHT_MARGIN = 158


class ReportPage:
    """A page that sessions are added to; written when the ``with`` block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._duration_s = 0.0
        self._lengths_bytes: list[int] = []
        self._environment = page_environment("preprocess.validate")
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

    def add(self, checked: CheckedSession) -> None:
        """Add a session.

        Raises:
            OSError: the disk is full.
        """
        assert self._sections is not None
        report = checked.report
        panels, problem = None, ""
        if checked.probe is not None:
            try:
                panels = draw_session(checked.folder, checked.probe)
            except Exception as error:  # Boundary, as in check_session: the report is still shown.
                problem = f"its panels cannot be drawn: {type(error).__name__}: {error}"
        anchor = f"session-{len(self._rows) + 1}"
        html = self._environment.get_template("section.html.j2").render(
            anchor=anchor,
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
        self._lengths_bytes.append(self._sections.write(html.encode("utf-8", "backslashreplace")))
        self._rows.append(_summary_row(anchor, report, panels))
        self._duration_s += report.stats.get("length_s", 0.0)

    def _write(self, sections: IO[bytes]) -> None:
        """Write the page, one section after the other."""
        sections.seek(0)
        template = self._environment.get_template("page.html.j2")
        stream = template.stream(
            rows=self._rows,
            totals=describe_totals(
                [row["status"] for row in self._rows],
                format_time(self._duration_s, resolution_s=0.1),
            ),
            streams=list(dict.fromkeys(name for row in self._rows for name in row["cells"])),
            sections=(sections.read(length).decode() for length in self._lengths_bytes),
        )
        write_atomic(
            self._path, lambda file: stream.dump(file, encoding="utf-8", errors="backslashreplace")
        )


def _summary_row(
    anchor: str, report: ValidationReport, panels: SessionPanels | None
) -> dict[str, Any]:
    """Return a session's row of the table at the top.

    Each declared stream has a cell: its CSS class (full, part, none, wrong) and its text.
    """
    timelines = {timeline.name: timeline for timeline in panels.timelines} if panels else {}
    cells: dict[str, tuple[str, str]] = {}
    for name, status in report.streams.items():
        timeline = timelines.get(name)
        if timeline is None:
            cells[name] = ("none", "?")
        elif timeline.state == "absent":
            cells[name] = ("none", "-")
        elif timeline.state != "recorded":
            cells[name] = ("wrong", timeline.state)
        else:
            percent = f"{math.floor(timeline.share * 100 + 0.5)}%"
            is_full = timeline.share > 0.995 and not timeline.flaws and status == "passed"
            style = "wrong" if status == "failed" else "full" if is_full else "part"
            cells[name] = (style, percent)
    messages = (*report.errors, *report.warnings, "")
    duration_s = report.stats.get("length_s")
    return {
        "anchor": anchor,
        "session": report.session,
        "status": report.status,
        "length": "-" if duration_s is None else format_time(duration_s, resolution_s=0.1),
        "cells": cells,
        "num_errors": len(report.errors),
        "num_warnings": len(report.warnings),
        "message": messages[0],
    }


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
