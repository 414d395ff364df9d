"""Segments as arrays, against what was recorded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import soundfile
from helpers.oracles import slow_interpolate, slow_mel_share, tiny_recipe
from helpers.sessions import brightness, sensor_lines, tone, write_lines, write_tone, write_video
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import Segment
from shared.errors import MediaError
from shared.kinds.audio import MASKED_LEVEL
from shared.kinds.video import split_evenly
from shared.media.tokenizer import train_tokenizer
from shared.session.reader import SessionReader
from shared.session.scan import scan_session

TOKENIZER = train_tokenizer(["reach", "got it"], vocab_size=300)


@pytest.fixture
def session(tmp_path):
    folder = tmp_path / "ann"
    folder.mkdir()
    return folder


def fields_of(session, recipe=None, tokenizer=TOKENIZER) -> SessionReader:
    recipe = recipe or tiny_recipe()
    scan = scan_session(session, recipe=recipe)
    return SessionReader(session, scan, recipe=recipe, tokenizer=tokenizer)


def frames_of(fields: SessionReader, *numbers: int, duration_s: float = 1.0):
    segments = [Segment(i, duration_s) for i in numbers]
    return {s.index: f for s, f in fields.iter_frames("vision_left", segments)}


def grays(frames) -> list[int]:
    return frames.pictures.mean(axis=(1, 2, 3)).round().astype(int).tolist()


# --- vision ----------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    gop=st.integers(1, 90),
    num_runs=st.integers(1, 12),
)
def test_runs_start_where_little_is_decoded_twice(steps, gop, num_runs):
    first = np.cumsum(steps)
    lead = np.where(first % (3 * gop) < 2 * gop, first % gop, np.inf)
    cuts = split_evenly(first, lead, num_runs)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(first), num_runs + 1)
    assert cuts == sorted(cuts)
    most = (first[-1] - first[0] + 1) / num_runs
    for place in set(cuts[1:]) - {len(first)}:
        assert lead[place] < most
    if (lead < most).all() and num_runs <= len(first):
        assert len(set(cuts)) == num_runs + 1  # no run is empty


@pytest.mark.parametrize("gop", [7, 12])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_runs_of_a_pass_show_the_bits_of_the_whole_pass(session, gop, is_damaged):
    path = session / "vision_left.mp4"
    write_video(path, times_s=np.arange(150) / 30, gop=gop, b_frames=2)
    if is_damaged:
        content = bytearray(path.read_bytes())
        for place in range(500, len(content) // 2, 150):
            content[place] ^= 0x10
        path.write_bytes(content)
    windows = [Segment(i, 0.4) for i in range(12)]
    recipe = tiny_recipe(segment={"duration_s": 0.4})
    whole = shown_in(fields_of(session, recipe), windows)
    cuts = fields_of(session, recipe).split_into_runs("vision_left", windows, 4)
    assert len(set(cuts)) == 5
    found = [
        shown_in(fields_of(session, recipe), windows[start:stop], decode_context=windows)
        for start, stop in pairwise(cuts)
    ]
    assert {i: bits for run in found for i, bits in run.items()} == whole


def shown_in(fields, windows, **more) -> dict[int, tuple[bytes, bytes]]:
    found = fields.iter_frames("vision_left", windows, **more)
    return {w.index: (f.pictures.tobytes(), f.error_s.tobytes()) for w, f in found}


def test_frames_are_those_nearest_in_time_to_the_grid(session):
    times_s = write_video(session / "vision_left.mp4", times_s=np.arange(60) / 30, b_frames=2)
    frames = frames_of(fields_of(session), 1)[1]
    grid_s = 1 + np.arange(5) / 5
    nearest = [int(np.abs(times_s - g).argmin()) for g in grid_s]
    np.testing.assert_allclose(grays(frames), [brightness(i) for i in nearest], atol=3)
    np.testing.assert_allclose(frames.error_s, times_s[nearest] - grid_s, atol=1e-6)
    assert frames.pictures.shape == (5, 32, 32, 3)


def test_a_segment_read_alone_has_the_frames_of_a_longer_pass(session):
    write_video(session / "vision_left.mp4", times_s=np.arange(90) / 30)
    together = frames_of(fields_of(session), 0, 1, 2)
    for number in range(3):
        alone = frames_of(fields_of(session), number)[number]
        np.testing.assert_array_equal(alone.pictures, together[number].pictures)


def test_frames_too_far_from_the_grid_are_masked(session):
    times_s = [0.0, 0.2, 0.4, 1.0, 1.2]
    write_video(session / "vision_left.mp4", times_s=times_s)
    frames = frames_of(fields_of(session, tiny_recipe(video={"max_error_s": 0.1})), 0)[0]
    np.testing.assert_array_equal(np.isfinite(frames.error_s), [True, True, True, False, False])


def test_a_missing_video_is_a_media_error(session):
    write_tone(session / "audio.wav")
    with pytest.raises(MediaError, match=r"vision_left\.mp4: no such file"):
        frames_of(fields_of(session), 0)


def test_a_segment_that_does_not_decode_is_left_out(session):
    path = session / "vision_left.mp4"
    write_video(path, times_s=np.arange(90) / 30, gop=30, b_frames=0)
    content = bytearray(path.read_bytes())
    place, size = content.find(b"mdat") + 4, len(content)
    third = (size - place) // 3
    content[place + third : place + 2 * third] = bytes(third)
    path.write_bytes(content)
    assert set(frames_of(fields_of(session), 0, 1, 2)) < {0, 1, 2}


# --- sound -----------------------------------------------------------------------------------


def test_sound_is_cut_at_the_sample_and_zero_beyond_the_recording(session):
    write_tone(session / "audio.wav", 1.5)
    fields = fields_of(session, tiny_recipe(audio={"loudness_dbfs": None}))
    recorded, _ = soundfile.read(session / "audio.wav", dtype="int16")
    first, late = (fields.read_audio("audio", Segment(i, 1.0)) for i in (0, 1))
    np.testing.assert_array_equal(first, recorded[:16_000])
    np.testing.assert_array_equal(late, np.pad(recorded[16_000:], (0, 8000)))


def test_the_gain_is_that_of_the_whole_session(session):
    loud_then_quiet = np.concatenate([tone(1.0, level=0.5), tone(1.0, level=0.05)])
    soundfile.write(session / "audio.wav", loud_then_quiet, 16_000)
    fields = fields_of(session)
    rms = np.sqrt(np.mean(loud_then_quiet**2))
    expected = loud_then_quiet * 10 ** (-23 / 20) / rms * 32768
    found = np.concatenate([fields.read_audio("audio", Segment(i, 1.0)) for i in (0, 1)])
    np.testing.assert_allclose(found, expected, atol=1.01)


def test_mel_levels_depend_on_the_session_before_the_segment(session):
    rng = np.random.default_rng(0)
    soundfile.write(session / "audio.wav", rng.normal(0, 0.1, 24_000), 16_000)
    recipe = tiny_recipe()
    fields = fields_of(session, recipe)
    levels = fields.read_dmel("audio", Segment(1, 1.0))
    samples = np.concatenate([fields.read_audio("audio", Segment(i, 1.0)) for i in (0, 1)])[:24_000]
    share = slow_mel_share(samples, 16_000, 50, rate_hz=16_000, settings=recipe.audio.dmel)[:25]
    is_border = np.abs(share % 1 - 0.5) < 1e-3
    expected = np.clip(np.round(share), 0, 15)
    np.testing.assert_array_equal(levels[:25][~is_border], expected[~is_border])
    assert (levels[:25] < 16).all()
    assert (levels[25:] == MASKED_LEVEL).all()


# --- sensors ---------------------------------------------------------------------------------


def test_sensors_are_interpolated_and_masked_in_gaps(session):
    lines = [m for m in sensor_lines(1.0) if not 0.3 < m["timestamp"] < 0.6]
    write_lines(session / "metadata.jsonl", lines)
    fields = fields_of(session)
    times_s = [m["timestamp"] for m in lines]
    for name in ("touch", "proprio"):
        found = fields.read_sensor(name, Segment(0, 1.0))
        for t, time_s in enumerate(np.arange(30) / 30):
            for d in range(found.shape[1]):
                values = [m[name][d] for m in lines]
                expected = slow_interpolate(times_s, values, time_s, max_gap_s=0.1, edge_s=1 / 60)
                if expected is None:
                    assert np.isnan(found[t, d])
                else:
                    assert found[t, d] == pytest.approx(expected, abs=1e-5)
        valid = np.isfinite(found).all(axis=1)
        assert valid.tolist() == [not 0.31 < t < 0.59 for t in np.arange(30) / 30]


def test_the_recorders_clock_is_brought_onto_the_sessions(session):
    write_video(session / "vision_left.mp4")
    moved = [{**m, "timestamp": m["timestamp"] + 12.7} for m in sensor_lines(2.0)]
    write_lines(session / "metadata.jsonl", moved)
    fields = fields_of(session)
    assert fields.scan.clock_offset_s == pytest.approx(12.7)
    touch = fields.read_sensor("touch", Segment(0, 1.0))
    np.testing.assert_allclose(touch[0], sensor_lines(2.0)[0]["touch"], atol=1e-5)


def test_half_of_the_proprio_values_are_angles_and_touch_has_none(session):
    lines = [
        {"timestamp": t, "touch": [0.0] * 5, "proprio": [p] * 20}
        for t, p in ((0.0, 3.1), (0.1, -3.1))
    ]
    write_lines(session / "metadata.jsonl", lines)
    recipe = tiny_recipe(sensor={"rate_hz": 20, "max_gap_s": 0.1})
    middle = fields_of(session, recipe).read_sensor("proprio", Segment(0, 1.0))[1]
    assert (np.abs(middle[:10]) > 3.1).all()
    np.testing.assert_allclose(middle[10:], 0, atol=1e-6)


# --- text ------------------------------------------------------------------------------------


def test_each_event_is_in_the_segment_in_which_it_begins(session):
    write_tone(session / "audio.wav", 2.0)
    events = [
        {"timestamp": 0.0, "stream": "internal", "text": "reach"},
        {"timestamp": 1.0, "stream": "external", "text": "got it"},
        {"timestamp": 0.95, "stream": "internal", "text": "reach"},
    ]
    write_lines(session / "text.jsonl", events)
    fields = fields_of(session)
    first, second = (fields.read_text("internal_text", Segment(i, 1.0)) for i in (0, 1))
    reach = TOKENIZER.encode("reach")
    assert first.ids + second.ids == (*reach, *reach)
    assert first.event_s + second.event_s == (0.0,) * len(reach) + (0.95,) * len(reach)
    assert [e.text for e in first.events] == ["reach", "reach"]
    assert not second.events
    assert all(time_s < 1 for time_s in first.time_s)
    assert all(time_s >= 1 for time_s in second.time_s)
    assert len(reach) == 1 or second.ids  # a long text goes on in the next segment
    spoken = fields.read_text("external_text", Segment(1, 1.0))
    assert TOKENIZER.decode(spoken.ids) == "got it"
    assert [(e.time_s, e.text) for e in spoken.events] == [(1.0, "got it")]


def test_text_without_a_tokenizer_says_what_is_missing(session):
    write_lines(session / "text.jsonl", [{"timestamp": 0, "stream": "internal", "text": "a"}])
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        fields_of(session, tokenizer=None).read_text("internal_text", Segment(0, 1.0))


@pytest.mark.parametrize("time", ["t", "timestamp"])
def test_texts_beside_sensors_are_read_at_their_declared_time(tmp_path, time):
    sensor = {"kind": "sensor", "key": "v", "values": [{"count": 1, "type": "scalar"}]}
    declared = {"time": time, "time_unit": "ms"}
    recipe = tiny_recipe(
        streams={
            "v": {**sensor, "time": "t", "time_unit": "ms"},
            "said": {"kind": "text", "file": "metadata.jsonl", "key": "said", **declared},
        }
    )
    lines = [{"t": i * 20, "v": i} for i in range(100)]
    lines[60] |= {"said": "hi", time: 1200}
    write_lines(tmp_path / "metadata.jsonl", lines)
    text = fields_of(tmp_path, recipe).read_text("said", Segment(1, recipe.segment_s))
    assert [(event.time_s, event.text) for event in text.events] == [(1.2, "hi")]
    assert text.ids == tuple(TOKENIZER.encode("hi"))
