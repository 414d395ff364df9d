"""Stretches in which a recorder repeats itself, against a slow search and made recordings."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from helpers.oracles import build, open_indexes, tiny_recipe
from helpers.plans import scan_from_json
from helpers.sessions import sensor_lines, write_lines, write_video
from hypothesis import given
from hypothesis import strategies as st

from preprocess.validate.report import check_session
from shared.clock import Interval
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.session.still import repeated_runs, unusual_runs
from shared.streams import MaskReason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DURATION_S = 12
RECIPE = tiny_recipe()


def noise(duration_s: float, *, rate_hz: int = 16_000) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).normal(size=round(duration_s * rate_hz))


def pictures(first_s: float = 0, stop_s: float = 0, *, seed: int = 0) -> list[np.ndarray]:
    """Return a panning view of noise, 30 a second, that stops between two times."""
    texture = np.random.default_rng(seed).integers(0, 255, (32, 2 * DURATION_S * 30 + 64))
    texture = texture.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)
    steps = np.arange(DURATION_S * 30)
    is_frozen = (steps >= round(first_s * 30)) & (steps < round(stop_s * 30))
    shown = np.where(is_frozen, round(first_s * 30), steps)
    return [texture[:, 2 * i : 2 * i + 64] for i in shown]


def freeze(
    lines: list[dict[str, Any]], first_s: float, stop_s: float, keys: tuple[str, ...] = ("proprio",)
) -> list[dict[str, Any]]:
    """Repeat the readings at a time up to another."""
    held = next(line for line in lines if line["timestamp"] >= first_s)
    return [
        {**line, **{key: held[key] for key in keys}} if first_s <= line["timestamp"] < stop_s
        else line
        for line in lines
    ]  # fmt: skip


@pytest.fixture(scope="module")
def flawless(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flawless") / "ann"
    folder.mkdir()
    write_video(folder / "vision_left.mp4", pictures=pictures(), gop=30)
    write_video(folder / "vision_right.mp4", pictures=pictures(seed=1), gop=30)
    soundfile.write(folder / "audio.wav", noise(DURATION_S), 16_000)
    write_lines(folder / "metadata.jsonl", sensor_lines(DURATION_S))
    return folder


@pytest.fixture
def session(flawless: Path, tmp_path: Path) -> Path:
    return shutil.copytree(flawless, tmp_path / "in" / "ann")


def zero_sound(session: Path, *stretches: tuple[float, float]) -> None:
    sound = noise(DURATION_S)
    for start_s, stop_s in stretches:
        sound[round(start_s * 16_000) : round(stop_s * 16_000)] = 0
    soundfile.write(session / "audio.wav", sound, 16_000)


def masks(session: Path, **sections: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the masked stretches of each stream, to a tenth of a second."""
    scan = scan_session(session, recipe=tiny_recipe(**sections))
    assert scan_from_json(json.loads(json.dumps(scan.as_json()))) == scan
    assert {s.reason for spans in scan.masked.values() for s in spans} <= {MaskReason.STILL}
    return {
        name: [(round(s.start_s, 1), round(s.stop_s, 1)) for s in spans]
        for name, spans in scan.masked.items()
    }


def test_a_flawless_session_has_none(flawless: Path) -> None:
    assert masks(flawless) == {}
    report = check_session(flawless, recipe=RECIPE).report
    assert report.checks["still"] == "passed"


def freeze_left(session: Path) -> None:
    write_video(session / "vision_left.mp4", pictures=pictures(4, 9), gop=30)


def blacken_left(session: Path) -> None:
    shown = pictures()
    shown[150:] = [np.zeros_like(shown[0])] * (len(shown) - 150)
    write_video(session / "vision_left.mp4", pictures=shown, gop=30)


def whiten_all(session: Path) -> None:
    white = np.full((64, 64), 255, dtype=np.uint8)
    write_video(session / "vision_left.mp4", pictures=[white] * DURATION_S * 30, gop=30)


def freeze_proprio(session: Path) -> None:
    lines = freeze(sensor_lines(DURATION_S), 3, 7, ("proprio", "touch"))
    write_lines(session / "metadata.jsonl", lines)


def zero_proprio(session: Path) -> None:
    lines = [{**line, "proprio": [0.0] * 20} for line in sensor_lines(DURATION_S)]
    write_lines(session / "metadata.jsonl", lines)


def copy_left(session: Path) -> None:
    shutil.copy(session / "vision_left.mp4", session / "vision_right.mp4")


