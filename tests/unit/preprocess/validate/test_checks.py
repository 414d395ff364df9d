"""Every check finds its fault, names it, and nothing in a folder stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from helpers.report_pages import RECIPE, default_recipe
from helpers.sessions import (
    read_lines,
    sensor_lines,
    tone,
    write_lines,
    write_tone,
    write_video,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocess.validate.report
from preprocess.validate.report import CHECKS, check_session
from shared.session.scan import scan_session

if TYPE_CHECKING:
    from collections.abc import Callable


REQUIRED = ("vision_left", "audio", "proprio")
STRICT = default_recipe(without=("vision_right",), required=REQUIRED)
LOOSE = RECIPE


def edit(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    """A fault that changes the metadata lines in place."""

    def apply(folder: Path) -> None:
        lines = read_lines(folder / "metadata.jsonl")
        change(lines)
        write_lines(folder / "metadata.jsonl", lines)

    return apply


def for_each(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A fault in every metadata line."""
    return edit(lambda lines: [change(line) for line in lines])


def append(file: str, text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / file).open("a", encoding="utf-8") as out:
            out.write(text)

    return apply


def sound(samples: np.ndarray, subtype: str = "PCM_16") -> Callable[[Path], None]:
    return lambda folder: soundfile.write(folder / "audio.wav", samples, 16_000, subtype=subtype)


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content)  # type: ignore[return-value]


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def halve(file: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return apply


def empty_header(folder: Path) -> None:
    content = bytearray((folder / "audio.wav").read_bytes())
    content[40:44] = bytes(4)
    (folder / "audio.wav").write_bytes(content)


def cut_video(folder: Path) -> None:
    write_video(folder / "vision_left.mp4", muxer={"movflags": "faststart"})
    halve("vision_left.mp4")(folder)


def hole_in_video(folder: Path) -> None:
    write_video(folder / "vision_left.mp4", times_s=[i / 30 for i in range(60) if not 20 < i < 40])


def swap(lines: list[dict[str, Any]], i: int, j: int) -> None:
    lines[i], lines[j] = lines[j], lines[i]


def set_in(line: dict[str, Any], key: str, index: int, value: object) -> None:
    line[key][index] = value


NAN_SOUND = np.where(np.arange(32_000) % 100 == 0, np.nan, tone())
TEXT = '{"timestamp": %s, "stream": "%s", "text": "%s"}\n'

# what happened: (fault, check, status, words of the message)
FAULTS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "no microphone": (remove("audio.wav"), "streams", "failed", "stream audio is missing"),
    "empty video": (write("vision_left.mp4", b""), "files", "failed", "the file is empty"),
    "facts cut": (write("session.json", b'{"by": '), "files", "warnings", "session.json"),
    "line cut": (append("metadata.jsonl", '{"timest'), "lines", "warnings", "line 61: the last"),
    "wrong file": (write("metadata.jsonl", b"a,b\n1,2\n"), "lines", "failed", "right file"),
    "array line": (append("metadata.jsonl", "[1]\n"), "lines", "warnings", "not a JSON object"),
    "nan time": (
        edit(lambda lines: lines[9].update(timestamp=float("nan"))),
        "timestamps", "warnings", "line 10: timestamp is nan",
    ),
    "swapped lines": (
        edit(lambda lines: swap(lines, 20, 21)), "timestamps", "warnings", "line 22",
    ),
    "restarted": (
        edit(lambda lines: lines.extend(sensor_lines(0.5))), "timestamps", "failed", "line 61",
    ),
    "repeated line": (
        edit(lambda lines: lines.insert(7, lines[7])), "timestamps", "warnings", "line 9",
    ),
    "clock not reset": (
        for_each(lambda line: line.update(timestamp=line["timestamp"] + 12.7)),
        "clock", "warnings", "start at 12.7 s",
    ),
    "lost line": (edit(lambda lines: lines.pop(30)), "gaps", "warnings", "no line for 67 ms"),
    "long gap": (
        edit(lambda lines: lines.__delitem__(slice(31, 40))),
        "gaps", "failed", "line 31 (1.000 s): no line for 0.333 s",
    ),
    "sensor off": (
        edit(lambda lines: [line.pop("touch") for line in lines[20:30]]),
        "gaps", "failed", "no touch reading",
    ),
    "video hole": (
        hole_in_video, "gaps", "warnings", "vision_left.mp4 at 0.67 s: no frame for 0.667 s",
    ),
    "raw touch": (for_each(lambda line: set_in(line, "touch", 2, 731)), "values", "failed", "731"),
    "touch rounding": (
        edit(lambda lines: set_in(lines[4], "touch", 0, 1.0004)), "values", "warnings", "rounding",
    ),
    "four fingers": (
        for_each(lambda line: line["touch"].pop()),
        "values", "failed", "counts of streams.touch.values",
    ),
    "unwrapped": (
        edit(lambda lines: set_in(lines[3], "proprio", 0, 3.5)), "values", "warnings", "3.5 rad",
    ),
    "degrees": (
        for_each(lambda line: set_in(line, "proprio", 1, 178.0)), "values", "failed", "degrees",
    ),
    "one bad value": (
        edit(lambda lines: set_in(lines[5], "proprio", 3, None)), "values", "warnings", "line 6",
    ),
    "pressed": (
        for_each(lambda line: set_in(line, "touch", 3, 1.0)),
        "saturation", "warnings", "touch[3] is at its limit 1 in 100%",
    ),
    "frozen": (
        for_each(lambda line: line.update(proprio=[0.5] * 20)), "still", "failed", "frozen",
    ),
    "muted": (sound(np.zeros(32_000)), "levels", "failed", "silent"),
    "antiphase": (
        sound(np.stack([tone(), -tone()], axis=1)), "levels", "warnings", "channel 1 is inverted",
    ),
    "offset": (sound(0.3 + 0.1 * tone()), "levels", "warnings", "an offset of 0.300"),
    "unfinished header": (
        empty_header, "sound", "warnings", "declares 0 bytes of sound",
    ),
    "clipped": (sound(np.clip(4 * tone(), -1, 1)), "levels", "failed", "clipped"),
    "integer floats": (sound(9000 * tone(), "FLOAT"), "levels", "failed", "full scale is 1"),
    "nan sound": (sound(NAN_SOUND, "FLOAT"), "levels", "warnings", "320 samples are not finite"),
    "sound cut": (halve("audio.wav"), "sound", "warnings", "header declares"),
    "video cut": (cut_video, "video", "failed", "its index lists"),
    "short sound": (
        lambda folder: write_tone(folder / "audio.wav", 1.5), "durations", "warnings", "0.50 s",
    ),
    "very short sound": (
        lambda folder: write_tone(folder / "audio.wav", 0.8),
        "durations", "failed", "audio.wav ends at 0.80 s",
    ),
    "late sensors": (
        edit(lambda lines: lines.__delitem__(slice(0, 15))), "durations", "warnings", "0.50 s",
    ),
    "late text": (append("text.jsonl", TEXT % (9, "internal", "hm")), "text", "warnings", "9.000"),
    "third stream": (
        append("text.jsonl", TEXT % (1, "interal", "hm")), "text", "failed", "'interal'",
    ),
    "empty text": (append("text.jsonl", TEXT % (1, "internal", " ")), "text", "warnings", "line 3"),
}  # fmt: skip


