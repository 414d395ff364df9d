"""Streams that began apart are aligned in the shards: clicks, flashes, pulses and words at the same
known times, with the starts that containers, timestamps and ``session.json`` give.

Events are in ticks of 40 ms of the world's clock. In what stock readers find in a shard set, and in
what the direct path gives, the tests look for the ticks with white pictures and rising dMel levels.
"""

from __future__ import annotations

import io
import json
import shutil
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import soundfile
import zarr
from helpers.oracles import build, file_hashes, jsonl, open_indexes, tar_members, tiny_recipe
from helpers.sessions import sensor_lines, write_lines, write_streams, write_table, write_tone
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build.plan_types import FromShards
from shared.clock import Interval
from shared.media.sound import read_sound
from shared.media.tokenizer import train_tokenizer
from shared.media.video import read_video_track
from shared.recipe import Recipe
from shared.session.alignment import Placement, align_streams, read_placement
from shared.session.lines import FileLines, Readings, SessionLines, TextEvent
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from train.data.session_source import SessionSource

if TYPE_CHECKING:
    from pathlib import Path

TICKS_PER_S, TICK_S = 25, 0.04
RATE_HZ = 48_000
LENGTH_S = 4
EVENTS = [30, 41, 55, 74, 90]
"""Ticks of the world's clock in which there is a flash and a click."""

MIN_RISE = 2.0
"""Mean levels by which dMel rises where a click begins."""

RECIPE = tiny_recipe(
    required=["vision_left"],
    segment={"min_coverage": 0.01},
    video={"rate_hz": TICKS_PER_S, "codec": "raw", "fit": "stretch"},
    audio={"dmel": {"rate_hz": TICKS_PER_S, "fft_size": 640}},
)


# --- recordings --------------------------------------------------------------------------------