def encode_left_again(session: Path) -> None:
    write_video(session / "vision_right.mp4", pictures=pictures(), gop=50, options={"crf": "28"})


FAULTS: dict[str, tuple[Callable[[Path], None], dict[str, list[tuple[float, float]]], str]] = {
    "one eye stalls": (freeze_left, {"vision_left": [(4.0, 9.0)]}, "one picture repeats"),
    "one eye turns black": (
        blacken_left, {"vision_left": [(5.0, 12.0)]}, "a picture of one color (black)",
    ),
    "one eye is white": (
        whiten_all, {"vision_left": [(0.0, 12.0)]}, "a picture of one color (white)",
    ),
    "tracking freezes": (freeze_proprio, {"proprio": [(3.0, 7.0)]}, "the same poses repeat"),
    "tracking is dead": (zero_proprio, {"proprio": [(0.0, 12.0)]}, "the same poses repeat"),
    "power is lost": (
        lambda session: zero_sound(session, (6, 12)), {"audio": [(6.0, 12.0)]}, "exact zeros",
    ),
    "sound drops out": (
        lambda session: zero_sound(session, (2, 3.5)), {"audio": [(2.0, 3.5)]}, "exact zeros",
    ),
    "one eye is copied": (
        copy_left, {"vision_right": [(0.0, 12.0)]}, "a copy of vision_left",
    ),
    "one eye is encoded again": (
        encode_left_again, {"vision_right": [(0.0, 12.0)]}, "a copy of vision_left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_masked_told_and_can_be_kept(name: str, session: Path) -> None:
    spoil, expected, words = FAULTS[name]
    spoil(session)
    assert masks(session) == expected
    (stream, ((start_s, stop_s),)) = next(iter(expected.items()))
    report = check_session(session, recipe=RECIPE).report
    is_lost = stop_s - start_s > DURATION_S / 2 and RECIPE.streams[stream].required
    (message,) = [m for m in (*report.errors, *report.warnings) if words in m]
    assert report.streams[stream] == report.checks["still"] == ("failed" if is_lost else "warnings")
    assert "; masked; fix: " in message
    kept = {kind: {"mask": ["clock", "damaged"]} for kind in ("video", "audio", "sensor")}
    assert masks(session, **kept) == {}
    report = check_session(session, recipe=tiny_recipe(**kept)).report
    assert report.checks["still"] == "warnings"
    assert any(words in m and "kept, as `mask` leaves out still" in m for m in report.warnings)


@pytest.mark.parametrize("name", ["one eye stalls", "tracking freezes", "power is lost"])
def test_the_limit_is_an_expectation(name: str, session: Path) -> None:
    spoil, expected, _ = FAULTS[name]
    spoil(session)
    ((stream, _),) = expected.items()
    declared = {n: spec.as_json() for n, spec in RECIPE.streams.items()}
    for limit_s, found in ((3.0, expected), (7.0, {})):
        declared[stream]["expect"] = {"max_still_s": limit_s}
        assert masks(session, streams=declared) == found


def test_where_the_world_rests_nothing_is_masked(session: Path) -> None:
    freeze_left(session)
    write_video(session / "vision_right.mp4", pictures=pictures(4, 9, seed=1), gop=30)
    assert masks(session).keys() == {"vision_left", "vision_right"}
    write_lines(session / "metadata.jsonl", freeze(sensor_lines(DURATION_S), 3.9, 9.1))
    assert masks(session) == {}


def test_slides_pauses_and_gates_are_in_character(session: Path) -> None:
    views = pictures()
    slides = [views[i // 90 * 90] for i in range(len(views))]
    write_video(session / "vision_left.mp4", pictures=slides, gop=30)
    lines = sensor_lines(DURATION_S)
    for start_s in (1.0, 3.0, 4.5, 6.0, 9.5):
        lines = freeze(lines, start_s, start_s + (2.5 if start_s == 6.0 else 0.8))
    write_lines(session / "metadata.jsonl", lines)
    zero_sound(session, (1, 1.6), (2.5, 4), (5, 5.4), (7, 9))
    assert masks(session) == {}


@pytest.mark.parametrize("pauses", [
    ((0.5, 1.6), (3, 4.2), (6, 7.1), (9, 9.7)), ((1, 2.1), (3, 4), (5.5, 6.5), (8, 9.2), (11, 12)),
])  # fmt: skip
def test_the_pauses_that_a_gate_cut_are_no_fault(
    session: Path, pauses: tuple[tuple[float, float], ...]
) -> None:
    zero_sound(session, *pauses)
    assert masks(session) == {}


def test_two_dropouts_are_masked(session: Path) -> None:
    zero_sound(session, (2, 3.2), (8, 9.5))
    assert [*masks(session)] == ["audio"]


def test_fractions_may_rest_unless_a_limit_says_otherwise(session: Path) -> None:
    write_lines(session / "metadata.jsonl", freeze(sensor_lines(DURATION_S), 3, 7, ("touch",)))
    assert masks(session) == {}
    declared = {n: spec.as_json() for n, spec in RECIPE.streams.items()}
    declared["touch"]["expect"] = {"max_still_s": 2.0}
    assert masks(session, streams=declared) == {"touch": [(3.0, 7.0)]}


def test_masked_zeros_do_not_raise_the_level(session: Path) -> None:
    whole = scan_session(session, recipe=RECIPE).gains["audio"]
    zero_sound(session, (6, 12))
    assert scan_session(session, recipe=RECIPE).gains["audio"] == pytest.approx(whole, rel=0.02)


def test_shards_mask_what_the_sessions_mask(session: Path, tmp_path: Path) -> None:
    freeze_left(session)
    freeze_proprio(session)
    zero_sound(session, (6, 9))
    build(session.parent, tmp_path / "out")
    reader = SessionReader(session, scan_session(session, recipe=RECIPE), recipe=RECIPE)
    segments = reader.scan.segments(RECIPE)
    num_rows = 0
    for _, index in open_indexes(tmp_path / "out"):
        for row in range(index.num_samples):
            segment = segments[index.segment(row)]
            second = segment.index
            still = {name: index.flags[row, i] & 1 for i, name in enumerate(index.streams)}
            assert {name for name, bit in still.items() if bit} == {
                name
                for name, (first_s, stop_s) in {
                    "vision_left": (4, 9), "proprio": (3, 7), "audio": (6, 9),
                }.items()
                if first_s <= second < stop_s
            }  # fmt: skip
            [(_, frames)] = reader.iter_frames("vision_left", [segment])
            error_s = index.arrays["vision_left.error_s"][row]
            np.testing.assert_array_equal(error_s, frames.error_s)
            assert np.isnan(error_s).all() == (4 <= second < 9)
            assert np.isnan(reader.read_sensor("proprio", segment)).all() == (3 <= second < 7)
            assert (reader.read_dmel("audio", segment) == 255).all() == (6 <= second < 9)
            num_rows += 1
    assert num_rows == DURATION_S


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=1, max_size=30),
    st.floats(0.05, 1.0),
)
def test_repeated_runs_are_those_of_a_slow_search(
    readings: list[tuple[int, int]], least_s: float
) -> None:
    times_s = np.cumsum([tenths / 10 for tenths, _ in readings])
    values = np.array([[value, 1] for _, value in readings], dtype=np.float32)
    stop_s = float(times_s[-1]) + 0.1
    expected, first = [], 0
    for i in range(1, len(readings) + 1):
        if i == len(readings) or readings[i][1] != readings[first][1]:
            end_s = times_s[i] if i < len(readings) else stop_s
            if i - first > 1 and end_s - times_s[first] >= least_s:
                expected.append(Interval(float(times_s[first]), float(end_s)))
            first = i
    assert repeated_runs(times_s, values, stop_s, least_s) == expected


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), max_size=12),
    st.floats(0.5, 4),
    st.sampled_from([0.2, 0.5]),
)
def test_only_long_runs_of_streams_that_seldom_rest_are_unusual(
    parts: list[tuple[float, float]], limit_s: float, share: float
) -> None:
    runs, now_s = [], 0.0
    for moving_s, still_s in parts:
        runs.append(Interval(now_s + moving_s, now_s + moving_s + still_s))
        now_s += moving_s + still_s
    interval = Interval(0.0, now_s + 1.0)
    found = unusual_runs(runs, interval, limit_s, share)
    assert all(run in runs and run.duration_s >= limit_s - 1e-6 for run in found)
    for run in found:
        others_s = sum(r.duration_s for r in runs if r != run)
        assert others_s <= share * (interval.duration_s - run.duration_s) + 1e-6
    alone = [run for run in runs[:1] if run.duration_s >= limit_s - 1e-6]
    assert unusual_runs(alone, interval, limit_s, share) == alone
