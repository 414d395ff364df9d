"""Streams that began apart are aligned in the shards: clicks and flashes at the same known times,
with the starts that containers and ``session.json`` give.

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
from helpers.sessions import write_tone

from preprocess.build.plan_types import FromShards
from shared.media.sound import read_sound
from shared.media.video import read_video_track
from shared.recipe import Stream
from shared.session.alignment import read_starts
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource

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
    window={"min_coverage": 0.01},
    vision={"rate_hz": TICKS_PER_S, "codec": "raw", "fit": "stretch"},
    mel={"rate_hz": TICKS_PER_S, "fft_size": 640},
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
                frames[-1].pts = round(1000 * (video_at_s + (tick - video_from) * TICK_S))
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


RECORDINGS = {
    "aac in mp4": (lambda s: in_one_container(s, "aac", "mp4"), 0),
    "opus in matroska": (lambda s: in_one_container(s, "libopus", "matroska"), 0),
    "aac in a transport stream": (lambda s: in_one_container(s, "aac", "mpegts"), 0),
    "empty edit before the video": (late_video_in_one_container, 0),
    "wav declared late": (late_wav, 0),
    "video declared late": (early_wav, 0),
    "wav declared before the clock": (sound_before_the_clock, 12),
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
        with zarr.storage.ZipStore(out / f"{shard}.dmel.zarr.zip", mode="r") as store:
            group = zarr.open_group(store, mode="r")
            dmel, valid = group["dmel"][:], group["valid"][:]
        for row in range(index.num_samples):
            first = round(float(index.arrays["start_s"][row]) * TICKS_PER_S)
            errors_s = index.arrays["vision_left.error_s"][row]
            member = members.get(f"{index.key(row)}.vision_left.npy")
            for i in range(TICKS_PER_S):
                if member is not None and abs(errors_s[i]) < TICK_S / 2:
                    pictures[first + i] = np.load(io.BytesIO(member))[i]
                if valid[row, i]:
                    levels[first + i] = dmel[row, i]
                else:
                    assert (dmel[row, i] == 255).all()
    return pictures, levels


@pytest.mark.parametrize("name", RECORDINGS)
def test_clicks_and_flashes_of_one_time_are_stored_in_one_tick(name: str, tmp_path: Path) -> None:
    session = tmp_path / "in" / "one"
    session.mkdir(parents=True)
    write, zero = RECORDINGS[name]
    write(session)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    pictures, levels = stored(tmp_path / "out")
    expected = [tick - zero for tick in EVENTS]
    assert flashes(pictures) == expected
    assert clicks(levels) == expected


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_direct_path_agrees_to_the_bit(name: str, tmp_path: Path) -> None:
    session = tmp_path / "in" / "one"
    session.mkdir(parents=True)
    RECORDINGS[name][0](session)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    shards = ShardSource(tmp_path / "out")
    direct = SessionSource(tmp_path / "in", recipe=RECIPE)
    assert direct.shard_sizes.sum() == shards.shard_sizes.sum() >= LENGTH_S - 1
    shapes = {
        "vision_left": ((TICKS_PER_S, 32, 32, 3), np.uint8),
        "vision_left_valid": ((TICKS_PER_S,), np.bool_),
        "audio": ((TICKS_PER_S, RECIPE.mel.channels), np.uint8),
        "audio_valid": ((TICKS_PER_S,), np.bool_),
    }
    for row in range(int(direct.shard_sizes[0])):
        found = []
        for source in (direct, shards):
            out = {key: np.empty(shape, dtype) for key, (shape, dtype) in shapes.items()}
            source.read_into(0, row, out, with_text=False)
            found.append(out)
        for key in shapes:
            np.testing.assert_array_equal(found[0][key], found[1][key], err_msg=f"{key} {row}")


def test_sound_before_it_began_is_masked_and_its_samples_are_zero(tmp_path: Path) -> None:
    late_wav(tmp_path)
    scan = scan_session(tmp_path, recipe=RECIPE)
    fields = SessionReader(tmp_path, scan, recipe=RECIPE)
    window = scan.windows(RECIPE)[0]
    samples, valid = fields.read_audio(window), fields.read_mel(window).valid
    plain = soundfile.read(tmp_path / "audio.wav", dtype="float32")[0]
    first = round(0.35 * RECIPE.audio.rate_hz)
    assert not samples[:first].any()
    assert samples[first : first + 100].any()
    assert scan.intervals[Stream.AUDIO].start_s == 0.35
    assert scan.intervals[Stream.AUDIO].stop_s == pytest.approx(0.35 + len(plain) / RATE_HZ)
    assert valid.tolist() == [k * TICK_S >= 0.35 for k in range(TICKS_PER_S)]
    assert scan.coverage[0][2] == 0.65


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
    '{"start_s": {"microphone": 1}}': "names 'microphone', which is not a stream; fix: use one of "
    "vision_left, vision_right, audio",
    '{"start_s": {"touch": 1}}': "touch, which has timestamps of its own",
    '{"start_s": {"audio": NaN}}': "of audio is nan; fix: write seconds",
    '{"start_s": {"audio": Infinity}}': "of audio is inf; fix: write seconds",
    '{"start_s": {"audio": 1e9}}': "of audio is 1000000000.0; fix: write seconds",
    '{"start_s": {"audio": "0.35"}}': "of audio is 0.35; fix: write seconds",
    '{"start_s": {"audio": true}}': "of audio is True; fix: write seconds",
    '{"start_s": {"audio": null}}': "of audio is None; fix: write seconds",
    '{"start_s": 0.35}': 'start_s is not an object; fix: write {"audio": 0.35}',
    '{"start_s": {"audio": 0.35': "contains start_s but is not JSON",
}


@pytest.mark.parametrize("facts", BAD_STARTS)
def test_impossible_starts_leave_the_media_out_with_the_reason(facts: str, tmp_path: Path) -> None:
    session = tmp_path / "in" / "one"
    session.mkdir(parents=True)
    write_tone(session / "audio.wav")
    (session / "session.json").write_text(facts)
    starts, why = read_starts(session)
    assert (starts, BAD_STARTS[facts] in str(why)) == ({}, True), why
    scan = scan_session(session, recipe=tiny_recipe())
    assert scan.absent[Stream.AUDIO] == why
    assert scan.session_rejection(tiny_recipe()) is not None


@pytest.mark.parametrize("facts", ["", "{}", "[1]", '{"by": ', '{"start_s": null}', "\0"])
def test_session_info_without_starts_shifts_nothing(facts: str, tmp_path: Path) -> None:
    (tmp_path / "session.json").write_text(facts)
    assert read_starts(tmp_path) == ({}, None)


def test_another_start_rebuilds_the_columns_of_that_stream_and_no_others(
    tmp_path: Path,
) -> None:
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        mux(tmp_path / "in" / name / "vision_left.mp4", video_from=0)
        write_tone(tmp_path / "in" / name / "audio.wav", 4.0)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    before = file_hashes(tmp_path / "out")
    declare(tmp_path / "in" / "one")
    assert build(tmp_path / "in", tmp_path / "out", RECIPE).plan.is_empty
    declare(tmp_path / "in" / "one", vision_left=0.0, audio=0.0)
    assert build(tmp_path / "in", tmp_path / "out", RECIPE).plan.is_empty  # as before
    assert file_hashes(tmp_path / "out") == before
    declare(tmp_path / "in" / "one", audio=0.4)
    (task,) = build(tmp_path / "in", tmp_path / "out", RECIPE).plan.tasks
    assert set(task.columns) == {"audio", "dmel"}
    sources = task.columns["audio"].sources
    assert {n for n, source in sources.items() if isinstance(source, FromShards)} == {"two"}
    build(tmp_path / "in", tmp_path / "fresh", RECIPE)
    contents = [sorted(file_hashes(tmp_path / out).values()) for out in ("out", "fresh")]
    columns = [{h for h in hashes if h not in before.values()} for hashes in contents]
    assert len(columns[0] & columns[1]) >= 2  # the two columns are those of a fresh build


def test_a_start_is_part_of_the_fingerprint_of_sessions_read_directly(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_tone(tmp_path / "one" / "audio.wav")
    found = []
    for start_s in (0.0, 0.25):
        declare(tmp_path / "one", audio=start_s)
        found.append(SessionSource(tmp_path, recipe=tiny_recipe()).fingerprint)
    assert found[0] != found[1]


def test_a_wrong_start_is_the_reason_of_the_rejection(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write_tone(tmp_path / "in" / name / "audio.wav")
    declare(tmp_path / "in" / "bad", microphone=0.25)
    build(tmp_path / "in", tmp_path / "out", tiny_recipe(required=["audio"]))
    (line,) = jsonl(tmp_path / "out" / "rejected.jsonl")
    assert (line["level"], line["session"]) == ("session", "bad")
    assert "start_s names 'microphone'" in line["reason"]
