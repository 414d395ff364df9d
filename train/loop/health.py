"""What is wrong with a run: the health rules over a history of its metrics.

A history is the list of what was logged, oldest first. ``check`` says what is wrong at its end;
``HealthWatch`` keeps each finding from being repeated at every log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from train.loop.health_rules import RULES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QUIET_STEPS: Final = 200
"""Every untrained model fails the loss thresholds; nothing is said about them before this step."""

REPEAT_AFTER_LOGS: Final = 20
"""A finding that persists is said again after so many logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPoint:
    """What one log line said."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong, with the walkthrough's advice."""

    rule: str
    metric: str
    step: int
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.problem} -> {self.advice}"


def check(history: Sequence[LogPoint], *, quiet_steps: int = QUIET_STEPS) -> list[Finding]:
    """All findings at the end of a history, in the order of the table.

    Args:
        history: log points, oldest first.
        quiet_steps: rules that every untrained model breaks are silent before this step.
    """
    if not history:
        return []
    step = history[-1].step
    findings = []
    for rule in RULES:
        if rule.quiet_at_first and step < quiet_steps:
            continue
        if (found := rule.find(history)) is not None:
            metric, problem = found
            findings.append(
                Finding(
                    rule=rule.name, metric=metric, step=step, problem=problem, advice=rule.advice
                )
            )
    return findings


@dataclass(slots=True, kw_only=True)
class HealthWatch:
    """Gathers the history and says each finding once in `repeat_after_logs` logs."""

    quiet_steps: int = QUIET_STEPS
    repeat_after_logs: int = REPEAT_AFTER_LOGS
    history: list[LogPoint] = field(default_factory=list)
    _said_at: dict[tuple[str, str], int] = field(default_factory=dict)

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Add a log point; returns the findings that are due to be said."""
        self.history.append(LogPoint(step=step, metrics=dict(metrics)))
        return self._due(check(self.history, quiet_steps=self.quiet_steps))

    def observe_held_out(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What is due to be said of held-out metrics, named ``val/...``: their ranges only."""
        point = LogPoint(step=step, metrics=metrics)
        return self._due(check([point], quiet_steps=self.quiet_steps))

    def _due(self, findings: Sequence[Finding]) -> list[Finding]:
        """Those that were not said within the last logs."""
        now = len(self.history)
        due = []
        for finding in findings:
            key = (finding.rule, finding.metric)
            if now - self._said_at.get(key, -self.repeat_after_logs) >= self.repeat_after_logs:
                self._said_at[key] = now
                due.append(finding)
        return due
