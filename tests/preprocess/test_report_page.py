"""The report page, read back with the standard library's parser: whole, bounded, escaped, true."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import simplejpeg
import soundfile
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_sessions import (
    read_lines,
    sensor_lines,
    tone,
    write_lines,
    write_session,
    write_tone,
    write_video,
)

import preprocess.report_page
from preprocess.__main__ import cli
from preprocess.report_axes import PLOT_WIDTH, TimeAxis, ValueAxis, round_up, say_time, thin_curve
from preprocess.report_media import read_envelope, read_thumbnails
from preprocess.report_page import ReportPage
from preprocess.report_texts import readable
from preprocess.validate import judge_session
from shared.media import read_video_track
from shared.recipe import Recipe, VisionRecipe, WindowRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = Recipe(required=(), window=WindowRecipe(duration_s=1.0))
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
NASTY_NAMES = {"video": "vision_left.mp4", "audio": "audio.wav", "other": "metadata.jsonl"}
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Element:
    """An element of a parsed page."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Elements of a tag whose attributes hold the wanted words (class_ for class)."""
        return [
            e
            for e in self.walk()
            if e.tag == tag
            and all(
                v in e.attributes.get(k.rstrip("_").replace("_", "-"), "").split()
                for k, v in wanted.items()
            )
        ]

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def number(self, name: str) -> float:
        return float(self.attributes[name])


