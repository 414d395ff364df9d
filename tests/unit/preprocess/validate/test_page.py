"""The report page, read with the standard library's parser: complete, bounded, escaped, true."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.report_pages import (
    RECIPE,
    default_recipe,
    messages,
    panel,
    parse,
    render_page,
)
from helpers.sessions import (
    read_lines,
    write_lines,
)

import preprocess.validate.page
from preprocess.__main__ import cli
from preprocess.validate.page import ReportPage, render_session
from preprocess.validate.report import check_session
from shared.streams import DEFAULT_STREAMS

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
NASTY_NAMES = {"video": "vision_left.mp4", "audio": "audio.wav", "other": "metadata.jsonl"}


def test_every_session_has_a_row_that_links_to_its_section(whole: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("ann", "bob", "cat")]
    page = render_page(*folders)
    links = [(e.attributes["href"], e.text) for e in page.all("table", id="summary")[0].all("a")]
    sections = [("#" + e.attributes["id"], e.all("h2")[0].text) for e in page.all("section")]
    assert links == sections == [(f"#session-{i + 1}", f.name) for i, f in enumerate(folders)]


def test_messages_are_those_of_validate(session: Path) -> None:
    lines = read_lines(session / "metadata.jsonl")
    lines[9]["touch"][1] = 3.0
    write_lines(session / "metadata.jsonl", lines[:20] + lines[22:])
    report = check_session(session, recipe=RECIPE).report
    assert report.errors
    assert report.warnings
    expected = [f"error{m}" for m in report.errors] + [f"warning{m}" for m in report.warnings]
    assert messages(render_page(session)) == expected


def test_every_stream_has_its_row_and_every_reading_its_panel(session: Path) -> None:
    shutil.copyfile(session / "vision_left.mp4", session / "vision_right.mp4")
    page = render_page(session, recipe=default_recipe())
    panels = [e.attributes["data-panel"] for e in page.all("svg") if "data-panel" in e.attributes]
    assert panels == [
        "timeline",
        "external_text",
        "internal_text",
        "vision_left",
        "vision_right",
        "audio.waveform",
        "audio.level",
        "proprio.angle",
        "proprio.velocity",
        "touch",
    ]
    curves = {name: len(panel(page, name).all("path")) for name in panels[-3:]}
    assert curves == {"proprio.angle": 10, "proprio.velocity": 10, "touch": 5}
    rows = [e.attributes["data-row"] for e in page.all("g") if "data-row" in e.attributes]
    assert rows == sorted(DEFAULT_STREAMS)


def test_hostile_texts_and_names_are_escaped(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "<script>alert(1)<b onload=x>&amp;"))
    texts = [
        {"timestamp": t, "stream": s, "text": HOSTILE}
        for t, s in ((0.1, "internal"), (0.5, "external"), (99.0, "external"))
    ]
    texts.append({"timestamp": 1.0, "stream": "<svg onload=alert(3)>", "text": "x"})
    write_lines(folder / "text.jsonl", texts)
    page = render_page(folder)
    assert page.all("script") == page.all("img") == page.all("b", onload="x") == []
    assert not [e for e in page.walk() for name in e.attributes if name.startswith("on")]
    assert page.all("h2")[0].text == folder.name
    assert page.all("table", class_="texts")[0].text.count(HOSTILE) == 3


def test_a_page_asks_for_nothing_from_outside(session: Path) -> None:
    page = render_page(session)
    links = [
        value
        for e in page.walk()
        for name, value in e.attributes.items()
        if name in ("href", "src", "xlink:href", "action")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert page.all("link") == page.all("script") == page.all("iframe") == []
    assert re.findall(r"url\(([^)]*)\)|@import", page.all("style")[0].text) == ["#hatch"]


def test_a_session_that_cannot_be_checked_has_its_section(tmp_path: Path) -> None:
    page = render_page(tmp_path / "nowhere")
    assert "no such folder" in messages(page)[0]


def test_a_session_that_cannot_be_drawn_keeps_its_report(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(preprocess.validate.page, "draw_session", explode)
    assert messages(render_page(session)) == [
        "passedno errors, no warnings",
        "reportits panels cannot be drawn: RuntimeError: boom",
    ]


def test_files_that_vanish_after_the_checks_leave_a_note(session: Path, tmp_path: Path) -> None:
    checked = check_session(session, recipe=RECIPE)
    (session / "audio.wav").unlink()
    (session / "vision_left.mp4").unlink()
    with ReportPage(tmp_path / "page.html") as page:
        page.add(render_session(checked))
    text = parse(tmp_path / "page.html").text
    assert "audio.wav: no picture of audio" in text
    assert "vision_left.mp4: no picture of vision_left" in text


@pytest.mark.parametrize(
    "lines",
    [
        [{"timestamp": 0.0, "proprio": [0.0] * 20}],
        [{"timestamp": t, "touch": [0.5] * 5} for t in (0.0, 1e9)],
        [{"timestamp": t, "touch": [3e38, -3e38, 0, 0, 0]} for t in (0.0, 0.01)],
        [{"timestamp": -5.0 + t, "touch": [0.5] * 5} for t in (0.0, 0.5, 9.0)],
        [{"timestamp": i * 0.2, "proprio": [float(i)] * 20} for i in range(50)],
    ],
)
def test_unusual_lines_are_drawn(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    write_lines(folder / "metadata.jsonl", lines)
    page = render_page(folder)
    assert not any(m.startswith("report") for m in messages(page))
    numbers = [v for e in page.walk() for k, v in e.attributes.items() if k in ("x", "y", "d")]
    assert not [n for n in numbers if re.search("nan|inf", n)]


def test_every_nasty_file_has_its_section(nasty_files: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for name, path in nasty_files.items():
        folders.append(tmp_path / name.replace("/", "_"))
        folders[-1].mkdir()
        shutil.copyfile(path, folders[-1] / NASTY_NAMES[name.split("/")[0]])
    page = render_page(*folders)
    assert [e.all("h2")[0].text for e in page.all("section")] == [f.name for f in folders]
    assert not any(m.startswith("report") for m in messages(page))
    assert not page.all("div", class_="note")
    for section, folder in zip(page.all("section"), folders, strict=True):
        report = check_session(folder, recipe=RECIPE).report
        assert len(section.all("li", class_="error")) == len(report.errors)


def test_every_real_session_is_drawn_whole(real_sessions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with ReportPage(path) as page:
        sessions = [check_session(folder, recipe=RECIPE) for folder in real_sessions]
        for checked in sessions:
            page.add(render_session(checked))
    parsed = parse(path)
    for section, checked in zip(parsed.all("section"), sessions, strict=True):
        panels = {e.attributes.get("data-panel") for e in section.all("svg")} - {None}
        streams = checked.report.stats["streams"]
        assert ("audio.waveform" in panels) == ("audio" in streams)
        assert ("proprio.angle" in panels) == ("proprio" in streams)
        assert len(section.all("image")) == 10 * ("vision_left" in streams)
    assert path.stat().st_size < 2e6 * len(real_sessions)


def test_a_section_of_a_crowded_long_session_stays_small(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = [
        {"timestamp": i * 0.05, "touch": t, "proprio": p}
        for i, (t, p) in enumerate(
            zip(
                generator.random((20_000, 5)).round(3).tolist(),
                generator.normal(size=(20_000, 20)).round(3).tolist(),
                strict=True,
            )
        )
        if i % 10 > 2
    ]
    write_lines(folder / "metadata.jsonl", lines)
    texts = [
        {"timestamp": i * 0.4, "stream": ("internal", "external")[i % 2], "text": "<&>\"'" * 99}
        for i in range(2500)
    ]
    write_lines(folder / "text.jsonl", texts)
    render_page(folder)
    assert (tmp_path / "page" / "report.html").stat().st_size < 2e6


def test_the_command_writes_the_page_and_keeps_its_exit_code(session: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    result = CliRunner().invoke(cli, ["validate", str(session), "--report", str(path)])
    assert result.exit_code == 0, result.output
    assert len(parse(path).all("section")) == 1
    (session / "vision_left.mp4").unlink()
    result = CliRunner().invoke(cli, ["validate", str(session), "--report", str(path)])
    assert result.exit_code == 1
    assert "required stream vision_left" in parse(path).text


def test_an_error_leaves_the_old_page_and_nothing_else(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preprocess.validate.page.ReportPage.add", fail)
    result = CliRunner().invoke(cli, ["validate", str(session), "--report", str(path)])
    assert result.exit_code == 3
    assert "No space left" in result.output
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_missing_folder_has_its_section_among_the_others(session: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    args = ["validate", str(session), str(tmp_path / "nowhere"), str(session)]
    result = CliRunner().invoke(cli, [*args, "--report", str(path)])
    assert result.exit_code == 1
    assert len(parse(path).all("section")) == 3
    assert "nowhere: no such folder" in parse(path).text