def test_a_session_without_fault_passes_every_check(session: Path) -> None:
    report = check_session(session, recipe=STRICT).report
    assert (report.status, report.warnings, report.errors) == ("passed", (), ())
    short = dict.fromkeys(report.not_assessed, "not assessed")  # for a comparison of clocks
    assert report.checks == dict.fromkeys(CHECKS, "passed") | short
    assert all("shorter" in reason for reason in report.not_assessed.values())


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_its_check_and_named(name: str, session: Path) -> None:
    fault, check, status, words = FAULTS[name]
    fault(session)
    report = check_session(session, recipe=STRICT).report
    messages = report.errors if status == "failed" else report.warnings
    assert report.checks[check] == status, report.as_dict()
    assert any(words in message for message in messages), messages


@pytest.mark.parametrize("name", FAULTS)
def test_every_message_says_where_and_how_to_fix(name: str, session: Path) -> None:
    FAULTS[name][0](session)
    report = check_session(session, recipe=STRICT).report
    starts = (*(path.name for path in session.iterdir()), "session")
    for message in (*report.errors, *report.warnings):
        if "more like these" not in message:
            assert message.startswith(starts), message
            assert ";" in message, message


def test_a_broken_packet_in_the_middle_is_an_error_that_names_the_second(
    session: Path, nasty_files: dict[str, Path]
) -> None:
    shutil.copyfile(nasty_files["video/corrupted.mp4"], session / "vision_left.mp4")
    report = check_session(session, recipe=LOOSE).report
    expected = "vision_left.mp4 2.90-5.00 s: frames are damaged or follow damage"
    assert any(m.startswith(expected) for m in report.errors)


