"""Print how well drift is measured from generated readings, and how often falsely reported.

    python -m tests.experiments.clock_drift            # 200 seeds, about 5 minutes of one core
    python -m tests.experiments.clock_drift --seeds 20

Drift and errors are in ppm. `sd` is the spread of the estimates around the truth (their root mean
square error), `error` the median of the stated standard errors, `covered` the share of estimates
within three of them. `alarms` is the share of sessions without drift of which a warning would be
possible. `not assessed` is the share without an estimate. Sessions of an hour have a tenth of the
seeds.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from preprocess.validate.clock_checks import LIMIT_S, SIGNIFICANT, Clock, count_clock
from tests.helpers.clocks import Jitter, stamp_readings

RATES_HZ = (30, 72, 90, 120, 1000)
DURATIONS_S = (30, 300, 3600)
FAULTS = ({}, {"lost": 0.01}, {"lost": 0.01, "jump_s": 0.5})
DRIFTS_PPM = (20, 100, 500)
JITTERS: tuple[Jitter, ...] = ("Gaussian", "uniform", "packets", "slow load", "loop")


def measure(rate_hz: float, duration_s: float, drift_ppm: float, **options: object) -> Clock | None:
    """Return the clock of generated readings; None if it was not assessed."""
    times_s = stamp_readings(rate_hz, duration_s, drift_ppm, **options)  # type: ignore[arg-type]
    clock = count_clock(times_s.tobytes())
    return clock if isinstance(clock, Clock) else None


def main() -> None:
    """Print a line per rate, duration, jitter and fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES_HZ)
    parser.add_argument("--durations", type=float, nargs="+", default=DURATIONS_S)
    parser.add_argument("--jitters", nargs="+", default=JITTERS)
    given = parser.parse_args()
    print(
        "| Hz | s | jitter | lost | jump | 20 ppm | 100 ppm | 500 ppm | sd | error | covered | "
        "alarms | not assessed |"
    )
    print("|" + "---|" * 13)
    for case in itertools.product(given.durations, given.jitters, given.rates, FAULTS):
        duration_s, jitter, rate_hz, fault = case
        seeds = range(max(3, given.seeds // (10 if duration_s >= 3600 else 1)))
        found: dict[int, list[Clock]] = {}
        for drift_ppm in (0, *DRIFTS_PPM):
            of_drift = (
                measure(rate_hz, duration_s, drift_ppm, jitter=jitter, seed=seed, **fault)
                for seed in seeds
            )
            found[drift_ppm] = [clock for clock in of_drift if clock is not None]
        pairs = [(c.drift_ppm - true, c.drift_error_ppm) for true in found for c in found[true]]
        place = f"| {rate_hz:g} | {duration_s:g} | {jitter} | {fault.get('lost', 0):.0%} | "
        place += f"{fault.get('jump_s', 0):g} s | "
        left_out = 1 - len(pairs) / (len(seeds) * len(found))
        if left_out > 0.9:
            print(f"{place}{'- | ' * 7}{left_out:.0%} |", flush=True)
            continue
        means = (f"{np.mean([c.drift_ppm for c in found[d]] or [np.nan]):.1f}" for d in DRIFTS_PPM)
        alarms = np.mean([
            abs(c.drift_ppm) > SIGNIFICANT * c.drift_error_ppm
            and abs(c.drift_ppm) / 1e6 * duration_s > LIMIT_S
            for c in found[0]
        ])  # fmt: skip
        errors = np.array(pairs)
        covered = np.mean(np.abs(errors[:, 0]) < 3 * errors[:, 1])
        print(
            f"{place}{' | '.join(means)} | {np.sqrt(np.mean(errors[:, 0] ** 2)):.2f} | "
            f"{np.median(errors[:, 1]):.2f} | {covered:.1%} | {alarms:.1%} | {left_out:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
