"""Scan a session: coverage of segments, and reasons for what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from helpers import plans
from helpers.oracles import tiny_recipe
from helpers.plans import scan_from_json
from helpers.sessions import sensor_lines, write_lines, write_tone
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import MaskedSpan
from shared.session.reader import SessionReader
from shared.session.scan import SessionScan, scan_session
from shared.streams import MaskReason


@pytest.fixture
def session(tmp_path):
    folder = tmp_path / "ann"
    folder.mkdir()
    return folder


def test_coverage_says_what_share_of_each_window_a_stream_covers(session):
    write_tone(session / "audio.wav", 2.25)
    write_lines(session / "metadata.jsonl", sensor_lines(1.5))
    scan = scan_session(session, recipe=tiny_recipe())
    assert scan.coverage["audio"] == (1.0, 1.0, 0.25)
    assert scan.coverage["touch"] == pytest.approx([1.0, 0.5, 0.0], abs=1 / 30)
    assert "vision_left" not in scan.coverage
    assert [scan.present(i) for i in range(3)] == [
        ("audio", "proprio", "touch"),
        ("audio", "proprio", "touch"),
        ("audio",),
    ]


def test_a_required_stream_must_cover_enough_of_a_segment(session):
    write_tone(session / "audio.wav", 2.25)
    recipe = tiny_recipe(required=["audio"])
    scan = scan_session(session, recipe=recipe)
    assert scan.stored_segments(recipe) == [0, 1]
    assert "audio covers 25% of [2, 3) s" in scan.rejections(recipe).get(2)
    lenient = tiny_recipe(required=["audio"], segment={"min_coverage": 0.2})
    assert scan.stored_segments(lenient) == [0, 1, 2]


def test_a_segment_with_nothing_but_silent_text_is_rejected(session):
    write_lines(
        session / "text.jsonl",
        [
            {"timestamp": 0.5, "stream": "internal", "text": "a"},
            {"timestamp": 3.5, "stream": "internal", "text": "b"},
        ],
    )
    recipe = tiny_recipe()
    scan = scan_session(session, recipe=recipe)
    assert scan.silent == (False, True, True, False, True)
    assert scan.stored_segments(recipe) == [0, 3]
    assert "nothing but silent text" in scan.rejections(recipe).get(1)


def slow_rejection(scan, segment, recipe):
    """Explain why one segment is not stored, by itself; None if it is."""
    present, minimum = scan.present(segment), recipe.segment.min_coverage
    required = {n: scan.coverage[n][segment] if n in present else 0.0 for n in recipe.required}
    missing = {n: share for n, share in required.items() if n not in present or share < minimum}
    start_s, stop_s = segment * recipe.segment_s, (segment + 1) * recipe.segment_s
    where = f"of [{start_s:g}, {stop_s:g}) s"
    if missing:
        causes = ", ".join(
            f"{name} covers {share:.0%}{scan.describe_masks(name, start_s, stop_s)}"
            for name, share in missing.items()
        )
        return f"{causes} {where}; segment.min_coverage asks for {minimum:.0%}"
    if not present:
        masks = [
            f"{name} is masked{message}"
            for name in scan.masked
            if (message := scan.describe_masks(name, start_s, stop_s))
        ]
        return "; ".join([f"no stream covers any {where}", *masks])
    if scan.silent[segment] and set(present) <= recipe.texts.keys():
        return f"nothing but silent text {where}"
    return None


STREAMS = st.sampled_from(sorted(plans.RECIPE.streams))
SHARES = st.sampled_from([0.0, 1e-6, 0.5, 0.8, 1.0])


@given(values=st.data(), required=st.sets(STREAMS, max_size=2))
def test_all_rejections_at_once_are_those_of_each_segment(values, required):
    recipe = tiny_recipe(required=sorted(required))
    num = values.draw(st.integers(1, 5))
    of_segments = st.lists(SHARES, min_size=num, max_size=num).map(tuple)
    names = STREAMS
    span = MaskedSpan(0.0, 2.0, MaskReason.STILL, "it stands still")
    scan = plans.scan(
        "a",
        num,
        coverage=values.draw(st.dictionaries(names, of_segments)),
        silent=values.draw(st.lists(st.booleans(), min_size=num, max_size=num).map(tuple)),
        masked=values.draw(st.dictionaries(names, st.just((span,)), max_size=2)),
    )
    each = {number: slow_rejection(scan, number, recipe) for number in range(num)}
    rejections = scan.rejections(recipe)
    assert list(rejections.items()) == [(n, reason) for n, reason in each.items() if reason]
    assert scan.stored_segments(recipe) == [n for n, reason in each.items() if reason is None]


def test_a_session_that_is_stored_whole_asks_for_no_reason(monkeypatch):
    calls = []
    monkeypatch.setattr(SessionScan, "_explain_rejection", lambda *_args: calls.append(1))
    scan = plans.scan("a", 1000)
    assert scan.stored_segments(tiny_recipe(required=["audio"])) == [*range(1000)]
    assert calls == []


def test_one_wrong_timestamp_does_not_make_a_billion_segments(session):
    write_tone(session / "audio.wav", 2.0)
    wrong = {"timestamp": 1e9, "touch": [0] * 5, "proprio": [0] * 20}
    write_lines(session / "metadata.jsonl", [*sensor_lines(1.0), wrong])
    scan = scan_session(session, recipe=tiny_recipe(segment={"duration_s": 600}))
    assert scan.duration_s == 2.0
    assert any("line 31: timestamp 1000000000.000 s is" in what for what in scan.issues)
    rare = [{"timestamp": i * 100.0, "touch": [0] * 5} for i in range(1000)]
    write_lines(session / "metadata.jsonl", rare)
    scan = scan_session(session, recipe=tiny_recipe(segment={"duration_s": 600}))
    assert scan.duration_s == 24 * 3600
    assert any("a timestamp must be wrong" in what for what in scan.issues)


@pytest.mark.parametrize(
    ("rate_hz", "keys", "words"),
    [
        (30, {}, None),
        (27.1, {}, None),
        (26.9, {}, "interpolated; fix: set `resample: hold`"),
        (11, {}, "interpolated; fix: set `resample: hold`"),
        (9, {}, "so most is masked; fix: set `resample: hold`"),
        (9, {"max_gap_s": 0.2}, "interpolated; fix: set `resample: hold`"),
        (9, {"resample": "hold"}, None),
    ],
)
def test_a_sensor_slower_than_its_rate_is_reported_unless_it_holds(session, rate_hz, keys, words):
    write_lines(session / "metadata.jsonl", sensor_lines(rate_hz=rate_hz))
    touch = {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "scalar"}], **keys}
    scan = scan_session(session, recipe=tiny_recipe(streams={"touch": {**touch, "rate_hz": 30}}))
    assert set(scan.slow) == ({"touch"} if words else set())
    begin = f"metadata.jsonl: touch is recorded at {rate_hz:.3g} Hz, its rate_hz is 30; "
    assert all(s.startswith(begin) and words in s for s in scan.slow.values())
    assert scan_from_json(scan.as_json()) == scan


def test_channels_are_mixed_as_the_scan_says(session):
    tones = [0.3 * np.sin(np.arange(32_000) / step) for step in (9, 8)]
    soundfile.write(session / "audio.wav", np.stack([tones[0], -tones[0]], axis=1), 16_000)
    recipe = tiny_recipe()
    scan = scan_session(session, recipe=recipe)
    assert scan.mixes["audio"].weights == (1, -1)
    assert any("channel 1 is inverted" in issue for issue in scan.issues)
    assert scan_from_json(scan.as_json()) == scan
    reader = SessionReader(session, scan, recipe=recipe)
    waveform = reader.read_audio("audio", scan.segments(recipe)[1]).astype(np.float64)
    assert np.corrcoef(waveform, tones[0][16_000:])[0, 1] > 0.999
    mean = tiny_recipe(
        streams={"audio": {"kind": "audio", "file": "audio.wav", "channels": "mean"}}
    )
    scan = scan_session(session, recipe=mean)
    assert (scan.mixes, scan.levels["audio"] < 1e-4) == ({}, True)


def test_a_scan_comes_back_from_its_json(session):
    write_tone(session / "audio.wav", 2.0)
    (session / "metadata.jsonl").write_text("no json\n", encoding="utf-8")
    scan = scan_session(session, recipe=tiny_recipe())
    assert scan_from_json(scan.as_json()) == scan


def test_scans_from_json_share_equal_values_and_keep_their_types():
    scans = [
        plans.scan(name, 2, tail=0.0, silent=silent)
        for name in "abc"
        for silent in ((True, False), (False, True))
    ]
    read = [scan_from_json(scan.as_json()) for scan in scans]
    assert [repr(scan) for scan in read] == [repr(scan) for scan in scans]
    assert len({id(shares) for scan in read for shares in scan.coverage.values()}) == 1
    assert len({id(scan.silent) for scan in read}) == 2


def test_a_scan_does_not_depend_on_the_folder_of_the_session(session, tmp_path):
    (session / "audio.wav").write_bytes(b"garbage")
    (session / "vision_left.mp4").write_bytes(b"")
    moved = tmp_path / "elsewhere" / "ann"
    first = scan_session(session, recipe=tiny_recipe())
    moved.parent.mkdir()
    session.rename(moved)
    assert scan_session(moved, recipe=tiny_recipe()) == first


def test_only_streams_without_any_recording_are_not_recorded(session):
    (session / "vision_left.mp4").write_bytes(b"not a video")
    write_lines(session / "metadata.jsonl", [{"timestamp": 0, "touch": [0.5] * 5}])
    scan = scan_session(session, recipe=tiny_recipe())
    assert set(scan.absent) - scan.not_recorded == {"vision_left"}
    assert set(scan.intervals) == {"touch"}


def test_with_wrong_starts_media_are_absent_but_not_called_unrecorded(session):
    (session / "session.json").write_text('{"start_s": 3}')
    scan = scan_session(session, recipe=tiny_recipe())
    assert "audio" in set(scan.absent) - scan.not_recorded
