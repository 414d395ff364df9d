"""Validation of the start times of media, and of folders and pipes in place of files."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from helpers.oracles import build, jsonl, tiny_recipe
from helpers.report_pages import RECIPE
from helpers.sessions import sensor_lines, tone, write_lines, write_session, write_tone, write_video

from preprocess.validate.panels import Plot, draw_session
from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.session.folder import scanned_files

if TYPE_CHECKING:
    from pathlib import Path

LOOSE = RECIPE


@pytest.fixture
def session(tmp_path: Path) -> Path:
    return write_session(tmp_path / "sessions" / "one")


def declare(session: Path, **start_s: object) -> None:
    (session / "session.json").write_text(json.dumps({"start_s": start_s}))


def test_a_start_known_only_from_the_container_is_a_warning_until_it_is_declared(
    session: Path,
) -> None:
    write_video(session / "vision_left.mp4", times_s=0.8 + np.arange(60) / 30)
    report = check_session(session, recipe=LOOSE).report
    (warning,) = report.warnings
    assert warning == (
        "vision_left.mp4: starts 0.800 s after its container's zero; placed at 0 s, as files share "
        "no clock; fix: if it was recorded that much later than the others, write "
        '"start_s": {"vision_left": 0.800} into session.json'
    )
    assert report.checks["starts"] == "warnings"
    declare(session, vision_left=0.0)
    assert check_session(session, recipe=LOOSE).report.status == "passed"
    declare(session, vision_left=0.8)
    report = check_session(session, recipe=LOOSE).report
    stats = report.stats["streams"]["vision_left"]
    assert (stats["start_s"], stats["stop_s"]) == (0.8, 2.8)
    assert report.checks["starts"] == "passed"
    assert report.checks["durations"] == "warnings"  # what it means for the others is said


def test_starts_that_cannot_be_used_are_an_error(session: Path) -> None:
    declare(session, audio="soon")
    report = check_session(session, recipe=LOOSE).report
    (error,) = report.errors
    assert error.startswith("session.json: start_s of audio is soon; fix: write seconds")
    assert report.checks["starts"] == "failed"


def test_the_start_of_a_stream_that_is_not_declared_is_a_warning(session: Path) -> None:
    declare(session, microphone=0.3)
    (warning,) = check_session(session, recipe=LOOSE).report.warnings
    assert warning.startswith(
        "session.json: start_s or stretch names 'microphone', which the recipe does not"
    )


def test_a_late_sound_is_drawn_at_its_start(session: Path) -> None:
    soundfile.write(session / "audio.wav", tone(1.0), 16_000)
    declare(session, audio=1.0)
    probe = check_session(session, recipe=LOOSE).probe
    assert probe is not None
    panels = draw_session(session, probe)
    plot = next(p for p in panels.panels if isinstance(p, Plot) and p.name == "audio.waveform")
    first_x = float(plot.curves[0].path.removeprefix("M").replace(",", " ").split()[0])
    assert first_x == pytest.approx(panels.axis.x(1.0), abs=0.5)
    assert probe.intervals["audio"].start_s == 1.0


def test_a_drift_is_measured_from_where_the_sound_begins(tmp_path: Path) -> None:
    write_video(tmp_path / "vision_left.mp4", times_s=np.arange(600) / 10)
    write_tone(tmp_path / "audio.wav", 49.85)
    declare(tmp_path, audio=10.0)
    report = check_session(tmp_path, recipe=LOOSE).report
    assert report.stats["clocks"]["audio"]["drift_ppm"] == pytest.approx(-3000, abs=1)


def test_repairs_use_the_declared_starts(session: Path) -> None:
    declare(session, vision_left=0.5, audio=0.5)
    write_lines(session / "metadata.jsonl", sensor_lines(3.0))
    done = repair_session(session, recipe=LOOSE)
    assert done[0].endswith("all video and sound, which last [0, 2.500] s")
    declare(session, vision_left="soon")
    write_lines(session / "metadata.jsonl", sensor_lines(3.0))
    assert repair_session(session, recipe=LOOSE) == []


def test_fix_is_promised_only_where_it_drops_lines(session: Path) -> None:
    lines = sensor_lines(2.5)
    for text, promise in ((None, "--fix drops lines"), ("bye", "--fix keeps lines")):
        if text is not None:
            lines[-1]["external_text"] = text
        write_lines(session / "metadata.jsonl", lines)
        report = check_session(session, recipe=LOOSE).report
        assert all(promise in m for m in report.warnings), report.warnings
        assert len(report.warnings) == 2
    assert repair_session(session, recipe=LOOSE) == []


@pytest.mark.parametrize("file", scanned_files(RECIPE))
def test_a_pipe_in_place_of_a_file_is_skipped_and_reported(file: str, session: Path) -> None:
    (session / file).unlink(missing_ok=True)
    os.mkfifo(session / file)
    report = check_session(session, recipe=LOOSE).report
    assert any(m.startswith(f"{file}: ") for m in (*report.errors, *report.warnings))
    out = session.parent.parent / "out"
    build(session.parent, out, tiny_recipe())
    if file != "session.json":  # no part of a sample
        reasons = [line["reason"] for line in jsonl(out / "rejected.jsonl")]
        assert any(r.startswith(file) and "not a regular file" in r for r in reasons), reasons