def world_sound(start_s: float) -> np.ndarray:
    """Return the world's audio from a time on: 10 ms clicks in the middle of each event's tick."""
    rng = np.random.default_rng(0)
    sound = rng.uniform(-1e-4, 1e-4, LENGTH_S * RATE_HZ).astype(np.float32)
    for tick in EVENTS:
        first = round((tick + 0.4) * TICK_S * RATE_HZ)
        sound[first : first + RATE_HZ // 100] = rng.uniform(-0.9, 0.9, RATE_HZ // 100)
    return sound[round(start_s * RATE_HZ) :]


def mux(
    path: Path,
    *,
    video_from: int | None = None,
    video_at_s: float = 0.0,
    video_pace: float = 1.0,
    sound_from_s: float | None = None,
    sound_at_s: float = 0.0,
    codec: str = "aac",
    container: str = "mp4",
) -> None:
    """Write pictures from a tick on, and audio from a time on, at times of the container."""
    with av.open(str(path), "w", format=container) as output:
        streams: list[tuple[Any, list[Any]]] = []
        if video_from is not None:
            stream = output.add_stream("libx264", rate=TICKS_PER_S, options={"crf": "10"})
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            frames = []
            for tick in range(video_from, LENGTH_S * TICKS_PER_S):
                gray = np.full((32, 32, 3), 255 if tick in EVENTS else 0, np.uint8)
                frames.append(av.VideoFrame.from_ndarray(gray, format="rgb24"))
                frames[-1].pts = round(
                    1000 * (video_at_s + (tick - video_from) * TICK_S / video_pace)
                )
                frames[-1].time_base = Fraction(1, 1000)
            streams.append((stream, frames))
        if sound_from_s is not None:
            stream = output.add_stream(codec, rate=RATE_HZ, layout="mono")
            samples = world_sound(sound_from_s)
            blocks = []
            for first in range(0, len(samples), 960):
                block = samples[None, first : first + 960]
                blocks.append(av.AudioFrame.from_ndarray(block, format="fltp", layout="mono"))
                blocks[-1].sample_rate, blocks[-1].time_base = RATE_HZ, Fraction(1, RATE_HZ)
                blocks[-1].pts = round(sound_at_s * RATE_HZ) + first
            streams.append((stream, blocks))
        for stream, frames in streams:
            for frame in frames:
                output.mux(stream.encode(frame))
            output.mux(stream.encode())


def declare(session: Path, **start_s: float) -> None:
    (session / "session.json").write_text(json.dumps({"by": "hand", "start_s": start_s}))


def in_one_container(session: Path, codec: str, container: str) -> None:
    """Write both streams into one file, the audio 0.936 s later, under both names."""
    mux(
        session / "vision_left.mp4",
        video_from=0,
        sound_from_s=0.936,
        sound_at_s=0.936,
        codec=codec,
        container=container,
    )
    shutil.copy(session / "vision_left.mp4", session / "audio.wav")


def late_video_in_one_container(session: Path) -> None:
    """Write both streams into one file, the video 0.8 s later by an empty edit."""
    mux(session / "vision_left.mp4", video_from=20, video_at_s=0.8, sound_from_s=0.0)
    shutil.copy(session / "vision_left.mp4", session / "audio.wav")


def late_wav(session: Path) -> None:
    """Write a plain WAV that began 0.35 s after the video."""
    mux(session / "vision_left.mp4", video_from=0)
    soundfile.write(session / "audio.wav", world_sound(0.35), RATE_HZ, subtype="FLOAT")
    declare(session, audio=0.35)


def early_wav(session: Path) -> None:
    """Write a video that began 0.8 s after a plain WAV, whose clock the session uses."""
    mux(session / "vision_left.mp4", video_from=20)
    soundfile.write(session / "audio.wav", world_sound(0.0), RATE_HZ, subtype="FLOAT")
    declare(session, vision_left=0.8)


def sound_before_the_clock(session: Path) -> None:
    """Write a WAV that began 0.48 s before the video, which starts the clock at tick 12."""
    mux(session / "vision_left.mp4", video_from=12, video_at_s=3.0)
    soundfile.write(session / "audio.wav", world_sound(0.0), RATE_HZ, subtype="FLOAT")
    declare(session, audio=-0.48)


def declared_at_a_wrong_rate(session: Path) -> None:
    """Write 24 pictures per second as 25, late, and a WAV of 48,000 samples as 50,000."""
    mux(session / "vision_left.mp4", video_from=10, video_pace=25 / 24)
    soundfile.write(session / "audio.wav", world_sound(0.0), 50_000, subtype="FLOAT")
    starts, stretch = {"vision_left": 0.4}, {"vision_left": 25 / 24, "audio": 50 / 48}
    (session / "session.json").write_text(json.dumps({"start_s": starts, "stretch": stretch}))


RECORDINGS = {
    "aac in mp4": (lambda s: in_one_container(s, "aac", "mp4"), 0),
    "opus in matroska": (lambda s: in_one_container(s, "libopus", "matroska"), 0),
    "aac in a transport stream": (lambda s: in_one_container(s, "aac", "mpegts"), 0),
    "empty edit before the video": (late_video_in_one_container, 0),
    "wav declared late": (late_wav, 0),
    "video declared late": (early_wav, 0),
    "wav declared before the clock": (sound_before_the_clock, 12),
    "rates declared wrong": (declared_at_a_wrong_rate, 0),
}
"""Functions that write a session, and the world's tick at which its clock is zero."""


# --- what is stored ------------------------------------------------------------------------------


def flashes(pictures: dict[int, np.ndarray]) -> list[int]:
    """List the ticks with white pictures."""
    return sorted(tick for tick, picture in pictures.items() if picture.mean() > 128)


def clicks(levels: dict[int, np.ndarray]) -> list[int]:
    """List the ticks in which the dMel levels rise."""
    means = {tick: level.mean() for tick, level in levels.items()}
    return sorted(t for t, mean in means.items() if mean - means.get(t - 1, mean) > MIN_RISE)


def stored(out: Path) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Read valid pictures and dMel levels of a set by tick of its session, with stock readers."""
    pictures, levels = {}, {}
    for shard, index in open_indexes(out):
        members = tar_members(out / f"{shard}.vision_left.tar")
        with zarr.storage.ZipStore(out / f"{shard}.audio.dmel.zarr.zip", mode="r") as store:
            dmel = zarr.open_group(store, mode="r")["dmel"][:]
        for row in range(index.num_samples):
            first = int(index.arrays["segment"][row]) * TICKS_PER_S
            errors_s = index.arrays["vision_left.error_s"][row]
            member = members.get(f"{index.key(row)}.vision_left.npy")
            for i in range(TICKS_PER_S):
                if member is not None and abs(errors_s[i]) < TICK_S / 2:
                    pictures[first + i] = np.load(io.BytesIO(member))[i]
                if (dmel[row, i] != 255).any():
                    levels[first + i] = dmel[row, i]
    return pictures, levels


def write_recording(name: str, folder: Path) -> int:
    """Write a recording; return the world's tick at which its clock is zero."""
    folder.mkdir(parents=True)
    write, zero = RECORDINGS[name]
    write(folder)
    return zero


@pytest.mark.parametrize("name", RECORDINGS)
def test_clicks_and_flashes_of_one_time_are_stored_in_one_tick(name: str, tmp_path: Path) -> None:
    zero = write_recording(name, tmp_path / "in" / "one")
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    pictures, levels = stored(tmp_path / "out")
    expected = [tick - zero for tick in EVENTS]
    assert flashes(pictures) == expected
    assert clicks(levels) == expected


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_direct_path_agrees_to_the_bit(name: str, tmp_path: Path) -> None:
    write_recording(name, tmp_path / "in" / "one")
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    scan = scan_session(tmp_path / "in" / "one", recipe=RECIPE)
    reader = SessionReader(tmp_path / "in" / "one", scan, recipe=RECIPE)
    segments = scan.segments(RECIPE)
    pictures, levels = {}, {}
    for segment, frames in reader.iter_frames("vision_left", segments):
        for i in np.flatnonzero(np.abs(frames.error_s) < TICK_S / 2):
            pictures[segment.index * TICKS_PER_S + int(i)] = frames.pictures[i]
    for segment in segments:
        for i, level in enumerate(reader.read_dmel("audio", segment)):
            if (level != 255).any():
                levels[segment.index * TICKS_PER_S + i] = level
    for direct, read in zip((pictures, levels), stored(tmp_path / "out"), strict=True):
        assert direct.keys() == read.keys()
        for tick, value in direct.items():
            np.testing.assert_array_equal(value, read[tick])


def test_sound_before_it_began_is_masked_and_its_samples_are_zero(tmp_path: Path) -> None:
    late_wav(tmp_path)
    scan = scan_session(tmp_path, recipe=RECIPE)
    reader = SessionReader(tmp_path, scan, recipe=RECIPE)
    segment = scan.segments(RECIPE)[0]
    samples, dmel = reader.read_audio("audio", segment), reader.read_dmel("audio", segment)
    plain = soundfile.read(tmp_path / "audio.wav", dtype="float32")[0]
    first = round(0.35 * RECIPE.audio.rate_hz)
    assert not samples[:first].any()
    assert samples[first : first + 100].any()
    assert scan.intervals["audio"].start_s == 0.35
    assert scan.intervals["audio"].stop_s == pytest.approx(0.35 + len(plain) / RATE_HZ)
    assert (dmel != 255).all(axis=1).tolist() == [k * TICK_S >= 0.35 for k in range(TICKS_PER_S)]
    assert scan.coverage["audio"][0] == pytest.approx(0.65)


def test_a_container_of_nothing_but_sound_begins_with_it(tmp_path: Path) -> None:
    mux(tmp_path / "a.m4a", sound_from_s=0.0, sound_at_s=0.936)
    sound = read_sound(tmp_path / "a.m4a", rate_hz=16_000)
    assert (sound.start_s, round(sound.origin_s, 2)) == (0.0, 0.91)  # less the encoder's delay


def test_a_videos_own_container_start_is_reported_and_counts_as_zero(tmp_path: Path) -> None:
    mux(tmp_path / "a.mp4", video_from=0, video_at_s=0.8)
    track = read_video_track(tmp_path / "a.mp4")
    assert (track.times_s[0], track.origin_s) == (0.0, 0.8)
    mux(tmp_path / "a.ts", video_from=0, video_at_s=0.8, container="mpegts")
    assert read_video_track(tmp_path / "a.ts").origin_s == 0  # theirs begin anywhere


# --- session.json --------------------------------------------------------------------------------

BAD_STARTS = {
    '{"start_s": {"touch": NaN}}': "start_s of touch is nan; fix: write seconds",
    '{"start_s": {"audio": Infinity}}': "start_s of audio is inf; fix: write seconds",
    '{"start_s": {"audio": 1e9}}': "start_s of audio is 1000000000.0; fix: write seconds",
    '{"start_s": {"audio": "0.35"}}': "start_s of audio is 0.35; fix: write seconds",
    '{"start_s": {"internal_text": true}}': "start_s of internal_text is True; fix: write seconds",
    '{"start_s": {"audio": null}}': "start_s of audio is None; fix: write seconds",
    '{"start_s": {"audio": [0.35]}}': "start_s of audio is [0.35]; fix: write seconds",
    '{"start_s": 0.35}': 'start_s is not an object; fix: write {"NAME": 1.0}',
    '{"stretch": {"audio": 3}}': "stretch of audio is 3; fix: write a factor of 0.5 to 2",
    '{"stretch": {"audio": true}}': "stretch of audio is True; fix: write a factor of 0.5 to 2",
    '{"stretch": [1.04]}': 'stretch is not an object; fix: write {"NAME": 1.0}',
    '{"start_s": {"audio": 0.35': "contains start_s but is not JSON; fix: correct its syntax",
}


@pytest.mark.parametrize("content", BAD_STARTS)
def test_an_impossible_start_leaves_all_streams_out_with_the_reason(
    content: str, tmp_path: Path
) -> None:
    session = write_streams(tmp_path / "in" / "one", tiny_recipe())
    (session / "session.json").write_text(content)
    placement = read_placement(session, tiny_recipe())
    error = placement.error
    assert placement == Placement(error=error)
    assert str(error).startswith(f"session.json: {BAD_STARTS[content]}")
    scan = scan_session(session, recipe=tiny_recipe())
    assert scan.absent == dict.fromkeys(tiny_recipe().streams, error)
    assert not scan.not_recorded
    assert str(error) in scan.session_rejection(tiny_recipe())


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"by": ', '{"start_s": null}', "\0"])
def test_session_info_without_starts_shifts_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "session.json").write_text(content)
    assert read_placement(tmp_path, RECIPE) == Placement()


