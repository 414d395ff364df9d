"""Simulate sick runs and similar healthy ones, and print what the health rules find.

    python tests/experiments/health_rules.py               200 runs of each, a minute
    python tests/experiments/health_rules.py --runs 1000

A run logs every 100 steps; every value of a curve jitters by 3 % (plateaus by 1 %), independently.
A sick run is found if its rule has a finding at one of its logs; a healthy run is accused if that
rule has one. "After" is the median number of logs from the start of the sickness to the finding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from train.loop.health import RULES, LogPoint, apply_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

Curves = dict[str, "NDArray[np.float64]"]

LOG_INTERVAL = 100
LOGS = np.arange(1, 61.0)
FALLING = 9 * LOGS**-0.3
"""A power of the steps, like losses of healthy runs."""
FLAT = np.full(60, 5.0)
NAN = np.where(LOGS == 30, np.nan, FALLING)
LATE = np.maximum(LOGS - 20, 0)

MIN_FOUND, MAX_ACCUSED = 0.9, 0.1


@dataclass(frozen=True)
class Case:
    """Curves that a rule must find from log `begins` on, and curves that it must not accuse."""

    sick: Curves
    begins: int
    healthy: Curves
    noise: float = 0.03


CASES = {
    "not finite": Case({"loss_total": NAN}, 30, {"loss_total": FALLING}),
    "overflows": Case(
        {"loss_total": NAN, "fp16_overflows": np.where(LOGS == 30, 100.0, 0.0)},
        30,
        {"loss_total": FALLING, "fp16_overflows": np.where(LOGS == 30, 9.0, 0.0)},
    ),
    "no decrease": Case({"loss_total": FLAT}, 1, {"loss_total": FALLING}),
    "rising": Case(
        {"loss_total": FALLING[19] * np.where(LATE, 1 + 0.02 * LATE, FALLING / FALLING[19])},
        21,
        {"loss_total": np.maximum(FALLING, FALLING[19])},
    ),
    "plateau": Case(
        {"loss_total": np.maximum(FALLING, FALLING[9])}, 11, {"loss_total": FALLING}, noise=0.01
    ),
    "internal text": Case(
        {"loss_internal_text": np.full(60, 3.3)}, 1, {"loss_internal_text": np.full(60, 2.7)}
    ),
    "audio": Case({"loss_audio": np.full(60, 2.77)}, 1, {"loss_audio": np.full(60, 2.2)}),
    "one rises": Case(
        {"loss_audio": 2 * (1 + 0.02 * LATE), "loss_animation": FALLING},
        21,
        {"loss_audio": np.full(60, 2.0), "loss_animation": FALLING},
    ),
    "uneven": Case(
        {"loss_audio": np.full(60, 2.0), "loss_animation": FALLING},
        1,
        {"loss_audio": FALLING / 4, "loss_animation": FALLING},
    ),
    "slow": Case(
        {"samples_per_sec": np.where(LATE, 4.5, 50.0)},
        21,
        {"samples_per_sec": np.where(LOGS % 20 == 0, 4.5, 50.0)},
    ),
    "waiting for data": Case(
        {"data_wait_fraction": np.where(LATE, 0.6, 0.05)},
        21,
        {"data_wait_fraction": 0.4 + 0 * LOGS},
    ),
    "memory": Case(
        {"memory_allocated_mb": np.where(LATE, 24_000.0, 15_000.0)},
        21,
        {"memory_allocated_mb": np.full(60, 19_500.0)},
    ),
}
"""A case for each rule, by name."""


def history_of(curves: Mapping[str, NDArray[np.float64]]) -> list[LogPoint]:
    """Make a history with one log per LOG_INTERVAL steps."""
    rows = zip(*curves.values(), strict=True)
    return [
        LogPoint(step=LOG_INTERVAL * i, metrics=dict(zip(curves, map(float, row), strict=True)))
        for i, row in enumerate(rows, start=1)
    ]


def simulate(
    curves: Mapping[str, NDArray[np.float64]], *, num_runs: int, noise: float
) -> Iterator[list[LogPoint]]:
    """Yield the histories of runs whose values jitter."""
    for seed in range(num_runs):
        rng = np.random.default_rng(10_000 + seed)
        yield history_of({n: c * (1 + noise * rng.normal(size=len(c))) for n, c in curves.items()})


def first_finding(rule: str, history: list[LogPoint]) -> int | None:
    """Return the number of the first log, from 1, at which a rule has a finding, or None."""
    for end in range(1, len(history) + 1):
        if any(finding.rule == rule for finding in apply_rules(history[:end], quiet_steps=0)):
            return end
    return None


def share_found(
    rule: str,
    curves: Mapping[str, NDArray[np.float64]],
    *,
    num_runs: int = 100,
    noise: float = 0.03,
) -> float:
    """Return the share of runs in which a rule has a finding."""
    runs = simulate(curves, num_runs=num_runs, noise=noise)
    return float(np.mean([first_finding(rule, history) is not None for history in runs]))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    num_runs = parser.parse_args().runs
    print(f"{num_runs} runs of {len(LOGS)} logs, one every {LOG_INTERVAL} steps")
    print("rule              metric               warning                    found  after  accused")
    num_bad = 0
    for rule in RULES:
        case = CASES[rule.name]
        runs = simulate(case.sick, num_runs=num_runs, noise=case.noise)
        logs = [first_finding(rule.name, history) for history in runs]
        delays = [log - case.begins for log in logs if log is not None and log >= case.begins]
        found = len(delays) / num_runs
        accused = share_found(rule.name, case.healthy, num_runs=num_runs, noise=case.noise)
        is_good = found >= MIN_FOUND and accused <= MAX_ACCUSED
        num_bad += not is_good
        after = f"{np.median(delays):.0f}" if delays else "-"
        print(
            f"{rule.name:16}  {rule.metric:19}  {rule.warning[:25]:25}  {found:5.0%}  {after:>5}  "
            f"{accused:7.0%}{'' if is_good else '  BAD'}",
            flush=True,
        )
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
