"""The report as one HTML page (``preprocess validate --report FILE.html``).

Everything is inside the file: styles, SVG, pictures as data URIs; it needs no network and no
script. Every session is rendered when it is judged and kept on disk until all are, so that memory
does not grow with their number. The page appears under its name only when it is whole.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from preprocess.validate.axes import PLOT_WIDTH, say_time
from preprocess.validate.figures import draw_session
from shared.recipe import STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from preprocess.validate.figures import Figures
    from preprocess.validate.probe import SessionProbe
    from preprocess.validate.validate import Report

LEFT_MARGIN = 132
"""DiskQuota for labels left of what has a time, in SVG units."""

RIGHT_MARGIN = 158

_SILENT_DBFS = -120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """A session in the table on top."""

    anchor: str
    session: str
    status: str
    length: str
    cells: list[tuple[str, str]]
    """Per stream of STREAMS: a class (full, part, none, wrong) and a word."""
    num_errors: int
    num_warnings: int
    message: str


class ReportPage:
    """A page that sessions are added to; written when the ``with`` block ends well.

    Args:
        path: the file; its folder is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[SummaryRow] = []
        self._length_s = 0.0
        self._lengths_bytes: list[int] = []
        self._environment = Environment(
            loader=PackageLoader("preprocess.validate", package_path=""),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._sections: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Make the folder, so that a wrong path shows at once.

        Raises:
            OSError: the folder can't be made or written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._sections = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the page, unless an error ends the block.

        Raises:
            OSError: it can't be written.
        """
        assert self._sections is not None
        with self._sections:
            if kind is None:
                self._write(self._sections)

    def add(self, folder: Path, report: Report, evidence: SessionProbe | None) -> None:
        """Add a session.

        Args:
            folder: the session folder.
            report: the verdict.
            evidence: what was read of it; None where that was not possible.

        Raises:
            OSError: the disk is full.
        """
        assert self._sections is not None
        figures, problem = None, ""
        if evidence is not None:
            try:
                figures = draw_session(folder, evidence)
            except Exception as failure:  # a border as in validate: the verdict is still shown
                problem = f"its pictures can't be drawn: {type(failure).__name__}: {failure}"
        anchor = f"session-{len(self._rows) + 1}"
        html = self._environment.get_template("section.html.j2").render(
            anchor=anchor,
            report=report,
            facts=_facts(report),
            figures=figures,
            problem=problem,
            left=LEFT_MARGIN,
            width=PLOT_WIDTH,
            total_width=LEFT_MARGIN + PLOT_WIDTH + RIGHT_MARGIN,
        )
        self._lengths_bytes.append(self._sections.write(html.encode("utf-8", "backslashreplace")))
        self._rows.append(_summary_row(anchor, report, figures))
        self._length_s += report.stats.get("length_s", 0.0)

    def _write(self, sections: IO[bytes]) -> None:
        """Put the page together, the sections one by one."""
        sections.seek(0)
        template = self._environment.get_template("page.html.j2")
        stream = template.stream(
            rows=self._rows,
            totals=self._totals(),
            streams=[stream.value for stream in STREAMS],
            sections=self._read_sections(sections),
        )
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                stream.dump(file, encoding="utf-8", errors="backslashreplace")
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)

    def _read_sections(self, sections: IO[bytes]) -> Iterator[str]:
        for length_bytes in self._lengths_bytes:
            yield sections.read(length_bytes).decode()

    def _totals(self) -> str:
        counts = Counter(row.status for row in self._rows)
        words = {"failed": "failed", "warnings": "with warnings", "passed": "passed"}
        found = [f"{counts[status]} {word}" for status, word in words.items() if counts[status]]
        number = "1 session" if len(self._rows) == 1 else f"{len(self._rows)} sessions"
        length = say_time(self._length_s, step_s=0.1)
        return f"{number}, {length}: {', '.join(found) or 'nothing to judge'}"


def _summary_row(anchor: str, report: Report, figures: Figures | None) -> SummaryRow:
    """A session's row of the table on top."""
    rows = {row.name: row for row in figures.rows} if figures else {}
    cells: list[tuple[str, str]] = []
    for stream in STREAMS:
        row = rows.get(stream.value)
        if row is None:
            cells.append(("none", "?"))
        elif row.state == "absent":
            cells.append(("none", "-"))
        elif row.state != "recorded":
            cells.append(("wrong", row.state))
        else:
            is_full = row.share > 0.995 and not row.flaws
            cells.append(("full" if is_full else "part", f"{math.floor(row.share * 100 + 0.5)}%"))
    messages = (*report.errors, *report.warnings, "")
    length_s = report.stats.get("length_s")
    return SummaryRow(
        anchor=anchor,
        session=report.session,
        status=report.status,
        length="-" if length_s is None else say_time(length_s, step_s=0.1),
        cells=cells,
        num_errors=len(report.errors),
        num_warnings=len(report.warnings),
        message=messages[0],
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """What a session is made of, as (word, value)."""
    stats = report.stats
    if "length_s" not in stats:
        return []
    facts = [("length", say_time(stats["length_s"]))]
    if stats["clock_offset_s"]:
        facts.append(("clock offset", f"{stats['clock_offset_s']:.3f} s"))
    for name, video in stats["video"].items():
        size = f"{video['codec']} {video['width']}x{video['height']}, {video['frames']} frames"
        start_s, stop_s = stats["streams"][name]
        rate = f", {video['frames'] / (stop_s - start_s):.1f} fps" if stop_s > start_s else ""
        facts.append((name, size + rate))
    if "audio" in stats:
        audio = stats["audio"]
        levels = f"RMS {_say_db(audio['rms'])}, peak {_say_db(audio['peak'])}"
        facts.append(("audio", f"{levels}, {audio['clipped_samples']} samples clipped"))
    facts += [(file, f"{count} lines") for file, count in stats["lines"].items() if count]
    if "gaps" in stats:
        gaps = stats["gaps"]
        median_s = gaps["median_s"]
        rate = f"{1 / median_s:.1f} Hz, " if median_s > 0 else ""
        facts.append(("lines apart", f"{rate}longest gap {gaps['longest_s']:.3f} s"))
    return facts


def _say_db(level: float) -> str:
    """A level of full scale 1 in dBFS."""
    level_db = 20 * math.log10(level) if level > 0 else _SILENT_DBFS
    return f"{level_db:.1f} dBFS" if level_db > _SILENT_DBFS else "silent"
