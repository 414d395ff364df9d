"""Make sessions of a small demo world from a seed.

A creature with ten joints reaches for a ball that bounces in a room. Every stream carries
information that another stream needs, so that a model learns something from each. One round goes
like this; times are relative to the contact, and contacts are on a grid of ticks, 1.5 or 1.8 s
apart:

=======  =========================================================================================
-0.9 s   the ball hits the far wall, takes the color of the next finger, and lights the room with
         it; the wall knocks, low or high
-0.6 s   internal text: "reach low index" (verb, level, finger)
-0.5 s   the arm starts on a minimum-jerk path (Flash & Hogan 1985) to the coming contact
0 s      contact: the finger's touch rises, its tone starts, the ball turns pale
+0.2 s   the finger releases the ball, which flies off; external text: "hits index ball" or
         "taps ..."
+0.6 s   the arm is back at rest
=======  =========================================================================================

Each contact has random draws. At first, each draw shows in one stream only:

=======================  ====================================  ===================================
draw                     shows first in                        heads that need it
=======================  ====================================  ===================================
finger, 1 of 5           vision: the ball's color              internal text (third word), then
                                                               audio (pitch), animation (curl)
position of the contact  vision: the ball's flight             animation (yaw, pitch, elbow)
level, low or high       audio: the wall's knock               internal text (second word),
                                                               animation (wrist roll)
verb, reach or swing     internal text: not predictable        animation (shoulder roll)
force, taps or hits      touch: how far it rises               external text (first word), audio
                                                               (a hit ball is back at the wall
                                                               0.3 s sooner, and so is the knock)
=======================  ====================================  ===================================

The time of events shows in several streams: knock and color come 0.3 s before the intention, the
intention 0.6 s before the contact with its tone, touch and tone 0.2 s before the report. Each head
needs its own stream too, because an event that has started continues predictably: tones fade,
sentences end, and joints move. The loudness of a tone does not reveal the force. The finger holds
the ball for 0.2 s, so its flight does not reveal the force before the report's first word is due.

Both cameras follow the ball with their gaze: ``gaze.csv`` has the direction from each camera to the
ball at 120 Hz, in the axes of :mod:`preprocess.demo.cameras`. The default recipe does not declare
it; these lines under ``streams:`` do::

  gaze:
    kind: sensor
    file: gaze.csv
    rate_hz: 120
    values: [{count: 6, type: direction, names: [lx, ly, lz, rx, ry, rz]}]

The motors of the joints are louder the faster they turn, so that audio follows proprio. Behind
them is a mains hum. Hum and motors are partials of 50 Hz: broadband, never silent, and the hum is
the same in every 20 ms. So a model can learn events from the sound, not noise.

Each session draws from ``SeedSequence([seed, number])`` and does not depend on the number of
sessions.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from preprocess.demo.avatar import (
    AUDIO_RATE_HZ,
    FINGER_RGB,
    FINGER_TONE_HZ,
    FINGERS,
    FOREARM_M,
    SHOULDER_M,
    UPPER_ARM_M,
    WALL_LEAD_S,
    Contact,
    fly_ball,
    list_texts,
    move_joints,
    plan_contacts,
    pose_scene,
    press_touch,
    sound,
)
from preprocess.demo.cameras import (
    BALL_RADIUS_M,
    BASELINE_M,
    FOCAL_PER_WIDTH,
    Scene,
    make_camera,
    render_frames,
    write_video,
)
from shared.errors import ConfigError, SessionError
from shared.session.folder import SESSION_INFO_FILE
from shared.streams import METADATA_FILE, TEXT_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Float64Array = npt.NDArray[np.float64]

GENERATOR = "preprocess.demo.world"
GENERATOR_VERSION = 2
"""Increase when the same parameters give other bytes, so that older sessions are rebuilt."""

VIDEO_FILES = {"vision_left.mp4": -BASELINE_M / 2, "vision_right.mp4": BASELINE_M / 2}
"""The video of each camera, and the camera's x coordinate in meters."""

AUDIO_FILE, GAZE_FILE = "audio.wav", "gaze.csv"
FILES = (METADATA_FILE, *VIDEO_FILES, AUDIO_FILE, TEXT_FILE, GAZE_FILE)

