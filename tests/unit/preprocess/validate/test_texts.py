"""Texts of the report page: at their times, readable, beside each other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from helpers.report_pages import page_of, panel
from helpers.sessions import (
    write_lines,
)

from preprocess.validate.texts import readable

if TYPE_CHECKING:
    from pathlib import Path


def test_text_events_are_marks_at_their_times_with_their_words(session: Path) -> None:
    page = page_of(session)
    lane = panel(page, "external_text")
    (mark,) = lane.all("rect", data_mark="event")
    assert mark.number("x") + mark.number("width") / 2 == pytest.approx(1.4 / 2.0 * 1000, abs=0.1)
    assert "got it" in lane.text
    cells = [[c.text for c in r.all("td")] for r in page.all("table", class_="texts")[0].all("tr")]
    assert cells[1:] == [
        ["0.20 s", "internal_text", "reach"],
        ["1.40 s", "external_text", "got it"],
    ]


def test_labels_of_texts_that_crowd_do_not_overlap(session: Path) -> None:
    texts = [
        {"timestamp": i * 0.05, "stream": "internal", "text": f"a thought of number {i}"}
        for i in range(30)
    ]
    write_lines(session / "text.jsonl", texts)
    lane = panel(page_of(session), "internal_text")
    spans: dict[str, list[tuple[float, float]]] = {}
    for label in lane.all("text", class_="words"):
        x, width = label.number("x"), 6.7 * len(label.text)
        is_end = label.attributes["text-anchor"] == "end"
        span = (x - width, x) if is_end else (x, x + width)
        spans.setdefault(label.attributes["y"], []).append(span)
    for row_spans in spans.values():
        ordered = sorted(row_spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
    assert len(lane.all("rect", data_mark="event")) == 30


def test_control_characters_of_a_text_are_written_out() -> None:
    assert readable("a\u202eb\x00\n c", max_chars=50) == "a\\u202eb\\u0000 c"
    assert readable("word " * 9, max_chars=10) == "word wo..."
