"""Health rules: find what is wrong with a run in the history of its metrics.

docs/training.md lists the rules with their ranges, meaning and advice. A history is the list of
log points, oldest first. Each rule is a pure function of it. ``apply_rules`` applies all of them
at the history's end; ``HealthWatch`` keeps a finding from being repeated at every log.

``tests/experiments/health_rules.py`` measures each rule's detection delay and false alarm rate on
simulated runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Final

from train.walkthrough import LOSS_RANGES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Problem = tuple[str, str] | None
    """The metric and a sentence about it; None if all is well."""

QUIET_STEPS: Final = 200
"""Before this step, rules that every untrained model breaks are not applied."""

REPEAT_AFTER_LOGS: Final = 20
"""A finding that persists is reported again after this many logs."""

NO_DECREASE_STEPS: Final = 1000
"""Steps within which a loss must decrease."""

MIN_DECREASE: Final = 0.02
"""Least relative decrease that counts; batches differ by about as much."""

PLATEAU_LOGS: Final = 4
"""Least number of logs in a plateau."""

UNEVEN_DECREASE: Final = 0.2
"""Losses are uneven if one has not decreased while another one has by more than this share."""

TREND_LOGS: Final = 12
"""Number of newest logs that a trend is judged by: the older half against the newer half."""

MIN_RISE: Final = 0.05
"""Least relative rise of a head's loss that counts; it must exceed twice its standard error, too.

Simulated runs of 60 logs whose losses jitter by 3 %: a flat loss next to falling ones is reported
in 5 to 8 % of them (with 8 logs and 0.03: in 80 %). A loss that rises by 1 % per log is found
within 12 logs in 69 % of them, within 20 logs in 98 to 100 %.
"""

MIN_TOTAL_RISE: Final = 0.08
"""Least relative rise of the total loss that counts.

Of 300 simulated runs of 60 logs whose flat loss jitters by 3 %, none raises a false alarm; with
0.05, 8 % did.
"""

MIN_FALL: Final = 0.01
"""Least relative fall of a head's loss that counts; it must exceed twice its standard error."""

