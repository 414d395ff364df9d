"""The demo world: sessions of a small creature, made from a seed; every sense tells something.

A creature with ten joints reaches for a ball that bounces in a room. One round goes like this;
times are relative to the contact, and contacts lie on a lattice of ticks, 1.5 or 1.8 s apart:

=======  =========================================================================================
-0.9 s   the ball hits the far wall, takes the colour of the next finger and lights the room with
         it; the wall knocks, low or high
-0.6 s   internal text: "reach low index" (verb, level, finger)
-0.5 s   the arm sets out, a minimum-jerk path (Flash & Hogan 1985) to where the ball will be
0 s      contact: the finger's touch rises, its tone begins, the ball turns pale
+0.2 s   the finger lets go, the ball flies off; external text: "hits index ball" or "taps ..."
+0.6 s   the arm is back at rest
=======  =========================================================================================

Dice are thrown per contact; what they show is first told in one stream only:

=======================  ====================================  ===================================
what is drawn            told first by                         heads that need it
=======================  ====================================  ===================================
finger, 1 of 5           vision: the ball's colour             internal text (third word), then
                                                               audio (pitch), animation (curl)
place of the contact     vision: the ball's flight             animation (yaw, pitch, elbow)
level, low or high       audio: the wall's knock               internal text (second word),
                                                               animation (wrist roll)
verb, reach or swing     internal text: a whim, not foretold   animation (shoulder roll)
force, taps or hits      touch: how far it rises               external text (first word), audio
                                                               (a hit ball is back at the wall
                                                               0.3 s sooner, so is the knock)
=======================  ====================================  ===================================

When things happen is told more than once: knock and colour come 0.3 s before the intention, the
intention 0.6 s before the contact with its tone, touch and tone 0.2 s before the report. What has
begun goes on by itself: tones fade, sentences end and joints move as their own stream foretells,
so each head needs its own stream too. A tone's loudness does not tell the force, and the finger
holds the ball for 0.2 s, so that its flight can't tell it until the report's first word is due.

The joints' motors whir the louder the faster they turn, so that audio follows proprio. Behind it
hums the mains: hum and whir are partials of 50 Hz, broad, never silent, and yet the hum is the same
in every 20 ms, so that what can be learned of the sound is what happens and not noise.

Each session draws from ``SeedSequence([seed, number])``: it does not depend on how many are made.
"""

from __future__ import annotations

import json
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
    move_joints,
    plan_contacts,
    pose_scene,
    press_touch,
    say,
    sound,
)
from preprocess.demo.cameras import (
    BALL_RADIUS_M,
    BASELINE_M,
    FOCAL_PER_WIDTH,
    Scene,
    make_eye,
    render_frames,
    write_video,
)
from shared.errors import ConfigError, SessionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Float64Array = npt.NDArray[np.float64]

GENERATOR = "preprocess.demo.world"
GENERATOR_VERSION = 1
"""Raise when the same parameters give other bytes: sessions of older versions are then remade."""