GAZE_RATE_HZ = 120
GAZE_COLUMNS = ("lx", "ly", "lz", "rx", "ry", "rz")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoParameters:
    """Everything that determines the bytes of a session, except its number."""

    seed: int
    duration_s: float
    image_size: int
    rate_hz: float

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range."""
        for name, is_valid, expected in (
            ("seed", self.seed >= 0, "0 or more"),
            ("duration_s", 1 <= self.duration_s <= 3600, "1 to 3600 seconds"),
            ("image_size", 16 <= self.image_size <= 1024, "16 to 1024 pixels"),
            ("image_size", self.image_size % 2 == 0, "even, as H.264 requires"),
            ("rate_hz", 5 <= self.rate_hz <= 240, "5 to 240 frames per second"),
        ):
            if not is_valid:
                raise ConfigError(
                    f"demo sessions: {name} is {getattr(self, name)}; fix: set it to {expected}"
                )


def write_demo_sessions(
    out: Path,
    *,
    num_sessions: int = 24,
    duration_s: float = 40.0,
    seed: int = 0,
    image_size: int = 96,
    rate_hz: float = 30.0,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the folders `session_001`, ...; the same arguments give the same bytes.

    A complete session with the same parameters is skipped; any other session of this generator is
    rebuilt. Each session is written in a hidden folder next to the final one and then renamed, so
    that a killed run leaves no incomplete session.

    Args:
        out: folder of the sessions, created if missing.
        num_sessions: number of sessions; sessions with higher numbers are not touched.
        duration_s: length of each session, rounded to whole frames.
        seed: 0 or more.
        image_size: height and width of the videos in pixels, even.
        rate_hz: frames per second of the videos, and lines per second of metadata.jsonl.
        progress: called with one line per session.

    Returns:
        The session folders, in order.

    Raises:
        ConfigError: an argument out of range.
        SessionError: a folder of that name exists and was not written by this generator.
    """
    if num_sessions < 1:
        raise ConfigError(
            f"demo sessions: num_sessions is {num_sessions}; fix: set it to 1 or more"
        )
    parameters = DemoParameters(
        seed=seed, duration_s=float(duration_s), image_size=image_size, rate_hz=float(rate_hz)
    )
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / f"session_{number:03d}" for number in range(1, num_sessions + 1)]
    for number, folder in enumerate(folders, start=1):
        is_due = not _is_complete(folder, number, parameters)
        if is_due:
            _replace_session(folder, number, parameters)
        if progress is not None:
            state = "written" if is_due else "exists already"
            progress(f"{folder.name}: {state} ({number} of {num_sessions})")
    return folders


def _is_complete(folder: Path, number: int, parameters: DemoParameters) -> bool:
    """Return whether a folder contains this session, with all files at full length.

    Raises:
        SessionError: the folder contains something that this generator did not write.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        info = json.loads((folder / SESSION_INFO_FILE).read_text(encoding="utf-8"))
        is_ours = isinstance(info, dict) and info.get("generator") == GENERATOR
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise SessionError(
            f"{folder}: exists and is not overwritten, because its {SESSION_INFO_FILE} does not "
            "name demo-sessions as its source; fix: move it away or choose another folder"
        )
    expected = _identity(number, parameters)
    return {key: info.get(key) for key in expected} == expected and info.get("bytes") == {
        name: (folder / name).stat().st_size for name in FILES if (folder / name).is_file()
    }


def _identity(number: int, parameters: DemoParameters) -> dict[str, Any]:
    """Return the values that determine a session's bytes."""
    return {
        "generator": GENERATOR,
        "generator_version": GENERATOR_VERSION,
        "session_number": number,
        "parameters": asdict(parameters),
    }


