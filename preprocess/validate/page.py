"""Write the validation report as an HTML page (``preprocess validate --report FILE.html``).

::

    CheckedSession -> render_session (in a worker) -> RenderedSession -> ReportPage.add

A page of a few sessions contains its styles, SVG, and pictures, and needs no script. A page of many
is a table that a script draws and filters; the details of each session are in a file of their own
in a folder beside it, which is loaded when it is opened. Neither needs a network. The page appears
under its name only when it is complete.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from preprocess.validate.panels import draw_session
from preprocess.validate.report import CheckedSession, describe_stream, describe_totals
from shared.files import fingerprint_of, sha256_of_bytes, temporary_path, write_atomic
from shared.machine import naming_path
from shared.page import PLOT_WIDTH, format_time, page_environment, printable_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Self

    from jinja2 import Environment

    from preprocess.validate.report import ValidationReport

LEFT_MARGIN = 132
"""Room for labels left of the time axis, in SVG units."""

RIGHT_MARGIN = 158

SESSIONS_INLINE = 50
"""A page of at most this many sessions is one file: about 20 MB."""

DETAILS_VERSION = 1
"""Raised when details are drawn differently; files of another version are written again."""

_FIRST_COLUMNS = ("session", "status", "length")
_LAST_COLUMNS = ("drift ppm", "errors", "warnings", "first message")
_STREAM = "stream "
"""Start of the names of the columns between them, one for each stream."""

_KINDS: Mapping[str, str] = {"passed": "full", "failed": "wrong"}
_MESSAGE_CHARS = 160
_MARK = b"<!-- preprocess validate: details of a session -->\n"
"""Start of each file with details; no other file is ever removed."""

_PANELS = b"<!-- panels -->"
_SECTION_START = '<section class="card" id="session-1">\n'


Cell = tuple[str, str, float]
"""CSS class (full, part, none, wrong or empty), text, and a number by which cells are ordered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedSession:
    """A session as the page shows it; a plain value that can be sent between processes."""

    row: Mapping[str, Cell]
    """Its row of the table at the top: the cell of each column, see :func:`summary_row`."""
    html: bytes
    """Its section."""


def render_session(checked: CheckedSession) -> RenderedSession:
    """Render a session, with pictures of its files; runs in any process."""
    panels, problem, report = None, "", checked.report
    if checked.probe is not None:
        try:
            panels = draw_session(checked.folder, checked.probe)
        except Exception as error:  # Boundary, as in check_session: the report is still shown.
            problem = f"its panels cannot be drawn: {type(error).__name__}: {error}"
    template = _environment().get_template("section.html.j2")
    html = template.render(
        report=report,
        describe_stream=describe_stream,
        format_time=format_time,
        panels=panels,
        problem=problem,
        left=LEFT_MARGIN,
        width=int(PLOT_WIDTH),
        total_width=int(LEFT_MARGIN + PLOT_WIDTH + RIGHT_MARGIN),
    )
    return RenderedSession(row=summary_row(report), html=html.encode("utf-8", "backslashreplace"))