def test_a_damaged_long_video_is_found_though_only_stretches_are_decoded(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.validate.probe.STRETCH_FRAMES", 2)
    report = check_session(session, recipe=STRICT).report
    assert report.stats["streams"]["vision_left"]["frames_checked"] == 32


def test_steps_of_exactly_100_ms_are_short_gaps_in_findings_and_statistics(session: Path) -> None:
    """Two of three lines lost 10 times: steps of 0.1 s, some of them longer by rounding."""
    lines = [line for i, line in enumerate(sensor_lines()) if i % 6 < 4]
    for line in lines:
        line["timestamp"] = round(line["timestamp"] * 30) / 30
    write_lines(session / "metadata.jsonl", lines)
    report = check_session(session, recipe=STRICT).report
    stats = report.stats["streams"]["touch"]
    assert stats["share_short_gaps"] == pytest.approx(9 * 0.1 / 2.0, abs=1e-3)
    assert stats["share_long_gaps"] == 0
    (warning,) = [m for m in report.warnings if "no line for" in m]
    assert "the longest of 9 gaps of 60-100 ms, 45.0% of the session" in warning
    assert report.checks["gaps"] == "warnings"


@pytest.mark.parametrize(
    ("rate_hz", "status", "words"),
    [
        (25.0, "warnings", "interpolated"),
        (10.0, "warnings", "interpolated"),
        (4.0, "failed", "masked"),
    ],
)
def test_a_regular_recorder_has_no_gaps_but_a_rate(
    rate_hz: float, status: str, words: str, session: Path
) -> None:
    write_lines(session / "metadata.jsonl", sensor_lines(rate_hz=rate_hz))
    report = check_session(session, recipe=STRICT).report
    assert report.checks["gaps"] == "passed"
    assert report.checks["rates"] == status
    messages = report.errors if status == "failed" else report.warnings
    expected = f"metadata.jsonl: touch is recorded at {rate_hz:g} Hz, its rate_hz is 30"
    (message,) = [m for m in messages if m.startswith(expected)]
    assert words in message
    assert "set `resample: hold`" in message


def test_a_stream_that_is_optional_and_not_recorded_is_absent_without_a_warning(
    session: Path,
) -> None:
    (session / "text.jsonl").unlink()
    report = check_session(session, recipe=default_recipe(required=REQUIRED)).report
    absent = {"vision_right", "internal_text", "external_text"}
    assert set(report.stats["absent"]) == absent
    assert report.status == "passed"
    assert {name for name, status in report.streams.items() if status == "absent"} == absent


def test_a_missing_stream_fails_only_a_recipe_that_requires_it(session: Path) -> None:
    (session / "audio.wav").unlink()
    assert check_session(session, recipe=STRICT).report.status == "failed"
    assert check_session(session, recipe=LOOSE).report.status == "passed"


def test_streams_that_end_far_apart_fail_only_where_both_are_required(session: Path) -> None:
    write_tone(session / "audio.wav", 0.8)
    assert check_session(session, recipe=STRICT).report.checks["durations"] == "failed"
    assert check_session(session, recipe=LOOSE).report.checks["durations"] == "warnings"


def test_a_session_too_short_for_one_sample_is_a_warning(session: Path) -> None:
    recipe = STRICT.with_segment(8.0)
    report = check_session(session, recipe=recipe).report
    assert report.checks["length"] == "warnings"


def test_more_than_five_messages_of_a_kind_are_counted(session: Path) -> None:
    for_each(lambda line: set_in(line, "touch", 2, 731))(session)
    errors = check_session(session, recipe=STRICT).report.errors
    assert len(errors) == 6
    assert errors[-1] == "metadata.jsonl: 55 more like these"


@pytest.mark.parametrize("first_s", [0.0, 0.4, 12.7, 1.7e9])
def test_the_clock_offset_is_that_of_the_builder(first_s: float, session: Path) -> None:
    for_each(lambda line: line.update(timestamp=line["timestamp"] + first_s))(session)
    report = check_session(session, recipe=STRICT).report
    scan = scan_session(session, recipe=STRICT)
    assert report.stats["clock_offset_s"] == pytest.approx(scan.clock_offset_s, abs=1e-6)
    assert report.stats["length_s"] == pytest.approx(scan.duration_s, abs=1e-3)


@pytest.mark.parametrize("is_made", [False, True])
def test_a_folder_without_a_session_fails(is_made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    if is_made:
        folder.mkdir()
    assert check_session(folder, recipe=LOOSE).report.status == "failed"


@pytest.mark.parametrize("file", ["vision_left.mp4", "audio.wav", "metadata.jsonl", "text.jsonl"])
def test_a_folder_in_place_of_a_file_fails_without_a_traceback(file: str, session: Path) -> None:
    (session / file).unlink()
    (session / file).mkdir()
    report = check_session(session, recipe=LOOSE).report
    assert any(message.startswith(file) for message in report.errors), report.errors


def test_any_exception_becomes_a_failed_report(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by \udcff")

    monkeypatch.setattr(preprocess.validate.report, "probe_session", explode)
    report = check_session(session, recipe=STRICT).report
    assert report.status == "failed"
    assert r"ZeroDivisionError: by \udcff" in report.errors[0]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["metadata.jsonl", "text.jsonl", "audio.wav", "vision_left.mp4"]),
    at=st.floats(0, 1),
    scrap=st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b'{"timestamp": 1e999}\n', b'{"timestamp": 1, "touch": {}}\n', b"\xff\n"]),
        st.integers(400, 600).map(lambda n: b'{"timestamp": %s}\n' % (b"9" * n)),
        st.just(b'{"timestamp": 1, "internal_text": "\\ud800"}\n'),
        st.just(b"[" * 100_000 + b"\n"),
    ),
)
def test_no_corruption_of_a_file_raises(
    whole: Path, tmp_path: Path, file: str, at: float, scrap: bytes
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "session", dirs_exist_ok=True))
    content = (whole / file).read_bytes()
    place = round(at * len(content))
    (folder / file).write_bytes(content[:place] + scrap + content[place + len(scrap) :])
    report = check_session(folder, recipe=LOOSE).report
    assert "cannot be checked" not in " ".join(report.errors)
    json.dumps(report.as_dict(), allow_nan=False)
