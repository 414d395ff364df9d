"""The stage timer, on a clock made by hand."""

from __future__ import annotations

from shared.timing import StageTimer


def test_time_belongs_to_the_stage_that_ended_and_adds_up():
    moments = iter([0.0, 1.0, 3.0, 6.0])
    timer = StageTimer(lambda: next(moments))
    for stage in ("read", "decode", "read"):
        timer.end_stage(stage)
    assert timer.take() == {"read": 4.0, "decode": 2.0}
