"""Reports as tables and lines of JSON."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from rich.console import Console

from preprocess.validate.console import has_failed, print_report, print_summary, to_json_lines
from preprocess.validate.report import ValidationReport

if TYPE_CHECKING:
    from collections.abc import Callable


def _printed(show: Callable[[Console], None]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=200))
    return out.getvalue()


def _report(
    name: str, *, errors: tuple[str, ...] = (), warnings: tuple[str, ...] = ()
) -> ValidationReport:
    stats = {"length_s": 61.0, "streams": {"audio": {"start_s": 0, "stop_s": 61}}}
    return ValidationReport(session=name, errors=errors, warnings=warnings, stats=stats)


REPORTS = [
    _report("s1"),
    _report("s2", warnings=("touch[3] is off [0, 1]; fix",)),
    _report("s3", errors=("audio.wav: [red]broken[/red]; fix",)),
]


def test_the_summary_is_one_table_and_totals() -> None:
    text = _printed(lambda console: print_summary(console, REPORTS))
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [
        ["s1", "passed"],
        ["s2", "warnings"],
        ["s3", "failed"],
    ]
    assert text.splitlines()[-1] == "3 sessions, 3:03 min: 1 passed, 1 with warnings, 1 failed"


def test_brackets_in_messages_are_printed_as_they_are() -> None:
    text = _printed(lambda console: [print_report(console, r) for r in REPORTS] and None)
    assert "touch[3] is off [0, 1]" in text
    assert "[red]broken[/red]" in text


def test_json_lines_are_the_reports_as_dictionaries() -> None:
    assert [json.loads(line) for line in to_json_lines(REPORTS)] == [r.as_dict() for r in REPORTS]
    assert set(REPORTS[0].as_dict()) == {
        "session", "status", "checks", "streams", "warnings", "errors", "notes", "stats",
    }  # fmt: skip


def test_strict_counts_warnings_as_failures() -> None:
    assert not has_failed(REPORTS[:2], strict=False)
    assert has_failed(REPORTS[:2], strict=True)
    assert has_failed(REPORTS, strict=False)
    assert not has_failed(REPORTS[:1], strict=True)
