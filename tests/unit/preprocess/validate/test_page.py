"""The report page, read with the standard library's parser: complete, bounded, escaped, true."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

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
from preprocess.validate.page import (
    SESSIONS_INLINE,
    RenderedSession,
    ReportPage,
    render_session,
    summary_row,
)
from preprocess.validate.report import CheckedSession, ValidationReport, check_session
from shared.streams import DEFAULT_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from helpers.report_pages import Element

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
    def explode(*_: object, **__: object) -> None:
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
    args = ["validate", str(tmp_path / "nowhere"), str(session)]
    result = CliRunner().invoke(cli, [*args, "--report", str(path)])
    assert result.exit_code == 1
    assert len(parse(path).all("section")) == 2
    assert "nowhere: no such folder" in parse(path).text


def make_report(session: str, *, errors: tuple[str, ...] = ()) -> ValidationReport:
    """Return the report of a session with two streams, one of them not whole."""
    stats = {"kind": "text", "events": 1, "characters": 1, "flaws": 0}
    streams = {"touch": {**stats, "share_used": 1.0}, "words": {**stats, "share_used": 0.5}}
    return ValidationReport(
        session=session,
        errors=errors,
        streams={"touch": "passed", "words": "passed", "audio": "absent"},
        stats={
            "length_s": 3.0,
            "clock_offset_s": 0.0,
            "lines": {},
            "absent_states": {"audio": "absent"},
            "streams": streams,
        },
    )


def write_index(
    path: Path, reports: Iterable[ValidationReport], *, key: str = "key"
) -> tuple[Element, list[str]]:
    """Write a page; return it and the sessions that were kept."""
    kept = []
    with ReportPage(path) as page:
        for report in reports:
            if page.has_details(report.session, key):
                page.keep(report, key)
                kept.append(report.session)
            else:
                page.add(render_session(CheckedSession(folder=Path(), report=report)), key)
    return parse(path), kept


def index_rows(page: Element) -> list[tuple[str, ...]]:
    """Return link and texts of each row of an index, as its script draws them."""
    data = json.loads(page.all("script", id="table")[0].text)
    columns = [[c["cells"][i][1] for i in c["rows"]] for c in data["columns"]]
    links = [f"{data['folder']}/{file}" for file in data["files"]]
    return list(zip(links, *columns, strict=True))


MANY = [f"session_{number:04d}" for number in range(SESSIONS_INLINE + 1)]


def test_every_session_of_an_index_is_reachable(tmp_path: Path) -> None:
    path = tmp_path / "what? 100%#1.html"
    names = [*MANY, "a/b", "../up", ".hidden", "con", "Aé中😀", "aé中😀", "x" * 300, " ", HOSTILE]
    page, _ = write_index(path, map(make_report, names))
    assert page.all("section") == []
    links = []
    for link, session, status, length, *streams, drift, errors, warnings, message in index_rows(
        page
    ):
        details = parse(tmp_path / unquote(link))
        assert [e.text for e in details.all("h2")] == [session]
        assert [status, length, *streams] == ["passed", "3.0 s", "100%", "50%", "-"]
        assert (drift, errors, warnings, message) == ("", "", "", "")
        links.append(link)
    assert [row[1] for row in index_rows(page)] == names
    assert len({link.lower() for link in links}) == len(names)
    folder = tmp_path / "what? 100%#1_files"
    assert sorted(f"{quote(folder.name)}/{f.name}" for f in folder.iterdir()) == sorted(links)
    assert all(re.fullmatch(r"[\w%]+/[A-Za-z0-9_-]{1,77}\.html", link) for link in links)


def test_no_name_or_message_becomes_markup_of_an_index(tmp_path: Path) -> None:
    nasty = [
        HOSTILE,
        "</script><script>alert(1)</script>",
        "<!--<script>",
        '"><b onload=x>',
        "&lt;",
    ]
    reports = [make_report(n, errors=(n,)) for n in [*nasty, *MANY]]
    page, _ = write_index(tmp_path / "report.html", reports)
    data, program = page.all("script")
    assert program.text == (Path(preprocess.validate.page.__file__).parent / "index.js").read_text()
    digest = base64.b64encode(hashlib.sha256(program.text.encode()).digest()).decode()
    (policy,) = [e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in program.text
    assert "<" not in data.text
    assert [row[1] for row in index_rows(page)] == [*nasty, *MANY]
    assert [row[-1] for row in index_rows(page)][: len(nasty)] == nasty
    for link, *_ in index_rows(page):
        details = parse(tmp_path / link)
        assert details.all("script") == details.all("img") == details.all("b", onload="x") == []


def test_an_index_asks_only_for_its_own_files(tmp_path: Path) -> None:
    page, _ = write_index(tmp_path / "report.html", map(make_report, MANY))
    links = [v for e in page.walk() for k, v in e.attributes.items() if k in ("href", "src")]
    assert links == ["report_files/"]
    assert not re.search("https?:|fetch|XMLHttp|import", page.all("script")[1].text)


def test_details_are_kept_while_their_key_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    first, kept = write_index(path, map(make_report, MANY))
    assert kept == []
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "report_files").iterdir()}
    again, kept = write_index(path, map(make_report, MANY))
    assert kept == MANY
    assert index_rows(again) == index_rows(first)
    assert {f: f.stat().st_mtime_ns for f in times} == times
    other, kept = write_index(path, map(make_report, MANY), key="other")
    assert kept == []
    assert not {row[0] for row in index_rows(other)} & {row[0] for row in index_rows(first)}
    assert not any(file.exists() for file in times)


def test_only_details_of_sessions_that_are_gone_are_removed(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", tmp_path / "report_files"
    folder.mkdir()
    foreign = [folder / "notes.txt", folder / f"mine-{'0' * 16}.html", folder / "mine.html"]
    for file in foreign:
        file.write_text("mine")
    write_index(path, map(make_report, ["gone", *MANY]))
    page, kept = write_index(path, map(make_report, MANY))
    assert kept == MANY
    files = {f"report_files/{f.name}" for f in folder.iterdir()}
    own = {f"report_files/{f.name}" for f in foreign}
    assert files == own | {row[0] for row in index_rows(page)}


def test_few_kept_sessions_are_one_page_again(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_index(path, map(make_report, MANY))
    page, kept = write_index(path, map(make_report, MANY[:3]))
    alone, _ = write_index(tmp_path / "other.html", map(make_report, MANY[:3]))
    assert kept == MANY[:3]
    assert path.read_bytes() == (tmp_path / "other.html").read_bytes()
    assert page.all("script") == []
    assert len(alone.all("section")) == 3
    assert not (tmp_path / "report_files").exists()


def test_an_interrupt_keeps_the_earlier_index_and_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page, _ = write_index(path, map(make_report, MANY))

    def interrupted() -> Iterator[ValidationReport]:
        yield from map(make_report, MANY)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_index(path, interrupted(), key="other")
    assert index_rows(parse(path)) == index_rows(page)
    assert all((tmp_path / row[0]).exists() for row in index_rows(page))
    _, kept = write_index(path, map(make_report, MANY), key="other")
    assert kept == MANY
    assert len(list((tmp_path / "report_files").iterdir())) == len(MANY)


def test_an_index_of_ten_thousand_sessions_stays_small(tmp_path: Path) -> None:
    report, num_sessions = make_report("x", errors=("e" * 300,)), 10_000
    rows = [
        summary_row(
            replace(report, session=f"2026-01-01_recording_{n:05d}", errors=(f"{n}é" * 80,))
        )
        for n in range(num_sessions // 100)
    ]
    path = tmp_path / "report.html"
    with ReportPage(path) as page:
        for row in rows:
            page.add(RenderedSession(row=row, html=b""), row["session"][1])
    empty, _ = write_index(tmp_path / "empty.html", map(make_report, MANY))
    constant = len((tmp_path / "empty.html").read_bytes()) - len(empty.all("script")[0].text)
    assert constant < 25_000
    assert (path.stat().st_size - constant) * 100 < 5e6


def test_a_row_comes_from_the_report_alone(session: Path) -> None:
    lines = read_lines(session / "metadata.jsonl")
    write_lines(session / "metadata.jsonl", lines[:20] + lines[30:])
    (session / "audio.wav").write_bytes(b"no sound")
    checked = check_session(session, recipe=default_recipe(required=("vision_right",)))
    plain = json.loads(json.dumps(checked.report.as_dict()["stats"]))
    row = summary_row(replace(checked.report, stats=plain))
    assert row == render_session(checked).row
    assert row["stream audio"] == ("wrong", "broken", -1)
    assert row["stream vision_right"] == ("wrong", "missing", -1)
    assert row["stream vision_left"][:2] == ("full", "100%")
    assert (
        row["stream touch"][0] == "wrong" if checked.report.streams["touch"] == "failed" else "part"
    )


@pytest.mark.parametrize("names", [MANY[:3], MANY])
def test_late_findings_are_added_and_panels_stay(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    late = replace(make_report(names[1]), warnings=("the same content as another session",))
    for _ in range(2):  # the second page keeps the details of the first
        with ReportPage(path) as page:
            for report in map(make_report, names):
                if page.has_details(report.session, "key"):
                    page.keep(report, "key")
                else:
                    rendered = render_session(CheckedSession(folder=Path(), report=report))
                    page.add(replace(rendered, html=rendered.html + b"<i>panels</i>"), "key")
            page.amend({1: late})
        parsed = parse(path)
        if names == MANY:
            link, _, status, *_, num_warnings, message = index_rows(parsed)[1]
            assert (status, num_warnings, message) == ("warnings", "1", *late.warnings)
            parsed = parse(tmp_path / link)
            assert len(list((tmp_path / "report_files").iterdir())) == len(names) + 1
        else:
            parsed = parsed.all("section")[1]
        assert messages(parsed) == [f"warning{late.warnings[0]}"]
        assert [e.text for e in parsed.all("i")] == ["panels"]
    page, kept = write_index(path, map(make_report, names))
    assert kept == (MANY if names == MANY else [])
    assert all(row[2] == "passed" for row in index_rows(page)) if names == MANY else True


def test_clocks_have_a_column_and_a_place_in_the_details(tmp_path: Path) -> None:
    report = make_report("session")
    clocks: dict[str, dict[str, Any]] = {
        "touch": {"reference": "audio", "drift_ppm": -81.26, "drift_error_ppm": 0.5},
        "words": {"not_assessed": "too short"},
    }
    clocks["touch"] |= {"offset_s": 0.0124, "method": "clocks"}
    report = replace(report, stats={**report.stats, "clocks": clocks})
    assert summary_row(report)["drift ppm"] == ("", "81", 81)
    page, _ = write_index(tmp_path / "report.html", [report])
    cells = [row.all("td")[-1].text for row in page.all("table", class_="streams")[0].all("tr")]
    assert cells[0].endswith(", clock -81.3 ± 0.5 ppm against audio, +0.012 s apart")
    assert cells[1] == "1 texts, 1 characters"


def test_a_quick_report_decodes_nothing(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check_session(session, recipe=RECIPE, depth="quick")
    for name in ("read_thumbnails", "read_envelope"):
        monkeypatch.setattr(f"preprocess.validate.panels.{name}", lambda *_, **__: 1 / 0)
    html = render_session(checked).html.decode()
    assert "cannot be drawn" not in html
    assert re.findall('data-panel="([a-z_.]+)"', html) == [
        "timeline",
        "external_text",
        "internal_text",
        "proprio.angle",
        "proprio.velocity",
        "touch",
    ]
    assert "needs decoding" in html