class Parser(HTMLParser):
    """A strict tree builder: every element must be closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(path: Path) -> Element:
    parser = Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def page_of(*folders: Path, recipe: Recipe = RECIPE) -> Element:
    """The page of some sessions, beside the first of them."""
    path = folders[0].parent / "page" / "report.html"
    with ReportPage(path) as page:
        for folder in folders:
            page.add(folder, *judge_session(folder, recipe=recipe))
    return parse(path)


def panel(page: Element, name: str) -> Element:
    (found,) = page.all("svg", data_panel=name)
    return found


def row(page: Element, name: str) -> Element:
    (found,) = [e for e in panel(page, "timeline").all("g") if e.attributes.get("data-row") == name]
    return found


def stretches_s(page: Element, where: Element, kind: str) -> list[tuple[float, float]]:
    """(start, stop) in seconds of the bands of a kind, by the scale that the page states."""
    timeline = panel(page, "timeline")
    start_s, stop_s = timeline.number("data-start-s"), timeline.number("data-stop-s")
    unit_s = (stop_s - start_s) / 1000
    return [
        (
            start_s + band.number("x") * unit_s,
            start_s + (band.number("x") + band.number("width")) * unit_s,
        )
        for band in where.all("rect", class_=kind)
    ]


def messages(page: Element) -> list[str]:
    return [item.text for item in page.all("li")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_session(tmp_path_factory.mktemp("whole") / "session_001")


@pytest.fixture
def session(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "session_001"))


# --- what a page holds -----------------------------------------------------------------------


def test_every_session_has_a_row_that_links_to_its_section(whole: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("ann", "bob", "cat")]
    page = page_of(*folders)
    links = [(e.attributes["href"], e.text) for e in page.all("table", id="summary")[0].all("a")]
    sections = [("#" + e.attributes["id"], e.all("h2")[0].text) for e in page.all("section")]
    assert links == sections == [(f"#session-{i + 1}", f.name) for i, f in enumerate(folders)]


def test_verdicts_stand_in_the_words_of_validate(session: Path) -> None:
    lines = read_lines(session / "metadata.jsonl")
    lines[9]["touch"][1] = 3.0
    write_lines(session / "metadata.jsonl", lines[:20] + lines[22:])
    report, _ = judge_session(session, recipe=RECIPE)
    assert report.errors
    assert report.warnings
    expected = [f"error{m}" for m in report.errors] + [f"warning{m}" for m in report.warnings]
    assert messages(page_of(session)) == expected


def test_every_stream_has_its_row_and_every_reading_its_panel(session: Path) -> None:
    shutil.copyfile(session / "vision_left.mp4", session / "vision_right.mp4")
    page = page_of(session)
    panels = [e.attributes["data-panel"] for e in page.all("svg") if "data-panel" in e.attributes]
    assert panels == [
        "timeline",
        "internal_text",
        "external_text",
        "vision_left",
        "vision_right",
        "waveform",
        "level",
        "touch",
        "angles",
        "velocities",
    ]
    curves = {name: len(panel(page, name).all("path")) for name in panels[-3:]}
    assert curves == {"touch": 5, "angles": 10, "velocities": 10}
    rows = [e.attributes["data-row"] for e in page.all("g") if "data-row" in e.attributes]
    assert len(rows) == 8


def test_thumbnails_are_jpegs_of_the_frames_at_their_times(session: Path) -> None:
    pictures = panel(page_of(session), "vision_left").all("image")
    greys = []
    for picture in pictures:
        head, _, content = picture.attributes["href"].partition(",")
        assert head == "data:image/jpeg;base64"
        greys.append(float(simplejpeg.decode_jpeg(base64.b64decode(content)).mean()))
    times_s = (np.arange(10) + 0.5) * 0.2  # nearest of 30 frames a second, each of its own grey
    frames = [min(range(60), key=lambda i: (abs(i / 30 - t), i)) for t in times_s]
    assert greys == pytest.approx([30 + (i * 37) % 200 for i in frames], abs=4)


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


# --- what is wrong shows at its place --------------------------------------------------------


def test_gaps_stand_where_they_were_put(session: Path) -> None:
    lines = [
        line
        for i, line in enumerate(sensor_lines())
        if not 20 <= i < 26 and i != 40  # 233 ms and 67 ms without a line
    ]
    write_lines(session / "metadata.jsonl", lines)
    page = page_of(session)
    for name in ("touch", "proprio", "metadata lines"):
        (gap,) = stretches_s(page, row(page, name), "gap-error")
        assert gap == pytest.approx((19 / 30, 26 / 30), abs=0.002)
        (short,) = stretches_s(page, row(page, name), "gap-warning")
        assert short == pytest.approx((39 / 30, 41 / 30), abs=0.002)
    (behind,) = stretches_s(page, panel(page, "angles"), "gap-error")
    assert behind == pytest.approx((19 / 30, 26 / 30), abs=0.002)
    assert "2 gaps, longest 0.233 s" in row(page, "touch").text


def test_what_is_masked_is_hatched(session: Path) -> None:
    write_tone(session / "audio.wav", 1.5)
    lines = [line for i, line in enumerate(sensor_lines()) if i >= 15 and not 30 <= i < 36]
    write_lines(session / "metadata.jsonl", lines)
    page = page_of(session)
    assert stretches_s(page, row(page, "audio"), "masked") == [pytest.approx((1.5, 2.0), abs=0.002)]
    begin, gap = stretches_s(page, row(page, "proprio"), "masked")
    assert begin == pytest.approx((0.0, 0.5), abs=0.002)
    assert gap == pytest.approx((29 / 30, 36 / 30), abs=0.002)
    assert stretches_s(page, row(page, "vision_left"), "masked") == []


def test_a_curve_is_not_drawn_across_a_gap(session: Path) -> None:
    lines = [line for i, line in enumerate(sensor_lines()) if not 30 <= i < 36]
    write_lines(session / "metadata.jsonl", lines)
    path = panel(page_of(session), "touch").all("path")[0].attributes["d"]
    pieces = [
        [float(x) for x in re.findall(r"([\d.]+),", piece)] for piece in path.split("M") if piece
    ]
    assert len(pieces) == 2
    assert pieces[0][-1] == pytest.approx(29 / 60 * 1000, abs=0.5)
    assert pieces[1][0] == pytest.approx(36 / 60 * 1000, abs=0.5)


def test_a_hole_in_a_video_is_marked_and_has_no_picture(session: Path) -> None:
    times_s = [i / 30 for i in range(60) if not 15 < i < 45]
    write_video(session / "vision_left.mp4", times_s=times_s)
    page = page_of(session)
    (gap,) = stretches_s(page, row(page, "vision_left"), "gap-warning")
    assert gap == pytest.approx((0.5, 1.5), abs=0.002)
    (masked,) = stretches_s(page, row(page, "vision_left"), "masked")
    assert masked == pytest.approx((0.7, 1.3), abs=0.002)  # 5 frames/s: a frame holds for 0.2 s
    empty = panel(page, "vision_left").all("rect", class_="none")
    assert [e.number("x") // 100 for e in empty] == [4, 5]  # their middles are 0.9 and 1.1 s


def test_frames_that_do_not_decode_are_marked(session: Path) -> None:
    path = session / "vision_left.mp4"
    write_video(path, gop=60, b_frames=0)
    content = bytearray(path.read_bytes())
    start = len(content) // 3
    content[start : len(content) // 2] = bytes(len(content) // 2 - start)
    path.write_bytes(bytes(content))
    report, _ = judge_session(session, recipe=RECIPE)
    message = next(m for m in report.errors if "don't decode" in m)
    start_s, stop_s = map(float, re.findall(r"([\d.]+)-([\d.]+) s", message)[0])
    page = page_of(session)
    damaged = stretches_s(page, row(page, "vision_left"), "damaged")
    assert damaged[0] == pytest.approx((start_s, stop_s), abs=0.01)
    assert panel(page, "vision_left").all("rect", class_="damaged")


def test_a_broken_file_is_named_in_its_row_and_in_the_table(session: Path) -> None:
    (session / "vision_left.mp4").write_bytes(b"")
    page = page_of(session)
    assert "broken: vision_left.mp4: the file is empty" in row(page, "vision_left").text
    cells = page.all("table", id="summary")[0].all("td", class_="stream")
    assert [cell.text for cell in cells][:2] == ["broken", "-"]


def test_a_required_stream_that_is_missing_is_named_in_the_table(session: Path) -> None:
    (session / "audio.wav").unlink()
    page = page_of(session, recipe=Recipe(window=WindowRecipe(duration_s=1.0)))
    cells = page.all("table", id="summary")[0].all("td", class_="wrong")
    assert [cell.text for cell in cells] == ["missing"]


def test_clipped_sound_is_marked_at_its_place(session: Path) -> None:
    samples = tone()
    samples[8_000:9_600] = 1.0
    soundfile.write(session / "audio.wav", samples, 16_000, subtype="PCM_16")
    page = page_of(session)
    top, bottom = stretches_s(page, panel(page, "waveform"), "clipped")
    assert top == bottom == pytest.approx((0.5, 0.6), abs=0.005)


# --- numbers ---------------------------------------------------------------------------------


def test_the_envelope_is_that_of_every_channel_and_the_level_its_rms(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples = generator.uniform(-0.5, 0.5, (48_000, 2))
    samples[12_345, 1] = 0.9
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    envelope = read_envelope(tmp_path / "a.wav", duration_s=3.0, axis=TimeAxis(0.0, 6.0))
    assert len(envelope.low) == 500
    bins = samples.astype(np.float32).reshape(500, 96 * 2)
    np.testing.assert_array_equal(envelope.low, bins.min(axis=1))
    np.testing.assert_array_equal(envelope.high, bins.max(axis=1))
    groups = bins.astype(np.float64).reshape(125, -1)  # 4 bins of 6 ms are the first over 20 ms
    level_db = 10 * np.log10(np.square(groups).mean(axis=1))
    np.testing.assert_allclose(envelope.level_db, np.repeat(level_db, 4), atol=1e-9)
    assert not envelope.is_clipped.any()


def test_thumbnails_are_the_same_whether_a_file_is_sought_in_or_read_through(
    tmp_path: Path,
) -> None:
    times_s = write_video(tmp_path / "a.mp4", times_s=np.arange(90) / 30, gop=10)
    shutil.copyfile(tmp_path / "a.mp4", tmp_path / "b.mp4")
    found = [
        read_thumbnails(
            tmp_path / name,
            read_video_track(tmp_path / name),
            axis=TimeAxis(0.0, float(times_s[-1])),
            recipe=VisionRecipe(),
        )
        for name in ("a.mp4", "b.mp4")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.report_media._SEEKABLE_HEADS", ())
        through = read_thumbnails(
            tmp_path / "b.mp4",
            read_video_track(tmp_path / "b.mp4"),
            axis=TimeAxis(0.0, float(times_s[-1])),
            recipe=VisionRecipe(),
        )
    assert found[0] == found[1] == through
    assert all(t.state == "shown" for t in through)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_every_column(values: list[float], columns: int) -> None:
    times_s = np.arange(len(values)) / 10
    axis = TimeAxis(0.0, len(values) / 10)
    pieces = thin_curve(times_s, np.array(values), axis=axis, num_columns=columns, max_step_s=0.11)
    ((thin_times, thin_values),) = pieces
    assert len(thin_times) <= 2 * columns
    assert (np.diff(thin_times) >= 0).all()
    column = np.floor(times_s / axis.length_s * columns)
    thin_column = np.floor(thin_times / axis.length_s * columns)
    for c in np.unique(column):
        at, thin_at = np.array(values)[column == c], thin_values[thin_column == c]
        assert (at.min(), at.max()) == (thin_at.min(), thin_at.max())


def test_a_curve_of_one_reading_is_one_point() -> None:
    axis = TimeAxis(0.0, 1.0)
    (piece,) = thin_curve(
        np.array([0.5]), np.array([2.0]), axis=axis, num_columns=9, max_step_s=0.1
    )
    assert [part.tolist() for part in piece] == [[0.5], [2.0]]


@given(st.floats(-10, 1e6), st.floats(1e-6, 1e9))
def test_an_axis_has_a_handful_of_ticks_inside_it(start_s: float, length_s: float) -> None:
    ticks = TimeAxis(start_s, start_s + length_s).ticks()
    assert len(ticks) <= 13
    assert all(0 <= tick.place <= PLOT_WIDTH for tick in ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e30))
def test_a_value_axis_has_a_handful_of_ticks(low: float, length: float) -> None:
    assert 1 <= len(ValueAxis(low, low + length, 100.0).ticks()) <= 7


@pytest.mark.parametrize(
    ("time_s", "step_s", "words"),
    [
        (1.5, 0.01, "1.50 s"),
        (-0.25, 0.01, "-0.25 s"),
        (119.0, 1.0, "119 s"),
        (120.0, 1.0, "2:00"),
        (3661.0, 60.0, "1:01:01"),
        (125.25, 0.1, "2:05.2"),
        (-130.0, 1.0, "-2:10"),
        (179.999, 0.01, "3:00.00"),
    ],
)
def test_times_are_said_as_people_do(time_s: float, step_s: float, words: str) -> None:
    assert say_time(time_s, step_s=step_s) == words


@given(st.floats(1e-12, 1e12))
def test_rounding_up_gives_the_next_round_number(value: float) -> None:
    rounded = round_up(value)
    assert value <= rounded * (1 + 1e-6)
    assert rounded <= value * 2.5 * (1 + 1e-6)
    assert f"{rounded:e}"[0] in "125"


def test_control_characters_of_a_text_are_written_out() -> None:
    assert readable("a\u202eb\x00\n c", max_chars=50) == "a\\u202eb\\u0000 c"
    assert readable("word " * 9, max_chars=10) == "word wo..."


# --- hostile, broken and large sessions ------------------------------------------------------


def test_hostile_texts_and_names_stay_words(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "<script>alert(1)<b onload=x>&amp;"))
    texts = [
        {"timestamp": t, "stream": s, "text": HOSTILE}
        for t, s in ((0.1, "internal"), (0.5, "external"), (99.0, "external"))
    ]
    texts.append({"timestamp": 1.0, "stream": "<svg onload=alert(3)>", "text": "x"})
    write_lines(folder / "text.jsonl", texts)
    page = page_of(folder)
    assert page.all("script") == page.all("img") == page.all("b", onload="x") == []
    assert not [e for e in page.walk() for name in e.attributes if name.startswith("on")]
    assert page.all("h2")[0].text == folder.name
    assert page.all("table", class_="texts")[0].text.count(HOSTILE) == 3


def test_a_page_asks_for_nothing_from_outside(session: Path) -> None:
    page = page_of(session)
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


def test_a_session_that_can_not_be_judged_has_its_section(tmp_path: Path) -> None:
    page = page_of(tmp_path / "nowhere")
    assert "no such folder" in messages(page)[0]


def test_a_session_that_can_not_be_drawn_keeps_its_verdict(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(preprocess.report_page, "draw_session", explode)
    assert messages(page_of(session)) == [
        "passednothing to say against it",
        "reportits pictures can't be drawn: RuntimeError: boom",
    ]


def test_files_that_vanish_after_the_verdict_leave_a_note(session: Path, tmp_path: Path) -> None:
    report, evidence = judge_session(session, recipe=RECIPE)
    (session / "audio.wav").unlink()
    (session / "vision_left.mp4").unlink()
    with ReportPage(tmp_path / "page.html") as page:
        page.add(session, report, evidence)
    text = parse(tmp_path / "page.html").text
    assert "audio.wav: no waveform" in text
    assert "vision_left.mp4: no thumbnails" in text


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
def test_odd_lines_are_drawn(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    write_lines(folder / "metadata.jsonl", lines)
    page = page_of(folder)
    assert not any(m.startswith("report") for m in messages(page))
    numbers = [v for e in page.walk() for k, v in e.attributes.items() if k in ("x", "y", "d")]
    assert not [n for n in numbers if re.search("nan|inf", n)]


def test_every_nasty_file_has_its_section(nasty_files: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for name, path in nasty_files.items():
        folders.append(tmp_path / name.replace("/", "_"))
        folders[-1].mkdir()
        shutil.copyfile(path, folders[-1] / NASTY_NAMES[name.split("/")[0]])
    page = page_of(*folders)
    assert [e.all("h2")[0].text for e in page.all("section")] == [f.name for f in folders]
    assert not any(m.startswith("report") for m in messages(page))
    assert not page.all("div", class_="note")
    for section, folder in zip(page.all("section"), folders, strict=True):
        report, _ = judge_session(folder, recipe=RECIPE)
        assert len(section.all("li", class_="error")) == len(report.errors)


def test_every_real_session_is_drawn_whole(real_sessions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with ReportPage(path) as page:
        reports = [judge_session(folder, recipe=RECIPE) for folder in real_sessions]
        for folder, (report, evidence) in zip(real_sessions, reports, strict=True):
            page.add(folder, report, evidence)
    parsed = parse(path)
    for section, (report, _) in zip(parsed.all("section"), reports, strict=True):
        panels = {e.attributes.get("data-panel") for e in section.all("svg")} - {None}
        streams = report.stats["streams"]
        assert ("waveform" in panels) == ("audio" in streams)
        assert ("angles" in panels) == ("proprio" in streams)
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
    page_of(folder)
    assert (tmp_path / "page" / "report.html").stat().st_size < 2e6


# --- the command -----------------------------------------------------------------------------


def test_the_command_writes_the_page_and_keeps_its_exit_code(session: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    result = CliRunner().invoke(cli, ["validate", str(session), "--report", str(path)])
    assert result.exit_code == 0, result.output
    assert len(parse(path).all("section")) == 1
    (session / "vision_left.mp4").unlink()
    result = CliRunner().invoke(cli, ["validate", str(session), "--report", str(path)])
    assert result.exit_code == 1
    assert "required stream vision_left" in parse(path).text


def test_an_error_leaves_the_old_page_and_nothing_else(session: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("old")
    args = ["validate", str(session), str(tmp_path / "nowhere"), "--report", str(path)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert "no such folder" in result.output
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