def test_starts_of_undeclared_streams_are_ignored_and_reported(tmp_path: Path) -> None:
    write_tone(tmp_path / "audio.wav")
    declare(tmp_path, microphone=0.25, wrist=1, audio=0.5)
    assert read_placement(tmp_path, RECIPE) == Placement(
        starts={"audio": 0.5}, undeclared=("microphone", "wrist")
    )
    (sentence,) = scan_session(tmp_path, recipe=RECIPE).issues
    assert sentence.startswith("session.json: 'microphone' in start_s or stretch is ignored")
    assert sentence.endswith("fix: correct the name (and 1 more such lines)")


def test_another_start_rebuilds_the_columns_of_that_stream_and_no_others(
    tmp_path: Path,
) -> None:
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        mux(tmp_path / "in" / name / "vision_left.mp4", video_from=0)
        write_tone(tmp_path / "in" / name / "audio.wav", 3.5)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    before = file_hashes(tmp_path / "out")
    declare(tmp_path / "in" / "one")
    assert build(tmp_path / "in", tmp_path / "out", RECIPE).plan.is_empty
    declare(tmp_path / "in" / "one", vision_left=0.0, audio=0.0)
    assert build(tmp_path / "in", tmp_path / "out", RECIPE).plan.is_empty  # as before
    assert file_hashes(tmp_path / "out") == before
    declare(tmp_path / "in" / "one", audio=0.4)
    (task,) = build(tmp_path / "in", tmp_path / "out", RECIPE).plan.tasks
    assert set(task.columns) == {"audio", "audio.dmel"}
    sources = task.columns["audio"].sources
    assert {n for n, source in sources.items() if isinstance(source, FromShards)} == {"two"}
    build(tmp_path / "in", tmp_path / "fresh", RECIPE)
    contents = [sorted(file_hashes(tmp_path / out).values()) for out in ("out", "fresh")]
    columns = [{h for h in hashes if h not in before.values()} for hashes in contents]
    assert len(columns[0] & columns[1]) >= 2  # the two columns are those of a fresh build


