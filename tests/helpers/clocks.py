"""Stamp the readings of devices whose clocks drift, as a recorder does: the truth is known."""

from __future__ import annotations

from typing import Literal

import numpy as np

Jitter = Literal["none", "Gaussian", "uniform", "packets", "slow load", "loop"]


def stamp_readings(
    rate_hz: float,
    duration_s: float,
    drift_ppm: float,
    *,
    jitter: Jitter = "Gaussian",
    lost: float = 0.0,
    jump_s: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Return the recorder's times of the readings of a device, float64 [N], in order of arrival.

    Args:
        rate_hz: by the device's clock, which runs `drift_ppm` fast against the recorder's.
        duration_s: of the device's clock.
        drift_ppm: see above.
        jitter: of arrival. "Gaussian" 2 ms; "uniform" 10 ms; "packets" every 20 ms by the
            recorder's clock; "slow load" 3 ms that last a second; "loop" adds 0.3 ms to every
            period, as a program that sleeps between readings does.
        lost: share of readings that never arrive.
        jump_s: by which the recorder's clock jumps after 40 %.
        seed: of everything random.
    """
    rng, period_s = np.random.default_rng(seed), 1 / rate_hz
    sent_s = np.arange(round(duration_s * rate_hz)) * period_s / (1 + drift_ppm / 1e6)
    sent_s = sent_s[rng.random(len(sent_s)) >= lost] + rng.uniform(0, period_s)
    count = len(sent_s)
    if jitter == "Gaussian":
        sent_s = sent_s + rng.normal(0, 0.002, count)
    elif jitter == "uniform":
        sent_s = sent_s + rng.uniform(0, 0.010, count)
    elif jitter == "packets":
        first_s = rng.uniform(0, 0.02)
        packet_s = np.ceil((sent_s - first_s) / 0.02) * 0.02 + first_s
        sent_s = packet_s + rng.uniform(0, 0.0002, count)
    elif jitter == "slow load":
        keep, delay = np.exp(-period_s), np.zeros(count)
        for i, shock in enumerate(rng.normal(0, 0.003 * np.sqrt(1 - keep**2), count)):
            delay[i] = keep * delay[i - 1] + shock
        sent_s = sent_s + delay
    elif jitter == "loop":
        sent_s = sent_s + np.cumsum(rng.normal(0, 0.0003, count))
    arrived_s = np.sort(sent_s)
    arrived_s[arrived_s > 0.4 * duration_s] += jump_s
    return arrived_s