FILES = ("metadata.jsonl", "vision_left.mp4", "vision_right.mp4", "audio.wav", "text.jsonl")
FACTS = "session.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoParameters:
    """What decides the bytes of a session, beside its number."""

    seed: int
    duration_s: float
    image_size: int
    rate_hz: float

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that no session can be made of."""
        for name, is_right, wanted in (
            ("seed", self.seed >= 0, "0 or more"),
            ("duration_s", 1 <= self.duration_s <= 3600, "1 to 3600 seconds"),
            ("image_size", 16 <= self.image_size <= 1024, "16 to 1024 pixels"),
            ("image_size", self.image_size % 2 == 0, "even, as h264 wants"),
            ("rate_hz", 5 <= self.rate_hz <= 240, "5 to 240 frames per second"),
        ):
            if not is_right:
                raise ConfigError(
                    f"demo sessions: {name} is {getattr(self, name)}; it must be {wanted}"
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
    """Write `session_001`... below `out`; the same arguments give the same bytes.

    A session that is already there, complete and made by the same parameters is left alone; any
    other one of this generator is remade. Each is written in a hidden folder beside its place and
    renamed, so that a killed run leaves no half session under a session's name.

    Args:
        out: folder, made if missing.
        num_sessions: how many; sessions beyond that number are left alone.
        duration_s: length of each in seconds, rounded to whole frames.
        seed: 0 or more.
        image_size: height and width of the videos in pixels, even.
        rate_hz: frames per second of the videos, and lines per second of metadata.jsonl.
        progress: called with one line per session.

    Returns:
        The session folders, in order.

    Raises:
        ConfigError: an argument out of range.
        SessionError: a folder of that name exists and was not made by this generator.
    """
    if num_sessions < 1:
        raise ConfigError(f"demo sessions: num_sessions is {num_sessions}; it must be 1 or more")
    parameters = DemoParameters(
        seed=seed, duration_s=float(duration_s), image_size=image_size, rate_hz=float(rate_hz)
    )
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / f"session_{number:03d}" for number in range(1, num_sessions + 1)]
    for number, folder in enumerate(folders, start=1):
        is_made = not _is_complete(folder, number, parameters)
        if is_made:
            _replace_session(folder, number, parameters)
        if progress is not None:
            state = "made" if is_made else "already there"
            progress(f"{folder.name}: {state} ({number} of {num_sessions})")
    return folders


def _is_complete(folder: Path, number: int, parameters: DemoParameters) -> bool:
    """Whether the folder holds this very session, all files at full length.

    Raises:
        SessionError: the folder holds something that this generator did not make.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        is_ours = isinstance(facts, dict) and facts.get("generator") == GENERATOR
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise SessionError(
            f"{folder}: exists, and its {FACTS} does not say that demo-sessions made it; "
            "move it away or choose another folder, it is not overwritten"
        )
    wanted = _identity(number, parameters)
    return {key: facts.get(key) for key in wanted} == wanted and facts.get("bytes") == {
        name: (folder / name).stat().st_size for name in FILES if (folder / name).is_file()
    }


def _identity(number: int, parameters: DemoParameters) -> dict[str, Any]:
    """The facts that decide a session's bytes."""
    return {
        "generator": GENERATOR,
        "generator_version": GENERATOR_VERSION,
        "session_number": number,
        "parameters": asdict(parameters),
    }


def _replace_session(folder: Path, number: int, parameters: DemoParameters) -> None:
    """Write the session in a hidden folder beside its place, then put it there."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    _write_session(partial, number, parameters)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_session(folder: Path, number: int, parameters: DemoParameters) -> None:
    """Make all files of one session; session.json last, for it tells the others' lengths."""
    # One stream of random numbers per purpose: more noise never changes the story.
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
        folder / "metadata.jsonl",
        [
            {"timestamp": time_s, "touch": touched, "proprio": pose}
            for time_s, touched, pose in zip(
                times_s.round(6).tolist(),
                touch.round(4).tolist(),
                np.concatenate([angles, velocities], axis=1).round(6).tolist(),
                strict=True,
            )
        ],
    )
    _write_lines(folder / "text.jsonl", say(contacts, duration_s=duration_s))
    wave = sound(contacts, times_s, velocities, duration_s=duration_s, rng=sound_rng)
    pcm = (wave * 32767).round().clip(-32768, 32767).astype(np.int16)
    soundfile.write(folder / "audio.wav", pcm, AUDIO_RATE_HZ, subtype="PCM_16")
    scene = pose_scene(angles, *fly_ball(contacts, times_s))
    _write_vision(folder, scene, parameters, paint_rng)
    facts = _identity(number, parameters) | _describe(contacts, duration_s, parameters)
    facts["bytes"] = {name: (folder / name).stat().st_size for name in FILES}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_vision(
    folder: Path, scene: Scene, parameters: DemoParameters, rng: np.random.Generator
) -> None:
    """Both eyes' videos, in a room whose paint is drawn per session."""
    paint = np.array([0.42, 0.5, 0.46, 0.48])[:, None] * rng.uniform(0.9, 1.1, size=(4, 3))
    for name, side in (("vision_left.mp4", -1), ("vision_right.mp4", 1)):
        eye = make_eye(side * BASELINE_M / 2, size=parameters.image_size, paint=paint)
        write_video(
            folder / name,
            render_frames(eye, scene),
            size=parameters.image_size,
            rate_hz=parameters.rate_hz,
        )


def _describe(
    contacts: Sequence[Contact], duration_s: float, parameters: DemoParameters
) -> dict[str, Any]:
    """What really happened, for tests and for people: metres, seconds, pixels."""
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