def test_a_start_is_part_of_the_fingerprint_of_sessions_read_directly(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_tone(tmp_path / "one" / "audio.wav")
    write_lines(tmp_path / "one" / "metadata.jsonl", [{"timestamp": 0, "touch": [0.5] * 5}])
    fingerprints = set()
    for starts in ({}, {"audio": 0.25}, {"touch": 0.25}, {"touch": 0.5}):
        declare(tmp_path / "one", **starts)
        fingerprints.add(SessionSource(tmp_path, recipe=tiny_recipe()).fingerprint)
    assert len(fingerprints) == 4


def test_a_wrong_start_is_the_reason_of_the_rejection(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write_tone(tmp_path / "in" / name / "audio.wav")
    (tmp_path / "in" / "bad" / "session.json").write_text('{"start_s": {"audio": "x"}}')
    build(tmp_path / "in", tmp_path / "out", tiny_recipe())
    (line,) = (o for o in jsonl(tmp_path / "out" / "rejected.jsonl") if o["level"] == "session")
    assert line["session"] == "bad"
    assert "start_s of audio is x" in line["reason"]


# --- streams with timestamps ---------------------------------------------------------------------

PULSES_S = [0.6, 1.3, 2.54]
"""World's seconds at which every sensor has a pulse, and a word is said."""

SENSOR_HZ = 50
UNRESET_S = 1000.0
"""The recorder's clock at the world's zero."""

_SCALAR = {"kind": "sensor", "rate_hz": SENSOR_HZ, "values": [{"count": 1, "type": "scalar"}]}
PULSED = Recipe.model_validate(
    {
        "segment": {"duration_s": 1.0},
        "text": {"vocab_size": 300},
        "split": {"val_fraction": 0.0},
        "streams": {
            "mic": {"kind": "audio", "file": "mic.wav"},
            "a": {**_SCALAR, "key": "a"},
            "b": {**_SCALAR, "file": "b.csv", "key": "b", "time": "ns", "time_unit": "ns"},
            "own": {**_SCALAR, "file": "own.parquet", "key": "x", "clock": "own"},
            "placed": {**_SCALAR, "file": "placed.jsonl", "key": "x", "time_unit": "ms"},
            "missing": {**_SCALAR, "file": "missing.csv", "key": "x"},
            "words": {"kind": "text", "file": "words.jsonl"},
            "own_words": {"kind": "text", "file": "own_words.jsonl", "clock": "own"},
            "placed_words": {"kind": "text", "file": "placed_words.jsonl"},
        },
    }
)
PULSED_SENSORS = ("a", "b", "own", "placed")
PULSED_TEXTS = ("words", "own_words", "placed_words")


@pytest.fixture(scope="module")
def pulsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a session whose streams have four clocks."""
    folder = tmp_path_factory.mktemp("in") / "one"
    folder.mkdir()
    write_tone(folder / "mic.wav", 3.0)
    ticks = np.arange(3 * SENSOR_HZ)
    times_s = (ticks / SENSOR_HZ).round(6)
    values = np.isin(ticks, np.round(np.array(PULSES_S) * SENSOR_HZ)).astype(float)
    rows = list(zip(times_s.tolist(), values.tolist(), strict=True))
    write_lines(folder / "metadata.jsonl", [{"timestamp": UNRESET_S + t, "a": v} for t, v in rows])
    ns = [round((UNRESET_S + t) * 1e9) for t in times_s]
    write_table(folder / "b.csv", {"ns": ns[20:], "b": values[20:]}, delimiter=";", decimal=",")
    write_table(folder / "own.parquet", {"timestamp": times_s, "x": values})
    write_lines(
        folder / "placed.jsonl", [{"timestamp": 77_000 + 1000 * t, "x": v} for t, v in rows[10:]]
    )
    write_table(folder / "missing.csv", {"timestamp": 5000 + times_s, "x": values})
    for name, zero_s in (("words", UNRESET_S), ("own_words", 0.0), ("placed_words", -40.0)):
        lines = [{"timestamp": zero_s + t, "text": f"word {t}"} for t in PULSES_S]
        write_lines(folder / f"{name}.jsonl", lines)
    declare(folder, placed=0.2, placed_words=PULSES_S[0])
    return folder


def test_every_clock_gives_pulses_and_words_of_one_time_in_the_set(
    pulsed: Path, tmp_path: Path
) -> None:
    build(pulsed.parent, tmp_path / "out", PULSED)
    ((shard, index),) = open_indexes(tmp_path / "out")
    assert [index.segment(row) for row in range(index.num_samples)] == [0, 1, 2]
    for name in PULSED_SENSORS:
        with zarr.storage.ZipStore(
            tmp_path / "out" / f"{shard}.{name}.zarr.zip", mode="r"
        ) as store:
            values = zarr.open_group(store, mode="r")[name][:].ravel()
        assert (np.flatnonzero(values > 0.5) / SENSOR_HZ).tolist() == PULSES_S, name
        first = np.flatnonzero(np.isfinite(values))[0] / SENSOR_HZ
        assert first == {"b": 0.4, "placed": 0.2}.get(name, 0.0)
    for name in PULSED_TEXTS:
        members = tar_members(tmp_path / "out" / f"{shard}.{name}.tar").values()
        events = [event for member in members for event in json.loads(member)["events"]]
        assert [event["text"] for event in events] == [f"word {t}" for t in PULSES_S]
        np.testing.assert_allclose([event["time_s"] for event in events], PULSES_S, atol=1e-6)
    assert not index.present_streams(0).count("missing")
    objects = jsonl(tmp_path / "out" / "rejected.jsonl")
    (line,) = (o for o in objects if o.get("stream") == "missing")
    assert line["reason"] == (
        "missing.csv is at 4000 to 4003 s, outside the session of 3 s; fix: correct its "
        "timestamps, or declare its start in session.json"
    )


def test_sessions_read_directly_have_the_same_clocks(pulsed: Path) -> None:
    scan = scan_session(pulsed, recipe=PULSED)
    assert scan.clock_offset_s == UNRESET_S
    assert scan.duration_s == 3.0
    assert set(scan.absent) == {"missing"}
    assert "missing" not in scan.not_recorded
    assert scan.start_overrides == {"placed": 0.2, "placed_words": PULSES_S[0]}
    reader = SessionReader(
        pulsed, scan, recipe=PULSED, tokenizer=train_tokenizer(["a"], vocab_size=300)
    )
    segments = scan.segments(PULSED)
    for name in PULSED_SENSORS:
        values = np.concatenate([reader.read_sensor(name, s) for s in segments]).ravel()
        assert (np.flatnonzero(values > 0.5) / SENSOR_HZ).tolist() == PULSES_S, name
    for name in PULSED_TEXTS:
        events = [event for s in segments for event in reader.read_text(name, s).events]
        np.testing.assert_allclose([event.time_s for event in events], PULSES_S, atol=1e-6)


# --- one offset ---

FILES = Recipe.model_validate(
    {
        "streams": {
            "a": {**_SCALAR, "file": "a.csv", "key": "x"},
            "b": {**_SCALAR, "file": "b.csv", "key": "x"},
            "b2": {**_SCALAR, "file": "b.csv", "key": "y", "time": "t2", "clock": "own"},
            "c": {**_SCALAR, "file": "c.csv", "key": "x", "clock": "own"},
            "note": {"kind": "text", "file": "note.jsonl"},
        }
    }
)


def lines_of(times_s: dict[str, list[float]]) -> SessionLines:
    """Return lines of FILES with a reading or text at each time."""
    arrays = {n: np.array(sorted(times_s.get(n, [])), dtype=np.float64) for n in FILES.streams}
    return SessionLines(
        readings={
            name: Readings(
                times_s=arrays[name],
                values=np.zeros((len(arrays[name]), 1), dtype=np.float32),
                lines=np.arange(len(arrays[name])),
            )
            for name in FILES.sensors
        },
        events={"note": tuple(TextEvent(t, "x", "note.jsonl", 1) for t in arrays["note"])},
        files=tuple(
            FileLines(
                file=FILES.streams[name].file,
                time_key="t2" if name == "b2" else "timestamp",
                streams=(name,),
                times_s=arrays[name],
                lines=np.arange(len(arrays[name])),
                num_lines=len(arrays[name]),
                num_unread=0,
                issues=(),
            )
            for name in FILES.streams
        ),
    )


def slow_offset(times_s: list[float], media_stop_s: float | None) -> float:
    """Return the offset of all times of sensor files together, as docs/format.md says it."""
    first_s, last_s = min(times_s), max(times_s)
    if abs(first_s) <= 1 or media_stop_s is None:
        return 0.0 if abs(first_s) <= 1 else first_s
    is_apart = first_s >= media_stop_s or last_s <= 0
    ends_s = (abs(last_s - first_s - media_stop_s), abs(last_s - media_stop_s))
    return first_s if is_apart or ends_s[0] + 1e-6 < ends_s[1] else 0.0


TIMES = st.lists(st.integers(-40, 4000).map(lambda n: n / 4), max_size=4, unique=True)


@given(
    times_s=st.fixed_dictionaries(dict.fromkeys(FILES.streams, TIMES)),
    media_stop_s=st.one_of(st.none(), st.integers(1, 400).map(float)),
    starts=st.dictionaries(st.sampled_from(sorted(FILES.streams)), st.floats(-5, 5), max_size=2),
)
def test_all_files_share_the_offset_of_the_union_of_their_times(times_s, media_stop_s, starts):
    media = {} if media_stop_s is None else {"video": Interval(0.0, media_stop_s)}
    alignment = align_streams(
        media, lines_of(times_s), placement=Placement(starts=starts), recipe=FILES
    )
    union = [t for name in ("a", "b") if name not in starts for t in times_s[name]]
    if union:
        assert alignment.offset_s == slow_offset(union, media_stop_s)
    limit_s = 24 * 3600.0 if media_stop_s is None else media_stop_s
    for name in FILES.sensors:
        recorded = np.array(sorted(times_s[name]))
        if name in starts and len(recorded):
            expected = recorded - (recorded[0] - starts[name])
        else:
            expected = recorded - (0.0 if name in ("b2", "c") else alignment.offset_s)
        step_s = float(np.median(np.diff(expected))) if len(expected) > 1 else 1 / SENSOR_HZ
        if len(expected) and expected[0] < limit_s and expected[-1] + step_s > 0:
            np.testing.assert_array_equal(alignment.times_s[name], expected)
            assert alignment.intervals[name].start_s == expected[0]
            assert name not in alignment.absent
        else:
            assert name not in alignment.intervals
            assert name not in alignment.times_s
            assert (name in alignment.not_recorded) == (len(expected) == 0)
            assert "fix:" in alignment.absent[name] or len(expected) == 0


@pytest.mark.parametrize(
    ("times_s", "media_stop_s", "offset_s"),
    [
        ([0.5, 3.0], None, 0.0),
        ([50.0, 90.0], None, 50.0),
        ([5.0, 20.0], 16.0, 0.0),  # the last text does not end the session
        ([50.0, 60.0], 16.0, 50.0),
        ([], 16.0, 0.0),
    ],
)
def test_texts_alone_are_shifted_only_past_the_media(times_s, media_stop_s, offset_s):
    media = {} if media_stop_s is None else {"video": Interval(0.0, media_stop_s)}
    alignment = align_streams(
        media, lines_of({"note": times_s}), placement=Placement(), recipe=FILES
    )
    assert alignment.offset_s == offset_s


def test_texts_do_not_move_the_sensors(tmp_path: Path) -> None:
    times_s = {"a": [1000.0, 1015.0], "note": [2.0, 9000.0]}
    alignment = align_streams(
        {"video": Interval(0.0, 15.0)}, lines_of(times_s), placement=Placement(), recipe=FILES
    )
    assert alignment.offset_s == 1000.0
    assert alignment.absent["note"] == (
        "all of its events are outside the session, as at note.jsonl line 1; fix: correct its "
        "timestamps, or declare its start in session.json"
    )
    assert len(alignment.outside) == 2


def test_epochs_on_a_clock_of_their_own_make_no_long_session() -> None:
    times_s = {"c": [1.7e9, 1.7e9 + 9], "a": [0.0, 9.0]}
    alignment = align_streams({}, lines_of(times_s), placement=Placement(), recipe=FILES)
    assert alignment.duration_s == 18.0
    assert "outside the session of 86400 s" in alignment.absent["c"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("timestamp,x\n0,1\n", None),
        ("timestamp,x\n0,\n1,\n", "gaze.csv holds no usable reading of it"),
        ("", "gaze.csv: no header line; fix: write the names of the columns in line 1"),
        ("t,x\n0,1\n", "gaze.csv line 1: no column timestamp; its columns are ['t', 'x']; fix: "),
        ("timestamp,y\n0,1\n", "gaze.csv line 1: no column x; its columns are"),
        ("timestamp,x_0,x_1\n0,1,1\n", "gaze.csv line 1: 2 columns belong to x, the recipe"),
        ("timestamp,x\n0,north\n", "gaze.csv line 2: x contains a value that is not a finite"),
        ("timestamp,x\nnoon,1\n", "gaze.csv line 2: timestamp is no number, not a usable"),
    ],
)
def test_a_stream_without_readings_is_absent_with_the_cause(
    content: str, reason: str | None, tmp_path: Path
) -> None:
    gaze = {**_SCALAR, "file": "gaze.csv", "key": "x", "required": True}
    recipe = Recipe.model_validate(
        {"streams": {"gaze": gaze, "mic": {"kind": "audio", "file": "mic.wav"}}}
    )
    write_tone(tmp_path / "mic.wav")
    (tmp_path / "gaze.csv").write_text(content)
    scan = scan_session(tmp_path, recipe=recipe)
    if reason is None:
        assert scan.absent == {}
    else:
        assert scan.absent["gaze"].startswith(reason)
        assert scan.session_rejection(recipe).startswith(f"required stream gaze: {reason}")
        assert ("gaze" in scan.not_recorded) == ("holds no usable" in reason)


@pytest.mark.parametrize("first_s", [0.0, 1_700_000_000.0])
@pytest.mark.parametrize("start_s", [None, 0.5])
def test_a_stretched_sensor_and_its_texts_are_where_they_were(tmp_path, first_s, start_s):
    fast = 1.04
    lines = sensor_lines(4.0)
    for line in lines:
        line["timestamp"] = first_s + line["timestamp"] * fast
    write_lines(tmp_path / "metadata.jsonl", lines)
    texts = [{"timestamp": first_s + 2.0 * fast, "stream": "internal", "text": "x"}]
    write_lines(tmp_path / "text.jsonl", texts)
    stretch = dict.fromkeys(("touch", "internal_text"), 1 / fast)
    starts = {} if start_s is None else {"touch": start_s}
    info = json.dumps({"stretch": stretch, "start_s": starts})
    (tmp_path / "session.json").write_text(info)
    recipe = tiny_recipe()
    scan = scan_session(tmp_path, recipe=recipe)
    assert scan.intervals["touch"].stop_s == pytest.approx(4.0 + (start_s or 0.0), abs=1e-6)
    assert scan.intervals["proprio"].stop_s == pytest.approx(4.0 * fast, abs=1e-6)
    tokenizer = train_tokenizer(["x"], vocab_size=300)
    reader = SessionReader(tmp_path, scan, recipe=recipe, tokenizer=tokenizer)
    values = np.concatenate([reader.read_sensor("touch", s) for s in scan.segments(recipe)])
    times_s = np.arange(len(values)) / recipe.sensors["touch"].rate_hz - (start_s or 0.0)
    expected = 0.5 + 0.4 * np.sin(2 * times_s[:, None] + np.arange(5))
    is_inside = (times_s >= 0) & (times_s < 3.9)
    np.testing.assert_allclose(values[is_inside], expected[is_inside], atol=1e-3)
    (event,) = reader.read_text("internal_text", scan.segments(recipe)[2]).events
    assert event.time_s == pytest.approx(2.0, abs=1e-6)