TREND_STEPS: Final = 200
"""Least number of steps that a trend spans, whatever the log interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPoint:
    """The metrics of one log line."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthFinding:
    """A problem that a rule found, with its advice."""

    rule: str
    metric: str
    step: int
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.problem} -> {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A metric's good range, its warning, and what to do; a row of the table in the docs."""

    name: str
    metric: str
    good: str
    warning: str
    advice: str
    find: Callable[[Sequence[LogPoint]], Problem]
    """Looks for the problem at the end of a history."""
    quiet_at_first: bool = False
    """Whether the rule is skipped in the first steps, where every untrained model breaks it."""


def apply_rules(
    history: Sequence[LogPoint], *, quiet_steps: int = QUIET_STEPS
) -> list[HealthFinding]:
    """Return all findings at the end of a history (oldest first), in the order of the table."""
    if not history:
        return []
    step = history[-1].step
    findings = []
    for rule in RULES:
        if rule.quiet_at_first and step < quiet_steps:
            continue
        if (problem := rule.find(history)) is not None:
            findings.append(
                HealthFinding(
                    rule=rule.name,
                    metric=problem[0],
                    step=step,
                    problem=problem[1],
                    advice=rule.advice,
                )
            )
    return findings


@dataclass(slots=True, kw_only=True)
class HealthWatch:
    """Collects the history, and reports each finding once in `repeat_after_logs` logs."""

    quiet_steps: int = QUIET_STEPS
    repeat_after_logs: int = REPEAT_AFTER_LOGS
    history: list[LogPoint] = field(default_factory=list)
    _reported_at: dict[tuple[str, str], int] = field(default_factory=dict)

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[HealthFinding]:
        """Add a log point; return the findings to report."""
        self.history.append(LogPoint(step=step, metrics=dict(metrics)))
        return self._due(apply_rules(self.history, quiet_steps=self.quiet_steps))

    def observe_held_out(self, step: int, metrics: Mapping[str, float]) -> list[HealthFinding]:
        """Return the findings to report about held-out metrics, named ``val/...``.

        They enter no history, so only the rules about ranges apply.
        """
        point = LogPoint(step=step, metrics=metrics)
        return self._due(apply_rules([point], quiet_steps=self.quiet_steps))

    def _due(self, findings: Sequence[HealthFinding]) -> list[HealthFinding]:
        """Select the findings that were not reported within the last logs."""
        num_logs = len(self.history)
        due = []
        for finding in findings:
            key = (finding.rule, finding.metric)
            last = self._reported_at.get(key, -self.repeat_after_logs)
            if num_logs - last >= self.repeat_after_logs:
                self._reported_at[key] = num_logs
                due.append(finding)
        return due


def _above(metric: str, limit: float) -> Callable[[Sequence[LogPoint]], Problem]:
    """Make a rule: the newest value, held-out or not, is not above a limit."""

    def find(history: Sequence[LogPoint]) -> Problem:
        for name in (metric, f"val/{metric}"):
            value = history[-1].metrics.get(name)
            if value is not None and value > limit:
                return name, f"{name} is {value:.4g}, above {limit:g}"
        return None

    return find


def _stays_below(metric: str, limit: float) -> Callable[[Sequence[LogPoint]], Problem]:
    """Make a rule: no two successive values are below a limit; one low value proves little."""

    def find(history: Sequence[LogPoint]) -> Problem:
        values = [point.metrics.get(metric, math.inf) for point in history[-2:]]
        if len(values) < 2 or not max(values) < limit:
            return None
        return metric, f"{metric} is {values[-1]:.4g}, below {limit:g}"

    return find


def _not_finite(history: Sequence[LogPoint]) -> Problem:
    """Find a loss that is NaN, or skipped steps."""
    metrics = history[-1].metrics
    if _overflows(history) is not None:
        return None
    for metric, value in metrics.items():
        if metric.removeprefix("val/").startswith("loss_") and math.isnan(value):
            return metric, f"{metric} is NaN"
    if (count := metrics.get("skipped_steps", 0.0)) > 0:
        reason = "a loss or gradient was not finite, or far above the steps before"
        return "skipped_steps", f"skipped_steps is {count:.0f}: {reason}"
    return None


def _overflows(history: Sequence[LogPoint]) -> Problem:
    """Find that all steps since the last log overflowed float16, so that no loss is known."""
    metrics = history[-1].metrics
    count = metrics.get("fp16_overflows", 0.0)
    if not count or metrics.get("skipped_steps") or math.isfinite(metrics.get("loss_total", 0.0)):
        return None
    return "fp16_overflows", (
        f"fp16_overflows is {count:.0f}: every step since the last log overflowed float16 and was "
        "skipped"
    )


def _no_decrease(history: Sequence[LogPoint]) -> Problem:
    """Find that the newest losses of a long enough history are not below its first ones."""
    ends = _first_and_last(history, "loss_total", is_resumed=True)
    if ends is None or ends[1] <= ends[0] * (1 - MIN_DECREASE):
        return None
    return "loss_total", f"loss_total has not decreased: {ends[0]:.4g} at first, {ends[1]:.4g} now"


def _uneven(history: Sequence[LogPoint]) -> Problem:
    """Find a head's loss that is where it began, while another one has fallen clearly."""
    ends = {head: _first_and_last(history, head) for head in _heads(history)}
    falls = {head: 1 - both[1] / both[0] for head, both in ends.items() if both and both[0] > 0}
    stuck = [head for head, fall in falls.items() if fall < MIN_DECREASE]
    learned = [head for head, fall in falls.items() if fall > UNEVEN_DECREASE]
    if not stuck or not learned or _one_rises(history) is not None:
        return None
    both = ends[stuck[0]]
    assert both is not None
    others = ", ".join(f"{head} fell by {falls[head]:.0%}" for head in learned)
    return stuck[0], (
        f"{stuck[0]} does not decrease: {both[0]:.4g} at first, {both[1]:.4g} now, while {others}"
    )


def _plateau(history: Sequence[LogPoint]) -> Problem:
    """Find a loss that fell before and is constant over the newest 1000 steps, early in the run.

    If those steps have fewer than :data:`PLATEAU_LOGS` logs, that many newest logs are judged.
    """
    points = _with_metric(history, "loss_total")
    num_newest = sum(p.step > points[-1].step - NO_DECREASE_STEPS for p in points)
    newest = points[-max(num_newest, PLATEAU_LOGS) :]
    if len(points) <= len(newest):
        return None
    if _no_decrease(history) is not None or _total_rises(history) is not None:
        return None
    older, newer = _halves([p.metrics["loss_total"] for p in newest])
    if fmean(newer) < fmean(older) * (1 - MIN_DECREASE / 4):
        return None
    # A loss is constant by design when the cosine schedule has nearly ended.
    rates = [p.metrics["lr"] for p in points if "lr" in p.metrics]
    if rates and rates[-1] < 0.5 * max(rates):
        return None
    num_steps = max(NO_DECREASE_STEPS, newest[-1].step - newest[0].step)
    return "loss_total", f"loss_total stays at {fmean(newer):.4g} for {num_steps} steps"


def _one_rises(history: Sequence[LogPoint]) -> Problem:
    """Find a single head's loss that rises while another one falls, both beyond their noise.

    The others may be constant: a loss at its floor proves nothing.
    """
    changes = _trends(history, _heads(history))
    rising = [h for h, (change, noise) in changes.items() if change > max(MIN_RISE, 2 * noise)]
    falling = [h for h, (change, noise) in changes.items() if -change > max(MIN_FALL, 2 * noise)]
    if len(rising) != 1 or not falling:
        return None
    change = changes[rising[0]][0]
    return rising[0], f"{rising[0]} rose by {change:.0%} while {', '.join(falling)} fell"


def _total_rises(history: Sequence[LogPoint]) -> Problem:
    """Find a total loss that rises beyond its noise, and not because of a single head."""
    for change, noise in _trends(history, ["loss_total"]).values():
        if change > max(MIN_TOTAL_RISE, 2 * noise) and _one_rises(history) is None:
            return "loss_total", f"loss_total rose by {change:.0%} within {TREND_LOGS} logs"
    return None


def _trends(history: Sequence[LogPoint], metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return each metric's :func:`_change` over the newest logs; {} if these are too few."""
    points = history[-TREND_LOGS:]
    if len(points) < TREND_LOGS or points[-1].step - points[0].step < TREND_STEPS:
        return {}
    curves = {m: [p.metrics.get(m, math.nan) for p in points] for m in metrics}
    return {m: _change(curve) for m, curve in curves.items() if all(map(math.isfinite, curve))}


def _heads(history: Sequence[LogPoint]) -> list[str]:
    """Return the names of the heads' losses."""
    return [m for m in history[-1].metrics if m.startswith("loss_") and m != "loss_total"]


def _first_and_last(
    history: Sequence[LogPoint], metric: str, *, is_resumed: bool = False
) -> tuple[float, float] | None:
    """Return a metric at the beginning of training and now, means of up to three logs each.

    None if fewer than NO_DECREASE_STEPS are between them, or if the history does not reach back to
    the beginning, as after a resume.

    With `is_resumed`, a history that begins late is used if its steps double the run's length.
    Losses fall as powers of the steps: 1000 late steps of a healthy run hardly show a decrease,
    doubling its length does.
    """
    points = _with_metric(history, metric)
    if len(points) < 2 or points[-1].step < NO_DECREASE_STEPS:
        return None
    first, interval = points[0].step, points[1].step - points[0].step
    if points[-1].step - first < NO_DECREASE_STEPS * 0.9:
        return None
    is_late = first > max(NO_DECREASE_STEPS, interval)
    if is_late and not (is_resumed and points[-1].step >= 2 * first):
        return None
    size = max(1, min(3, len(points) // 2))
    ends = (points[:size], points[-size:])
    return fmean(p.metrics[metric] for p in ends[0]), fmean(p.metrics[metric] for p in ends[1])


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Return the relative change from the older to the newer half, and its standard error."""
    older, newer = _halves(values)
    base = abs(fmean(older)) or math.inf
    noise = math.hypot(stdev(older), stdev(newer)) / math.sqrt(len(older))
    return (fmean(newer) - fmean(older)) / base, noise / base


def _halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _with_metric(history: Sequence[LogPoint], metric: str) -> list[LogPoint]:
    return [p for p in history if math.isfinite(p.metrics.get(metric, math.nan))]


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        name="not finite",
        metric="skipped_steps",
        good="0",
        warning="NaN or infinite",
        advice=(
            "Reduce LR (training.optimizer.lr), check for corrupted data (`python -m "
            "preprocess verify SHARDS`)"
        ),
        find=_not_finite,
    ),
    Rule(
        name="overflows",
        metric="fp16_overflows",
        good="0, or a few at first",
        warning="all steps of a log",
        advice=(
            "Each overflow halves the loss scale, which starts at 65536. If they continue, set "
            "training.precision: bf16, which needs no scale, or reduce LR (training.optimizer.lr)"
        ),
        find=_overflows,
    ),
    Rule(
        name="no decrease",
        metric="loss_total",
        good="decreasing",
        warning="no decrease after 1000 steps",
        advice="Model/data mismatch, check shapes, learning rate and data quality",
        find=_no_decrease,
    ),
    Rule(
        name="rising",
        metric="loss_total",
        good="decreasing",
        warning="increasing",
        advice=(
            "Reduce LR (training.optimizer.lr) and resume from a checkpoint before the rise; check "
            "data quality"
        ),
        find=_total_rises,
        quiet_at_first=True,
    ),
    Rule(
        name="plateau",
        metric="loss_total",
        good="decreasing",
        warning="plateaus early",
        advice="Check learning rate, data quality",
        find=_plateau,
        quiet_at_first=True,
    ),
    *(
        Rule(
            name=head.replace("_", " "),
            metric=f"loss_{head}",
            good=f"< {good}",
            warning=f"> {limit}",
            advice=advice,
            find=_above(f"loss_{head}", limit),
            quiet_at_first=True,
        )
        for head, (good, limit, advice) in LOSS_RANGES.items()
    ),
    Rule(
        name="one rises",
        metric="loss_*",
        good="all losses decrease together",
        warning="one increases while others decrease",
        advice="Check that modality's data, or adjust training.loss_weights",
        find=_one_rises,
        quiet_at_first=True,
    ),
    Rule(
        name="uneven",
        metric="loss_*",
        good="all losses decrease together",
        warning="one has not decreased after 1000 steps, another one has",
        advice=(
            "Adjust loss weights in the config: raise its training.loss_weights; or check that "
            "modality's data"
        ),
        find=_uneven,
    ),
    Rule(
        name="slow",
        metric="samples_per_sec",
        good="> 10",
        warning="< 5",
        advice=(
            "`python -m train profile --config CONFIG.yaml` says what to change. If "
            "data_wait_fraction is high, raise data.num_workers (of a DataLoader of your own, its "
            "num_workers); otherwise the model is the bottleneck: use a smaller one, "
            "training.precision: bf16 or training.compile: true"
        ),
        find=_stays_below("samples_per_sec", 5.0),
    ),
    Rule(
        name="waiting for data",
        metric="data_wait_fraction",
        good="< 0.1",
        warning="> 0.5",
        advice=(
            "Data loading: raise data.num_workers (of a DataLoader of your own, its num_workers), "
            "for example to 4; `python -m train profile --config CONFIG.yaml` measures how many"
        ),
        find=_above("data_wait_fraction", 0.5),
    ),
    Rule(
        name="memory",
        metric="memory_allocated_mb",
        good="< 20000",
        warning="> 22000",
        advice=(
            "Reduce batch size (data.batch_size) and raise training.accumulation_steps by the same "
            "factor, or set model.gradient_checkpointing: true"
        ),
        find=_above("memory_allocated_mb", 22_000.0),
    ),
)
"""All rules, in order of urgency."""
