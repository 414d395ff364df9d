"""The panels of the report: flaws of a session and texts at their times."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import pytest
import soundfile
from helpers.report_pages import RECIPE, bands_s, default_recipe, panel, render_page, row
from helpers.sessions import (
    sensor_lines,
    tone,
    write_lines,
    write_streams,
    write_tone,
    write_video,
)
from helpers.svg_paths import path_curves

from preprocess.validate.report import check_session
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path


def test_gaps_are_drawn_at_their_times(session: Path) -> None:
    lines = [
        line
        for i, line in enumerate(sensor_lines())
        if not 20 <= i < 26 and i != 40  # 233 ms and 67 ms without a line
    ]
    write_lines(session / "metadata.jsonl", lines)
    page = render_page(session)
    for name in ("touch", "proprio"):
        (gap,) = bands_s(page, row(page, name), "gap-error")
        assert gap == pytest.approx((19 / 30, 26 / 30), abs=0.002)
        (short,) = bands_s(page, row(page, name), "gap-warning")
        assert short == pytest.approx((39 / 30, 41 / 30), abs=0.002)
    (behind,) = bands_s(page, panel(page, "proprio.angle"), "gap-error")
    assert behind == pytest.approx((19 / 30, 26 / 30), abs=0.002)
    assert "2 gaps, longest 0.233 s" in row(page, "touch").text


def test_what_is_masked_is_hatched(session: Path) -> None:
    write_tone(session / "audio.wav", 1.5)
    lines = [line for i, line in enumerate(sensor_lines()) if i >= 15 and not 30 <= i < 36]
    write_lines(session / "metadata.jsonl", lines)
    page = render_page(session)
    assert bands_s(page, row(page, "audio"), "masked") == [pytest.approx((1.5, 2.0), abs=0.002)]
    begin, gap = bands_s(page, row(page, "proprio"), "masked")
    assert begin == pytest.approx((0.0, 0.5), abs=0.002)
    assert gap == pytest.approx((29 / 30, 36 / 30), abs=0.002)
    assert bands_s(page, row(page, "vision_left"), "masked") == []


def test_what_repeats_is_drawn_and_hatched(session: Path) -> None:
    write_tone(session / "audio.wav", 6.0)
    lines = sensor_lines(6.0)
    for line in lines[60:150]:
        line["proprio"] = lines[60]["proprio"]
    write_lines(session / "metadata.jsonl", lines)
    page = render_page(session)
    for kind in ("still", "masked"):
        (band,) = bands_s(page, row(page, "proprio"), kind)
        assert band == pytest.approx((2.0, 5.0), abs=0.01)
    assert bands_s(page, row(page, "touch"), "still") == []
    assert "1 still" in row(page, "proprio").text


def test_a_curve_is_not_drawn_across_a_gap(session: Path) -> None:
    lines = [line for i, line in enumerate(sensor_lines()) if not 30 <= i < 36]
    write_lines(session / "metadata.jsonl", lines)
    path = panel(render_page(session), "touch").all("path")[0].attributes["d"]
    before, after = path_curves(path)
    assert before[-1][0] == pytest.approx(29 / 60 * 1000, abs=0.5)
    assert after[0][0] == pytest.approx(36 / 60 * 1000, abs=0.5)


def test_a_gap_in_a_video_is_marked_and_has_no_thumbnail(session: Path) -> None:
    times_s = [i / 30 for i in range(60) if not 15 < i < 45]
    write_video(session / "vision_left.mp4", times_s=times_s)
    page = render_page(session)
    (gap,) = bands_s(page, row(page, "vision_left"), "gap-warning")
    assert gap == pytest.approx((0.5, 1.5), abs=0.002)
    (masked,) = bands_s(page, row(page, "vision_left"), "masked")
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
    report = check_session(session, recipe=RECIPE).report
    message = next(m for m in report.errors if "follow damage" in m)
    start_s, stop_s = map(float, re.findall(r"([\d.]+)-([\d.]+) s", message)[0])
    page = render_page(session)
    damaged = bands_s(page, row(page, "vision_left"), "damaged")
    assert damaged[0] == pytest.approx((start_s, stop_s), abs=0.01)
    assert panel(page, "vision_left").all("rect", class_="damaged")


def test_a_broken_file_is_named_in_its_row_and_in_the_table(session: Path) -> None:
    (session / "vision_left.mp4").write_bytes(b"")
    page = render_page(session)
    assert "broken: vision_left.mp4: the file is empty" in row(page, "vision_left").text
    table = page.all("table", id="summary")[0]
    names = [cell.text for cell in table.all("th", class_="stream")]
    cells = [cell.text for cell in table.all("td", class_="stream")]
    assert dict(zip(names, cells, strict=True))["vision left"] == "broken"


def test_a_required_stream_that_is_missing_is_named_in_the_table(session: Path) -> None:
    (session / "audio.wav").unlink()
    page = render_page(session, recipe=default_recipe(required=("audio",)))
    cells = page.all("table", id="summary")[0].all("td", class_="wrong")
    assert [cell.text for cell in cells] == ["failed", "missing"]


def test_clipped_sound_is_marked_at_its_time(session: Path) -> None:
    samples = tone()
    samples[8_000:9_600] = 1.0
    soundfile.write(session / "audio.wav", samples, 16_000, subtype="PCM_16")
    page = render_page(session)
    top, bottom = bands_s(page, panel(page, "audio.waveform"), "clipped")
    assert top == bottom == pytest.approx((0.5, 0.6), abs=0.005)


def test_text_events_are_marked_at_their_times_with_their_text(session: Path) -> None:
    page = render_page(session)
    lane = panel(page, "external_text")
    (mark,) = lane.all("rect", data_mark="event")
    assert mark.number("x") + mark.number("width") / 2 == pytest.approx(1.4 / 2.0 * 1000, abs=0.1)
    assert "got it" in lane.text
    cells = [[c.text for c in r.all("td")] for r in page.all("table", class_="texts")[0].all("tr")]
    assert cells[1:] == [
        ["0.20 s", "internal_text", "reach"],
        ["1.40 s", "external_text", "got it"],
    ]


def test_labels_of_crowded_texts_do_not_overlap(session: Path) -> None:
    texts = [
        {"timestamp": i * 0.05, "stream": "internal", "text": f"a thought of number {i}"}
        for i in range(30)
    ]
    write_lines(session / "text.jsonl", texts)
    lane = panel(render_page(session), "internal_text")
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


def test_declared_streams_have_rows_curves_and_statistics(tmp_path: Path) -> None:
    streams = {
        "wrist": {"kind": "video", "file": "wrist.mp4", "rate_hz": 10, "size": [32, 64]},
        "room": {"kind": "audio", "file": "room.wav"},
        "head": {
            "kind": "sensor", "file": "head.csv", "rate_hz": 90,
            "values": [
                {"count": 3, "type": "position", "unit": "mm", "names": ["px", "py", "pz"]},
                {"count": 72, "type": "quaternion", "names": [f"q{i}" for i in range(72)]},
            ],
        },
        "grip": {
            "kind": "sensor", "key": "grip", "rate_hz": 1, "resample": "hold", "max_age_s": 1.5,
            "values": [{"count": 1, "type": "fraction"}],
        },
        "notes": {"kind": "text", "file": "notes.jsonl"},
        "lost": {"kind": "sensor", "key": "lost", "values": [{"count": 2, "type": "angle"}]},
    }  # fmt: skip
    recipe = Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": streams})
    write_streams(
        tmp_path / "one", recipe, duration_s=8.0, gaps={"grip": [(3.0, 6.0)]}, skip=["lost"]
    )
    page = render_page(tmp_path / "one", recipe=recipe)
    rows = [e.attributes["data-row"] for e in page.all("g") if "data-row" in e.attributes]
    assert rows == sorted(streams)
    assert "absent: metadata.jsonl holds no usable reading of it" in row(page, "lost").text
    position = panel(page, "head.position")
    assert "head position, mm (head.csv)" in position.text
    assert len(position.all("path")) == 3
    assert {"px", "py", "pz"} <= {text.text[:2] for text in position.all("text")}
    quaternion = panel(page, "head.quaternion")
    assert "the first 60 of 72 values" in quaternion.text
    assert len(quaternion.all("path")) == 60
    assert len(panel(page, "wrist").all("image")) == 10
    # A reading of 2 s is used until 3.5 s; the next one comes at 6 s.
    (masked,) = bands_s(page, row(page, "grip"), "masked")
    assert masked == pytest.approx((3.5, 6.0), abs=0.01)
    table = page.all("table", class_="streams")[0]
    cells = {
        name.text: [cell.text for cell in others]
        for name, *others in (r.all("td") for r in table.all("tr"))
    }
    assert cells.keys() == streams.keys() - {"lost"}
    assert cells["notes"][:2] == ["passed", "text"]
    assert cells["grip"][:2] == ["warnings", "sensor"]
    assert cells["head"][2].startswith("720 readings, 90.0 Hz, longest gap 0.011 s; 3 x position")