class ReportPage:
    """A page that sessions are added to; written when the ``with`` block ends without an error.

    The details of more than SESSIONS_INLINE sessions are in files of a folder beside the page. A
    file's name has a hash of what the file was made from, so an earlier page keeps its files until
    this one is complete, and a run that was interrupted goes on with those it wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.with_name(f"{path.name.removesuffix('.html')}_files")
        self._present: frozenset[str] = frozenset()
        self._rows: dict[int, Mapping[str, Cell]] = {}
        self._files: dict[int, str] = {}
        self._amended: dict[int, str] = {}
        self._sections: dict[str, RenderedSession] = {}

    def __enter__(self) -> Self:
        """Create the page's folder and list the earlier details; a wrong path fails at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            # A power cut can leave empty files.
            self._present = frozenset(e.name for e in entries if e.stat().st_size)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Write the page, unless an error ends the block."""
        if kind is None:
            self._write()

    def has_details(self, session: str, key: str) -> bool:
        """Return whether details of the content and verdict that a key names exist already."""
        return _file_name(session, key) in self._present

    def keep(self, report: ValidationReport, key: str, *, number: int | None = None) -> None:
        """Add a session whose details exist; see :meth:`add`."""
        number = len(self._rows) if number is None else number
        self._rows[number] = summary_row(report)
        self._files[number] = _file_name(report.session, key)

    def add(self, rendered: RenderedSession, key: str = "", *, number: int | None = None) -> None:
        """Add a session; with a key, a later page can keep its details.

        Sessions are in order of their numbers, by default that of the calls.
        """
        name = _file_name(rendered.row["session"][1], key or sha256_of_bytes(rendered.html))
        number = len(self._rows) if number is None else number
        self._rows[number], self._files[number] = rendered.row, name
        self._sections[name] = rendered
        self._flush()

    def amend(self, reports: Mapping[int, ValidationReport]) -> None:
        """Replace the reports of these numbers, as of late findings; their panels stay."""
        for number, report in reports.items():
            rendered = render_session(CheckedSession(folder=self._folder, report=report))
            said, mark, _ = rendered.html.partition(_PANELS)
            panels = self._read_section(self._files[number]).encode().partition(_PANELS)[2]
            name = _file_name(report.session, sha256_of_bytes(said + panels))
            self._rows[number], self._amended[number] = rendered.row, name
            self._sections[name] = replace(rendered, html=said + mark + panels)
            self._flush()

    def _flush(self) -> None:
        """Write the sections in memory to files if there are many sessions; without a sync."""
        while self._sections and len(self._rows) > SESSIONS_INLINE:
            name, rendered = self._sections.popitem()
            sections, title = [rendered.html.decode()], rendered.row["session"][1]
            self._folder.mkdir(exist_ok=True)
            path = self._folder / name
            with naming_path(path):
                page = _render_page({"sections": sections, "title": title})
                temporary_path(path).write_bytes(_MARK + b"".join(page))
                temporary_path(path).replace(path)

    def _read_section(self, name: str) -> str:
        """Return the section of a session from memory, or from its file."""
        if name in self._sections:
            return self._sections[name].html.decode()
        page = (self._folder / name).read_text("utf-8")
        return page.partition(_SECTION_START)[2].rpartition("\n</section>")[0]

    def _write(self) -> None:
        """Write the page, and remove the details of sessions that are not on it."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        statuses: list[Any] = [row["status"][1] for row in rows]
        length = _format_length(sum(row["length"][2] for row in rows))
        totals = describe_totals(statuses, length)
        files = [self._amended.get(number, self._files[number]) for number in sorted(self._files)]
        folder = quote(os.fsencode(self._folder.name))
        table = {"folder": folder, "files": files, "columns": _columns(rows)}
        values: dict[str, Any] = {"title": f"Sessions: {totals}", "totals": totals, "table": table}
        used: set[str] = set()
        if len(files) <= SESSIONS_INLINE:
            values["sections"] = (self._read_section(name) for name in files)
        else:
            self._flush()
            used = {*files, *self._files.values()}
            script = (Path(__file__).parent / "index.js").read_bytes()
            digest = base64.b64encode(hashlib.sha256(script).digest()).decode("ascii")
            values |= {"script": script.decode(), "script_hash": f"sha256-{digest}"}
        write_atomic(self._path, lambda file: file.writelines(_render_page(values)))
        self._remove(self._present - used)

    def _remove(self, names: Iterable[str]) -> None:
        """Remove files of earlier pages, no others, and the folder if it is empty."""
        for path in map(self._folder.joinpath, names):
            with contextlib.suppress(OSError), path.open("rb") as file:  # a folder, for instance
                if file.read(len(_MARK)) == _MARK:
                    path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _file_name(session: str, key: str) -> str:
    """Name the file with a session's details: safe in any file system and in a link."""
    readable = re.sub("[^A-Za-z0-9_-]", "_", session)[:60]
    return f"{readable}-{fingerprint_of(session, key, DETAILS_VERSION)[:16]}.html"


def _render_page(values: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield a page in parts: the table of all sessions, sections, or both."""
    template = _environment().get_template("page.html.j2")
    for part in template.generate({"table": None, "script": "", "sections": (), **values}):
        yield part.encode("utf-8", "backslashreplace")


def _columns(rows: Sequence[Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """Return the table by columns; a row of a column is the number of one of its distinct cells."""
    streams = dict.fromkeys(name for row in rows for name in row if name.startswith(_STREAM))
    columns = []
    for name in (*_FIRST_COLUMNS, *streams, *_LAST_COLUMNS):
        cells: dict[Cell, int] = {}
        numbers = [cells.setdefault(row.get(name, ("none", "", -1)), len(cells)) for row in rows]
        style, _, stream = name.partition(" ")
        title = stream if name in streams else name
        columns.append({"name": title, "style": style, "rows": numbers, "cells": list(cells)})
    return columns


@functools.cache
def _environment() -> Environment:
    environment = page_environment("preprocess.validate")
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def summary_row(report: ValidationReport) -> dict[str, Cell]:
    """Return a session's row of the table at the top, from its report alone."""
    length_s, num_errors = report.stats.get("length_s"), len(report.errors)
    num_warnings = len(report.warnings)
    clocks = [c for c in report.stats.get("clocks", {}).values() if c.get("method") != "length"]
    drift_ppm = max((abs(clock.get("drift_ppm", 0.0)) for clock in clocks), default=0.0)
    message = printable_line((*report.errors, *report.warnings, "")[0], max_chars=_MESSAGE_CHARS)
    return {
        "session": ("", report.session, 0),
        "status": (_KINDS.get(report.status, "part"), report.status, 0),
        "length": ("", _format_length(length_s), round(length_s or 0.0, 1)),
        **{_STREAM + name: _stream_cell(name, report) for name in report.streams},
        "drift ppm": ("", f"{drift_ppm:.0f}" if drift_ppm else "", round(drift_ppm)),
        "errors": ("", str(num_errors or ""), num_errors),
        "warnings": ("", str(num_warnings or ""), num_warnings),
        "first message": ("", message, 0),
    }


def _stream_cell(name: str, report: ValidationReport) -> Cell:
    measured, status = report.stats.get("streams", {}).get(name), report.streams[name]
    if measured is None:
        state = report.stats.get("absent_states", {}).get(name, "?")
        kind = "none" if state in ("absent", "?") else "wrong"
        return kind, "-" if state == "absent" else state, -1
    share = measured["share_used"]
    is_full = share > 0.995 and not measured["flaws"] and status == "passed"
    kind = "wrong" if status == "failed" else "full" if is_full else "part"
    percent = math.floor(share * 100 + 0.5)
    return kind, f"{percent}%", percent


def _format_length(duration_s: float | None) -> str:
    return "-" if duration_s is None else format_time(duration_s, resolution_s=0.1)
