"""Simulate the creature and its ball: random draws per contact, and every stream made from them.

See :mod:`preprocess.demo.world` for the story and for what each stream reveals. All functions are
pure: contacts and times in, arrays out. Positions are meters in the axes of
:mod:`preprocess.demo.cameras`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.demo.cameras import BACK_M, BALL_RADIUS_M, FLOOR_M, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Float64Array = npt.NDArray[np.float64]

FINGERS = ("thumb", "index", "middle", "ring", "little")
FINGER_RGB = (
    (1.0, 0.1, 0.08),
    (1.0, 0.8, 0.05),
    (0.1, 0.9, 0.2),
    (0.1, 0.3, 1.0),
    (0.9, 0.15, 0.95),
)
"""Color of the ball before each finger touches it."""
FINGER_TONE_HZ = (330.0, 440.0, 587.0, 784.0, 1047.0)
PALE_RGB = (0.8, 0.8, 0.8)

TICK_S = 0.1
TICK_PHASE_S = 0.04
"""Offset of every event within its tick, so that rounding never moves it to another tick."""
WALL_LEAD_S, INTENT_LEAD_S, REACH_S, CURL_S = 0.9, 0.6, 0.5, 0.35
SWING_LEAD_S, HOLD_S, BACK_S, REPORT_DELAY_S = 0.4, 0.2, 0.6, 0.2
ROUND_TICKS = {True: 15, False: 18}
"""Ticks to the next contact: after a hit (True) and after a tap."""
GRAVITY_M_S2 = 4.0

SHOULDER_M = np.array([0.12, 0.0, -0.25])
UPPER_ARM_M, FOREARM_M, FINGER_M = 0.34, 0.40, 0.09
"""Shoulder to elbow, elbow to fingertip, and the length of the finger in the latter."""
FINGER_SPREAD_M = 0.018
REST_RAD = np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.0, -1.1, 2.0, 0.0, 0.0])
"""Five finger curls, then shoulder yaw, shoulder pitch, elbow, shoulder roll, wrist roll."""
POINT_CURL_RAD, FIST_CURL_RAD = 0.1, 1.3
SWING_RAD, WRIST_ROLL_RAD, SWAY_RAD = 0.7, 0.8, 0.02
TOUCH_FADE_S = 0.1
AUDIO_RATE_HZ = 16_000
HUM_HZ, HUM_RMS, NOISE_RMS = 50, 0.01, 0.0005
WHIR_HZ, WHIR_RMS, WHIR_SPEED_RAD_S = (1500, 6000), 0.03, 10.0
"""Frequency band of the joint motors, and their loudness at this sum of the arm's speeds."""
TONE_PEAK, TONE_FADE_S, TONE_S = 0.25, 0.07, 0.6
KNOCK_HZ = {False: 160.0, True: 2600.0}
KNOCK_PEAK, KNOCK_FADE_S, KNOCK_S = 0.2, 0.03, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """One contact of a finger with the ball, with its random draws.

    Attributes:
        time_s: on the session clock; may be outside the session.
        finger: index into FINGERS.
        is_hit: True for a hit, False for a tap.
        is_swing: True if the arm swings, False if it reaches straight.
        is_high: True if the wall's knock is high and the wrist rolls up.
        pressure: touch value, 0 to 1.
        ball_m: center of the ball at the contact.
        wall_m: center of the ball at the wall, WALL_LEAD_S earlier.
    """

    time_s: float
    finger: int
    is_hit: bool
    is_swing: bool
    is_high: bool
    pressure: float
    ball_m: tuple[float, float, float]
    wall_m: tuple[float, float, float]


def plan_contacts(rng: np.random.Generator, *, duration_s: float) -> list[Contact]:
    """Draw the contacts, from before the session's start to after its end."""
    contacts: list[Contact] = []
    tick = int(rng.integers(-28, -13))
    while not contacts or contacts[-2:][0].time_s < duration_s + WALL_LEAD_S:
        is_hit = bool(rng.integers(2))
        contact = Contact(
            time_s=round(tick * TICK_S + TICK_PHASE_S, 6),
            finger=int(rng.integers(len(FINGERS))),
            is_hit=is_hit,
            is_swing=bool(rng.integers(2)),
            is_high=bool(rng.integers(2)),
            pressure=round((0.9 if is_hit else 0.4) + float(rng.uniform(-0.05, 0.05)), 4),
            ball_m=_draw_point(rng, low=(-0.18, 0.50, -0.15), high=(0.16, 0.58, 0.08)),
            wall_m=_draw_point(
                rng,
                low=(-0.6, BACK_M - BALL_RADIUS_M, -0.2),
                high=(0.6, BACK_M - BALL_RADIUS_M, 0.3),
            ),
        )
        contacts.append(contact)
        tick += ROUND_TICKS[is_hit]
    return contacts