def _replace_session(folder: Path, number: int, parameters: DemoParameters) -> None:
    """Write the session in a hidden folder next to the final one, then rename it."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    _write_session(partial, number, parameters)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_session(folder: Path, number: int, parameters: DemoParameters) -> None:
    """Write all files of one session; session.json last, as it has the sizes of the others."""
    # One random generator per purpose, so that a change of one does not change the others.
    plan_rng, sway_rng, sound_rng, paint_rng = (
        np.random.default_rng(child)
        for child in np.random.SeedSequence([parameters.seed, number]).spawn(4)
    )
    num_frames = max(round(parameters.duration_s * parameters.rate_hz), 1)
    duration_s = num_frames / parameters.rate_hz
    times_s = np.arange(num_frames) / parameters.rate_hz
    contacts = plan_contacts(plan_rng, duration_s=duration_s)
    angles, velocities = move_joints(contacts, times_s, sway_rng=sway_rng)
    touch = press_touch(contacts, times_s)
    _write_lines(
        folder / METADATA_FILE,
        [
            {"timestamp": time_s, "touch": reading, "proprio": pose}
            for time_s, reading, pose in zip(
                times_s.round(6).tolist(),
                touch.round(4).tolist(),
                np.concatenate([angles, velocities], axis=1).round(6).tolist(),
                strict=True,
            )
        ],
    )
    _write_lines(folder / TEXT_FILE, list_texts(contacts, duration_s=duration_s))
    _write_gaze(folder / GAZE_FILE, contacts, duration_s=duration_s)
    wave = sound(contacts, times_s, velocities, duration_s=duration_s, rng=sound_rng)
    pcm = (wave * 32767).round().clip(-32768, 32767).astype(np.int16)
    soundfile.write(os.fsencode(folder / AUDIO_FILE), pcm, AUDIO_RATE_HZ, subtype="PCM_16")
    scene = pose_scene(angles, *fly_ball(contacts, times_s))
    _write_vision(folder, scene, parameters, paint_rng)
    info = _identity(number, parameters) | _describe(contacts, duration_s, parameters)
    info["bytes"] = {name: (folder / name).stat().st_size for name in FILES}
    (folder / SESSION_INFO_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _write_vision(
    folder: Path, scene: Scene, parameters: DemoParameters, rng: np.random.Generator
) -> None:
    """Write the videos of both cameras, in a room with colors drawn per session."""
    paint = np.array([0.42, 0.5, 0.46, 0.48])[:, None] * rng.uniform(0.9, 1.1, size=(4, 3))
    for name, x_m in VIDEO_FILES.items():
        camera = make_camera(x_m, size=parameters.image_size, paint=paint)
        write_video(
            folder / name,
            render_frames(camera, scene),
            size=parameters.image_size,
            rate_hz=parameters.rate_hz,
        )


def _write_gaze(path: Path, contacts: Sequence[Contact], *, duration_s: float) -> None:
    """Write the direction from each camera to the ball as a table, one line per reading."""
    times_s = np.arange(round(duration_s * GAZE_RATE_HZ)) / GAZE_RATE_HZ
    ball_m, _ = fly_ball(contacts, times_s)
    rays_m = [ball_m - [x_m, 0.0, 0.0] for x_m in VIDEO_FILES.values()]
    directions = [ray_m / np.linalg.norm(ray_m, axis=1, keepdims=True) for ray_m in rays_m]
    np.savetxt(
        path,
        np.column_stack([times_s, *directions]),
        fmt="%.6f",
        delimiter=",",
        header=",".join(("timestamp", *GAZE_COLUMNS)),
        comments="",
    )


def _describe(
    contacts: Sequence[Contact], duration_s: float, parameters: DemoParameters
) -> dict[str, Any]:
    """Return the ground truth of a session, in meters, seconds and pixels."""
    return {
        "source": "made by `python -m preprocess demo-sessions`, no recording",
        "duration_s": duration_s,
        "fingers": [
            {"name": name, "tone_hz": tone_hz, "ball_rgb": rgb}
            for name, tone_hz, rgb in zip(FINGERS, FINGER_TONE_HZ, FINGER_RGB, strict=True)
        ],
        "eyes": {
            "focal_px": FOCAL_PER_WIDTH * parameters.image_size,
            "baseline_m": BASELINE_M,
            "ball_radius_m": BALL_RADIUS_M,
        },
        "arm": {
            "shoulder_m": SHOULDER_M.tolist(),
            "upper_arm_m": UPPER_ARM_M,
            "forearm_m": FOREARM_M,
        },
        "contacts": [
            asdict(contact)
            | {
                "finger": FINGERS[contact.finger],
                "wall_time_s": round(contact.time_s - WALL_LEAD_S, 6),
            }
            for contact in contacts
            if 0 <= contact.time_s < duration_s
        ],
    }


def _write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
