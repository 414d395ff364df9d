"""Checks of sensor values by type: ranges, norms, limits, and velocities against poses."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.report_pages import default_recipe
from helpers.sessions import make_readings, reading_lines, write_lines
from hypothesis import given
from hypothesis import strategies as st

from preprocess.validate.report import check_session
from preprocess.validate.value_checks import fit_velocities
from shared.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from preprocess.validate.report import ValidationReport

CASES = Path(__file__).resolve().parents[5] / "shared" / "recording_cases"


def recipe_of(*groups: dict[str, Any], **keys: Any) -> Recipe:
    """Return a recipe of one sensor stream, `hand` of hand.jsonl, with value groups."""
    stream = {"kind": "sensor", "file": "hand.jsonl", "key": "joints", "values": [*groups], **keys}
    return Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": {"hand": stream}})


def check(folder: Path, recipe: Recipe, change: Callable[[np.ndarray], object]) -> ValidationReport:
    """Write good readings with a fault, and check them."""
    spec = recipe.sensors["hand"]
    times_s, values = make_readings(spec, 4.0)
    values = values.astype(np.float64)
    change(values)
    folder.mkdir(exist_ok=True)
    write_lines(folder / spec.file, reading_lines(spec, times_s, values))
    return check_session(folder, recipe=recipe).report


def set_to(rows: slice | int, columns: slice | int, value: object) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__((rows, columns), value)


def scale(columns: slice, factor: float) -> Callable[[np.ndarray], None]:
    def apply(values: np.ndarray) -> None:
        values[:, columns] *= factor

    return apply


ALL = slice(None)
# fault: (groups, change, check, status, words)
FAULTS: dict[str, tuple[list[dict[str, Any]], Callable[[np.ndarray], object], str, str, str]] = {
    "fraction": (
        [{"count": 2, "type": "fraction"}], set_to(5, 1, 731.0),
        "values", "failed", "hand.jsonl line 6 (0.167 s): hand is 731, outside [0, 1]",
    ),
    "fraction by rounding": (
        [{"count": 2, "type": "fraction"}], set_to(5, 1, 1.0004),
        "values", "warnings", "outside [0, 1] by rounding",
    ),
    "degrees": (
        [{"count": 3, "type": "angle"}], set_to(ALL, 2, 178.0),
        "values", "failed", "hand has an angle of 178 rad, which looks like degrees",
    ),
    "unwrapped": (
        [{"count": 3, "type": "angle"}], set_to(7, 0, 3.5),
        "values", "warnings", "3.5 rad, outside [-pi, pi], as in 1 of 120 readings",
    ),
    "long quaternion": (
        [{"count": 8, "type": "quaternion"}], scale(slice(4, 8), 1.4),
        "values", "warnings", "hand has a quaternion of length 1.4, not 1, as in 120 of 120",
    ),
    "lost quaternions": (
        [{"count": 4, "type": "quaternion"}], set_to(slice(50, 110, 6), ALL, 0.0),
        "values", "warnings", "almost no length, as in 10 of 120 lines; it is masked",
    ),
    "never tracked": (
        [{"count": 4, "type": "quaternion"}], set_to(slice(50, 90), ALL, 0.0),
        "values", "failed", "almost no length, as in 40 of 120 lines; it is masked",
    ),
    "short direction": (
        [{"count": 3, "type": "direction"}], scale(ALL, 0.8),
        "values", "warnings", "hand has a direction of length 0.8, not 1",
    ),
    "pressed": (
        [{"count": 2, "type": "fraction"}], set_to(ALL, 1, 1.0),
        "saturation", "warnings", "hand[1] is at its limit 1 in 100%",
    ),
    "at pi": (
        [{"count": 2, "type": "angle", "names": ["elbow", "wrist"]}], set_to(ALL, 1, -math.pi),
        "saturation", "warnings", "hand[wrist] is at its limit pi in 100%",
    ),
    "all zero": (
        [{"count": 3, "type": "position"}, {"count": 3, "type": "velocity"}], set_to(ALL, ALL, 0.0),
        "still", "warnings", "0.00-4.00 s: the same poses repeat, as frozen tracking does; masked",
    ),
    "frozen": (
        [{"count": 3, "type": "direction"}], set_to(ALL, ALL, [0.0, 0.6, 0.8]),
        "still", "warnings", "the same poses repeat",
    ),
    "degrees per second": (
        [{"count": 3, "type": "angle"}, {"count": 3, "type": "velocity"}],
        scale(slice(3, 6), 180 / math.pi),
        "velocities", "warnings", "57.3 times as large; fix: they look like degrees per second",
    ),
    "backwards": (
        [{"count": 3, "type": "angle"}, {"count": 3, "type": "velocity"}], scale(slice(3, 6), -1),
        "velocities", "warnings", "correlation -1.00; fix: check their order and sign",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_is_a_verdict_of_its_stream(name: str, tmp_path: Path) -> None:
    groups, change, kind, status, words = FAULTS[name]
    report = check(tmp_path / "one", recipe_of(*groups), change)
    messages = report.errors if status == "failed" else report.warnings
    assert report.checks[kind] == status, report.as_dict()
    assert any(words in message for message in messages), messages
    assert report.streams["hand"] == status


@pytest.mark.parametrize(
    "types",
    [
        ["scalar"], ["fraction"], ["angle", "velocity"], ["position"], ["quaternion"],
        ["direction"], ["position", "quaternion"],
    ],
)  # fmt: skip
def test_good_values_of_every_type_pass(types: list[str], tmp_path: Path) -> None:
    sizes = {"position": 6, "quaternion": 8, "direction": 6}
    groups = [{"count": sizes.get(kind, 5), "type": kind} for kind in types]
    report = check(tmp_path / "one", recipe_of(*groups), lambda values: None)
    assert (report.status, report.warnings, report.errors) == ("passed", (), ())
    assert [g["type"] for g in report.stats["streams"]["hand"]["values"]] == types


def test_scalars_and_fractions_may_stand_still(tmp_path: Path) -> None:
    recipe = recipe_of({"count": 2, "type": "scalar"}, {"count": 2, "type": "fraction"})
    report = check(tmp_path / "one", recipe, set_to(ALL, ALL, 0.0))
    assert report.status == "passed"


@given(
    rate_hz=st.sampled_from([5.0, 15.0, 30.0, 90.0, 200.0]),
    speeds=st.lists(st.floats(0.3, 6.0), min_size=1, max_size=4),
    noise=st.floats(0, 1e-3),
    factor=st.sampled_from([1.0, 180 / math.pi, 0.01, -1.0]),
    seed=st.integers(0, 99),
)
def test_only_wrong_velocities_are_reported(
    rate_hz: float, speeds: list[float], noise: float, factor: float, seed: int
) -> None:
    """Angles swing and turn around; their velocities are the derivative, times a factor."""
    generator = np.random.default_rng(seed)
    times_s = np.cumsum(generator.uniform(0.8, 1.2, round(10 * rate_hz)) / rate_hz)
    phases = np.multiply.outer(times_s, speeds) * min(1.0, rate_hz / 30)
    angles = phases + np.sin(phases) + noise * generator.normal(size=phases.shape)
    velocities = (1 + np.cos(phases)) * np.array(speeds) * min(1.0, rate_hz / 30)
    wrapped = np.remainder(angles + np.pi, 2 * np.pi) - np.pi
    fit = fit_velocities(times_s, wrapped, factor * velocities, is_angle=True)
    assert fit is not None
    assert (fit.fault == "") == (factor == 1.0), fit
    assert ("degrees" in fit.fault) == (factor == 180 / math.pi)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("a35_vel_wrong", "they look like degrees per second"),
        ("a34b_all_zero_proprio", "frozen tracking"),
        ("a34c_constant_proprio", "frozen tracking"),
        ("a17_ts_all_same", "as in 507 of 509 lines; others are lost"),
    ],
)
def test_recordings_that_once_passed_are_reported(
    case: str, words: str, real_sessions: list[Path], tmp_path: Path
) -> None:
    del real_sessions  # without recordings, the test is skipped
    folder = Path(shutil.copytree(CASES / case, tmp_path / "one"))
    report = check_session(folder, recipe=default_recipe()).report
    assert any(words in message for message in (*report.errors, *report.warnings))