def fly_ball(
    contacts: Sequence[Contact], times_s: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Return the ball's center [N, 3] in meters and its color [N, 3].

    The ball stays at the finger for HOLD_S, then flies in arcs under constant gravity to the wall,
    to the floor, and to the next contact. Wall and floor deflect it toward the next contact; this
    is the only unphysical part.
    """
    starts_s: list[float] = []
    points_m: list[tuple[float, float, float]] = []
    colors: list[tuple[float, float, float]] = []
    for previous, contact in itertools.pairwise(contacts):
        (x, y, _), (wall_x, wall_y, _) = contact.ball_m, contact.wall_m
        floor_m = ((x + wall_x) / 2, (y + wall_y) / 2, FLOOR_M + BALL_RADIUS_M)
        color = FINGER_RGB[contact.finger]
        starts_s += [
            previous.time_s,
            previous.time_s + HOLD_S,
            contact.time_s - WALL_LEAD_S,
            contact.time_s - WALL_LEAD_S / 2,
        ]
        points_m += [previous.ball_m, previous.ball_m, contact.wall_m, floor_m]
        colors += [PALE_RGB, PALE_RGB, color, color]
    knots_s = np.array([*starts_s, contacts[-1].time_s])
    knots_m = np.array([*points_m, contacts[-1].ball_m])
    leg = np.clip(np.searchsorted(knots_s, times_s, side="right") - 1, 0, len(starts_s) - 1)
    elapsed_s, leg_s = times_s - knots_s[leg], knots_s[leg + 1] - knots_s[leg]
    ball_m = knots_m[leg] + (elapsed_s / leg_s)[:, None] * (knots_m[leg + 1] - knots_m[leg])
    ball_m[:, 2] += GRAVITY_M_S2 / 2 * elapsed_s * (leg_s - elapsed_s)
    return ball_m, np.array(colors)[leg]


def move_joints(
    contacts: Sequence[Contact], times_s: Float64Array, *, sway_rng: np.random.Generator
) -> tuple[Float64Array, Float64Array]:
    """Return joint angles [N, 10] in rad and their exact time derivatives [N, 10] in rad/s."""
    angles, velocities = np.tile(REST_RAD, (len(times_s), 1)), np.zeros((len(times_s), 10))
    calm, calm_rate = np.ones(len(times_s)), np.zeros(len(times_s))
    for contact in contacts:
        c = contact.time_s
        arm, arm_rate = _pulse(times_s, (c - REACH_S, c), (c + HOLD_S, c + BACK_S))
        curl, curl_rate = _pulse(times_s, (c - CURL_S, c), (c + HOLD_S, c + BACK_S))
        middle = c - SWING_LEAD_S / 2
        swing, swing_rate = _pulse(times_s, (c - SWING_LEAD_S, middle), (middle, c))
        shift_rad = _aim(contact) - REST_RAD
        angles[:, :5] += curl[:, None] * shift_rad[:5]
        velocities[:, :5] += curl_rate[:, None] * shift_rad[:5]
        angles[:, 5:] += arm[:, None] * shift_rad[5:]
        velocities[:, 5:] += arm_rate[:, None] * shift_rad[5:]
        angles[:, 8] += contact.is_swing * SWING_RAD * swing
        velocities[:, 8] += contact.is_swing * SWING_RAD * swing_rate
        calm, calm_rate = calm - arm, calm_rate - arm_rate
    omega = 2 * np.pi * sway_rng.uniform(0.15, 0.35, size=10)
    phase = omega * times_s[:, None] + sway_rng.uniform(0, 2 * np.pi, size=10)
    # The sway stops while the arm reaches, so that the finger hits the ball.
    angles += SWAY_RAD * calm[:, None] * np.sin(phase)
    velocities += SWAY_RAD * (
        calm[:, None] * omega * np.cos(phase) + calm_rate[:, None] * np.sin(phase)
    )
    return angles, velocities


def pose_scene(angles: Float64Array, ball_m: Float64Array, ball_rgb: Float64Array) -> Scene:
    """Compute the arm's position by forward kinematics of the joint angles [N, 10].

    The arm is in a plane through the shoulder, which yaw turns about the vertical and shoulder roll
    about its own horizontal direction. Spread and curl of the fingers are only for the picture.
    """
    yaw, pitch, elbow, shoulder_roll, wrist_roll = angles[:, 5:].T
    ahead = np.stack([np.sin(yaw), np.cos(yaw), np.zeros_like(yaw)], axis=-1)
    aside = np.stack([np.cos(yaw), -np.sin(yaw), np.zeros_like(yaw)], axis=-1)
    up = np.sin(shoulder_roll)[:, None] * aside + np.cos(shoulder_roll)[:, None] * [0.0, 0.0, 1.0]
    upper = np.cos(pitch)[:, None] * ahead + np.sin(pitch)[:, None] * up
    fore = np.cos(pitch + elbow)[:, None] * ahead + np.sin(pitch + elbow)[:, None] * up
    elbow_m = SHOULDER_M + UPPER_ARM_M * upper
    wrist_m = elbow_m + (FOREARM_M - FINGER_M) * fore
    palm = np.cross(fore, aside)
    across = np.cos(wrist_roll)[:, None] * aside + np.sin(wrist_roll)[:, None] * palm
    inward = np.cross(fore, across)
    spread = FINGER_SPREAD_M * (np.arange(5) - 2.0)[:, None] * across[:, None, :]
    knuckles_m = wrist_m[:, None, :] + spread
    curl = angles[:, :5, None]
    tips_m = knuckles_m + FINGER_M * (
        np.cos(curl) * fore[:, None, :] + np.sin(curl) * inward[:, None, :]
    )
    return Scene(
        ball_m=ball_m,
        ball_rgb=ball_rgb,
        elbow_m=elbow_m,
        wrist_m=wrist_m,
        knuckles_m=knuckles_m,
        tips_m=tips_m,
    )


def press_touch(contacts: Sequence[Contact], times_s: Float64Array) -> Float64Array:
    """Return touch [N, 5] in [0, 1]: it rises at a contact, holds, and fades."""
    touch = np.zeros((len(times_s), len(FINGERS)))
    for contact in contacts:
        # Rise half a microsecond early, because times are written with six digits.
        since_s = times_s - contact.time_s + 5e-7
        fade = 0.5 + 0.5 * np.cos(np.pi * np.clip((since_s - HOLD_S) / TOUCH_FADE_S, 0, 1))
        touch[:, contact.finger] += contact.pressure * fade * (since_s >= 0)
    return touch


def sound(
    contacts: Sequence[Contact],
    times_s: Float64Array,
    velocities: Float64Array,
    *,
    duration_s: float,
    rng: np.random.Generator,
) -> Float64Array:
    """Synthesize the session's sound at AUDIO_RATE_HZ in [-1, 1]: hum, motors, noise, contacts.

    Args:
        contacts: each has a tone of its finger and a knock of the wall.
        times_s: [N].
        velocities: joint velocities [N, 10] in rad/s; the motors of the five arm joints are louder
            the faster they turn.
        duration_s: length of the session.
        rng: of the noise and the hum's loudness.
    """
    num_samples = round(duration_s * AUDIO_RATE_HZ)
    speed = np.abs(velocities[:, 5:]).sum(axis=1) / WHIR_SPEED_RAD_S
    loudness = np.interp(np.arange(num_samples) / AUDIO_RATE_HZ, times_s, speed)
    hum = HUM_RMS * float(rng.uniform(0.8, 1.25)) * _buzz(HUM_HZ, AUDIO_RATE_HZ // 2 - HUM_HZ)
    wave = np.resize(hum, num_samples) + NOISE_RMS * rng.standard_normal(num_samples)
    wave += loudness * np.resize(WHIR_RMS * _buzz(*WHIR_HZ), num_samples)
    for contact in contacts:
        _mix(wave, _tone(FINGER_TONE_HZ[contact.finger]), at_s=contact.time_s)
        _mix(wave, _knock(KNOCK_HZ[contact.is_high]), at_s=contact.time_s - WALL_LEAD_S)
    return wave


def list_texts(contacts: Sequence[Contact], *, duration_s: float) -> list[dict[str, Any]]:
    """Return the text events that start in the session, in order of time."""
    events: list[dict[str, Any]] = []
    for contact in contacts:
        finger = FINGERS[contact.finger]
        verb = "swing" if contact.is_swing else "reach"
        level = "high" if contact.is_high else "low"
        force = "hits" if contact.is_hit else "taps"
        for time_s, stream, text in (
            (contact.time_s - INTENT_LEAD_S, "internal", f"{verb} {level} {finger}"),
            (contact.time_s + REPORT_DELAY_S, "external", f"{force} {finger} ball"),
        ):
            if 0 <= time_s < duration_s:
                events.append({"timestamp": round(time_s, 6), "stream": stream, "text": text})
    return sorted(events, key=lambda event: event["timestamp"])


def _draw_point(
    rng: np.random.Generator, *, low: Sequence[float], high: Sequence[float]
) -> tuple[float, float, float]:
    """Draw a point in a box, in meters, rounded to millimeters."""
    x, y, z = rng.uniform(low, high).round(3).tolist()
    return x, y, z


def _pulse(
    times_s: Float64Array, rise_s: tuple[float, float], fall_s: tuple[float, float]
) -> tuple[Float64Array, Float64Array]:
    """Return a minimum-jerk path from 0 to 1 and back, and its time derivative [1/s]."""
    value, rate = np.zeros_like(times_s), np.zeros_like(times_s)
    for sign, (from_s, to_s) in ((1, rise_s), (-1, fall_s)):
        s = np.clip((times_s - from_s) / (to_s - from_s), 0, 1)
        value += sign * s**3 * (10 - 15 * s + 6 * s**2)
        rate += sign * 30 * s**2 * (1 - s) ** 2 / (to_s - from_s)
    return value, rate


def _aim(contact: Contact) -> Float64Array:
    """Return the joint angles [10] that put the finger on the ball (inverse kinematics)."""
    toward_m = np.array(contact.ball_m) - SHOULDER_M
    toward_m *= 1 - BALL_RADIUS_M / float(np.linalg.norm(toward_m))
    ahead_m, up_m = math.hypot(toward_m[0], toward_m[1]), float(toward_m[2])
    cosine = (ahead_m**2 + up_m**2 - UPPER_ARM_M**2 - FOREARM_M**2) / (2 * UPPER_ARM_M * FOREARM_M)
    elbow = math.acos(cosine)
    pitch = math.atan2(up_m, ahead_m) - math.atan2(
        FOREARM_M * math.sin(elbow), UPPER_ARM_M + FOREARM_M * math.cos(elbow)
    )
    curls = [FIST_CURL_RAD] * len(FINGERS)
    curls[contact.finger] = POINT_CURL_RAD
    yaw = math.atan2(toward_m[0], toward_m[1])
    wrist_roll = WRIST_ROLL_RAD if contact.is_high else -WRIST_ROLL_RAD
    return np.array([*curls, yaw, pitch, elbow, 0.0, wrist_roll])


def _buzz(low_hz: int, high_hz: int) -> Float64Array:
    """Return one period of the partials of HUM_HZ in a band, 1.5 dB softer per octave; RMS 1."""
    num_samples = AUDIO_RATE_HZ // HUM_HZ
    partial = np.arange(low_hz // HUM_HZ, high_hz // HUM_HZ + 1)[:, None]
    # Phases after Schroeder (1970) keep the crest of many partials low.
    phase = np.pi * partial**2 / len(partial)
    turns = partial * np.arange(num_samples) / num_samples
    period = (np.sin(2 * np.pi * turns + phase) / partial**0.25).sum(axis=0)
    return np.asarray(period / np.sqrt((period**2).mean()))


def _tone(pitch_hz: float) -> Float64Array:
    """Synthesize the tone of a finger: three partials that fade together."""
    t_s = np.arange(round(TONE_S * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
    partials = sum(
        share * np.sin(2 * np.pi * n * pitch_hz * t_s) for n, share in ((1, 1), (2, 0.3), (3, 0.1))
    )
    return np.asarray(
        TONE_PEAK * np.minimum(t_s / 0.002, 1) * np.exp(-t_s / TONE_FADE_S) * partials
    )


def _knock(pitch_hz: float) -> Float64Array:
    """Synthesize the knock of the wall."""
    t_s = np.arange(round(KNOCK_S * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
    return KNOCK_PEAK * np.exp(-t_s / KNOCK_FADE_S) * np.sin(2 * np.pi * pitch_hz * t_s)


def _mix(wave: Float64Array, clip: Float64Array, *, at_s: float) -> None:
    """Add the part of `clip` that is inside `wave`, starting at `at_s`."""
    start = round(at_s * AUDIO_RATE_HZ)
    inside = slice(max(start, 0), max(min(start + len(clip), len(wave)), 0))
    wave[inside] += clip[inside.start - start : max(inside.stop - start, 0)]
