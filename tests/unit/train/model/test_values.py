"""Each value type against numpy and scipy: features, predictions, errors and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import make_values
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from shared.errors import ConfigError
from shared.streams import VECTOR_SIZES, ValueGroup, ValueType
from train.model.values import MIN_STD, RULES, SensorValues, last_positions, value_errors

STANDARDIZED = {ValueType.SCALAR, ValueType.VELOCITY, ValueType.POSITION}
UNIT = {ValueType.QUATERNION, ValueType.DIRECTION}
ALL_TYPES = tuple(
    ValueGroup(
        count=2 * VECTOR_SIZES.get(each, 1),
        type=each,
        unit="rad" if each is ValueType.ANGLE else "m/s",
    )
    for each in ValueType
)
SIZE = sum(group.count for group in ALL_TYPES)


def groups_of(*types):
    return tuple(ValueGroup(count=2 * VECTOR_SIZES.get(t, 1), type=t) for t in types)


def make_readings(*sizes, groups=ALL_TYPES, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([make_values(rng, group, *sizes) for group in groups], -1)


def make_statistics(size=SIZE, *, seed=1):
    rng = np.random.default_rng(seed)
    return {"count": 9, "mean": [*rng.normal(size=size)], "std": [*rng.uniform(0.5, 3, size)]}


def make_sensor(groups=ALL_TYPES, *, statistics=None):
    sensor = SensorValues(groups)
    size = sum(group.count for group in groups)
    sensor.set_statistics(statistics or make_statistics(size), name="hand")
    return sensor


def as_vectors(values, group):
    return values.reshape(*values.shape[:-1], -1, VECTOR_SIZES.get(group.type, 1))


def columns(values):
    """Yield each group with its values and the slice of its columns."""
    start = 0
    for group in ALL_TYPES:
        part = slice(start, start + group.count)
        yield group, values[..., part], part
        start += group.count


def test_every_value_type_has_a_rule():
    assert {*RULES} == {*ValueType}
    assert {each for each, rule in RULES.items() if rule.is_standardized} == STANDARDIZED
    assert {each for each, rule in RULES.items() if rule.is_unit} == UNIT


def test_features_equal_numpy_and_scipy():
    readings, statistics = make_readings(2, 5), make_statistics()
    mean, std = np.array(statistics["mean"]), np.array(statistics["std"])
    expected = []
    for group, values, part in columns(readings):
        if group.type in STANDARDIZED:
            expected.append((values - mean[part]) / std[part])
        elif group.type is ValueType.ANGLE:
            pairs = np.stack([np.sin(values), np.cos(values)], axis=-1)
            expected.append(pairs.reshape(2, 5, -1))
        elif group.type is ValueType.QUATERNION:
            matrices = Rotation.from_quat(values.reshape(-1, 4)).as_matrix()
            expected.append(matrices[..., :2].transpose(0, 2, 1).reshape(2, 5, -1))
        else:
            expected.append(values)
    found = make_sensor().features(torch.from_numpy(readings), torch.ones(2, 5, dtype=torch.bool))
    np.testing.assert_allclose(found, np.concatenate(expected, -1), atol=1e-5)
    assert found.shape[-1] == make_sensor().num_features


def test_a_rotation_and_its_negative_quaternion_have_the_same_features():
    sensor = make_sensor(groups_of(ValueType.QUATERNION))
    readings = torch.from_numpy(make_readings(3, 4, groups=sensor.groups))
    valid = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(sensor.features(-readings, valid), sensor.features(readings, valid))


def test_angles_on_both_sides_of_pi_have_almost_the_same_features():
    sensor, valid = make_sensor(groups_of(ValueType.ANGLE)), torch.ones(1, 1, dtype=torch.bool)
    one, other = (
        sensor.features(torch.full((1, 1, 2), angle), valid) for angle in (3.1415, -3.1415)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_garbage_at_invalid_positions_has_the_features_of_zeros(garbage):
    sensor, valid = make_sensor(), torch.tensor([[True, False]])
    readings = torch.from_numpy(make_readings(1, 2))
    zeros, bad = readings.clone(), readings.clone()
    zeros[0, 1], bad[0, 1] = 0.0, garbage
    found = sensor.features(bad, valid)
    assert torch.equal(found, sensor.features(zeros, valid))
    assert found.isfinite().all()


def test_errors_equal_numpy_and_scipy():
    truth, output = make_readings(3, 4), make_readings(3, 4, seed=5)
    std = make_sensor().std.numpy()
    expected = np.zeros((3, 4))
    for (group, true, part), (_, out, _) in zip(columns(truth), columns(output), strict=True):
        distance = np.abs(out - true) / std[part]
        if group.type is ValueType.ANGLE:
            errors = 1 - np.cos(out - true)
        elif group.type is ValueType.QUATERNION:
            turns = Rotation.from_quat(out.reshape(-1, 4)).inv() * Rotation.from_quat(
                true.reshape(-1, 4)
            )
            errors = np.sin(turns.magnitude() / 2).reshape(3, 4, -1) ** 2
        elif group.type is ValueType.DIRECTION:
            errors = 1 - (as_vectors(out, group) * as_vectors(true, group)).sum(-1)
        else:
            errors = np.where(distance < 1, distance**2 / 2, distance - 0.5)
        expected += errors.mean(-1)
    found = value_errors(
        torch.from_numpy(output), torch.from_numpy(truth), ALL_TYPES, std=torch.from_numpy(std)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("value_type", ValueType)
def test_the_truth_costs_nothing_and_errors_are_never_negative(value_type):
    groups = groups_of(value_type)
    truth = torch.from_numpy(make_readings(50, groups=groups)).float()
    std = torch.ones(truth.shape[1])
    errors = value_errors(truth, truth, groups, std=std)
    assert errors.abs().max() < 1e-12
    nearly = value_errors(truth * (1 + 1e-6), truth, groups, std=std)
    assert (nearly >= 0).all()


def test_errors_far_from_zero_keep_their_digits():
    groups = (ValueGroup(count=1, type="scalar"),)
    target = torch.tensor([[8192.0]])
    errors = value_errors(target + 2**-8, target, groups, std=torch.tensor([0.01]))
    assert errors.item() == pytest.approx((2**-8 / 0.01) ** 2 / 2, rel=1e-6)


def test_the_negative_of_a_quaternion_costs_nothing():
    groups = groups_of(ValueType.QUATERNION)
    truth = torch.from_numpy(make_readings(5, groups=groups))
    assert value_errors(-truth, truth, groups, std=torch.ones(8)).abs().max() < 1e-12


@pytest.mark.parametrize("count", [1, 30])
def test_groups_count_alike_however_many_elements_they_have(count):
    """A stream's loss is the sum over groups of the mean over their elements."""
    groups = (
        ValueGroup(count=count, type="scalar"),
        ValueGroup(count=4 * count, type="quaternion"),
    )
    output = torch.tensor([0.0] * count + [1.0, 0, 0, 0] * count)
    target = torch.tensor([3.0] * count + [0, 1.0, 0, 0] * count)
    errors = value_errors(output, target, groups, std=torch.ones(5 * count))
    assert errors.item() == 2.5 + 1.0


def test_predictions_equal_numpy():
    sensor, last, residual = make_sensor(), make_readings(2, 3), make_readings(2, 3, seed=7)
    std, expected = sensor.std.numpy(), []
    for group, start, part in columns(last):
        move = residual[..., part] * std[part]
        moved = move if group.type is ValueType.VELOCITY else start + move
        if group.type in UNIT:
            vectors = as_vectors(moved, group)
            moved = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).reshape(2, 3, -1)
        expected.append(moved)
    found = sensor.predict(torch.from_numpy(last), torch.from_numpy(residual))
    np.testing.assert_allclose(found, np.concatenate(expected, -1), rtol=1e-6)


def test_a_residual_of_zero_is_standing_still():
    sensor, last = make_sensor(), torch.from_numpy(make_readings(2, 3))
    found = sensor.predict(last, torch.zeros_like(last))
    for group, values, part in columns(found):
        expected = 0 * values if group.type is ValueType.VELOCITY else last[..., part]
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("value_type", ValueType)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 1e-6, 1.0, 1e3]))
def test_gradients_are_finite_at_every_residual(value_type, seed, size):
    groups = groups_of(value_type)
    sensor = make_sensor(groups)
    last, truth = (
        torch.from_numpy(make_readings(4, groups=groups, seed=[seed, n])).float() for n in (0, 1)
    )
    noise = np.random.default_rng(seed).normal(size=last.shape)
    residual = torch.from_numpy(size * noise).float().requires_grad_()
    value_errors(sensor.predict(last, residual), truth, groups, std=sensor.std).sum().backward()
    assert residual.grad.isfinite().all()


@pytest.mark.parametrize("value_type", sorted(UNIT))
def test_a_prediction_that_cancels_out_has_finite_gradients(value_type):
    groups = groups_of(value_type)
    last = torch.from_numpy(make_readings(4, groups=groups)).float()
    residual = (-last).requires_grad_()
    sensor = SensorValues(groups)
    value_errors(sensor.predict(last, residual), last, groups, std=sensor.std).sum().backward()
    assert residual.grad.isfinite().all()


def test_velocities_go_to_the_head_standardized():
    sensor, readings, statistics = make_sensor(), make_readings(2, 3), make_statistics()
    part = next(part for group, _, part in columns(readings) if group.type is ValueType.VELOCITY)
    mean, std = (np.array(statistics[key])[part] for key in ("mean", "std"))
    found = sensor.rates(torch.from_numpy(readings))
    np.testing.assert_allclose(found, (readings[..., part] - mean) / std, rtol=1e-5)
    assert sensor.num_rates == found.shape[-1] == 2


def test_a_sensor_without_velocities_gives_the_head_nothing():
    sensor = make_sensor(groups_of(ValueType.QUATERNION, ValueType.SCALAR))
    assert sensor.num_rates == 0
    assert sensor.rates(torch.zeros(2, 3, 10)).shape == (2, 3, 0)


def test_before_the_first_reading_poses_are_identities_and_numbers_their_mean():
    initial = make_sensor().initial().numpy()
    for group, values, part in columns(initial):
        if group.type in STANDARDIZED:
            np.testing.assert_allclose(values, make_statistics()["mean"][part], rtol=1e-6)
        else:
            unit = {ValueType.QUATERNION: [0, 0, 0, 1], ValueType.DIRECTION: [0, 0, 1]}
            assert values.tolist() == unit.get(group.type, [0]) * 2


def test_statistics_standardize_only_types_without_a_scale_of_their_own():
    sensor, statistics = make_sensor(), make_statistics()
    for group, mean, part in columns(sensor.mean):
        if group.type in STANDARDIZED:
            np.testing.assert_allclose(mean, statistics["mean"][part], rtol=1e-6)
            np.testing.assert_allclose(sensor.std[part], statistics["std"][part], rtol=1e-6)
        else:
            assert not mean.any()
            assert (sensor.std[part] == 1).all()


def test_a_constant_value_keeps_its_unit():
    sensor = SensorValues(groups_of(ValueType.SCALAR))
    std = [0.0, np.nextafter(MIN_STD, 0)]
    sensor.set_statistics({"count": 3, "mean": [5.0, 5.0], "std": std}, name="hand")
    assert sensor.std.tolist() == [1.0, 1.0]
    x = torch.tensor([[[5.0, 5.125]]])
    found = sensor.features(x, torch.ones(1, 1, dtype=torch.bool))
    assert found.tolist() == [[[0.0, 0.125]]]


def test_values_of_a_large_unit_are_standardized():
    sensor = SensorValues(groups_of(ValueType.SCALAR))
    tesla = {"count": 3, "mean": [4e-5, 0.0], "std": [2e-5, MIN_STD]}
    sensor.set_statistics(tesla, name="magnetometer")
    assert sensor.std.tolist() == pytest.approx(tesla["std"])


@pytest.mark.parametrize("statistics", [{}, {"count": 0}])
def test_without_statistics_values_are_unchanged(statistics):
    sensor = SensorValues(ALL_TYPES)
    sensor.set_statistics(statistics, name="hand")
    assert not sensor.mean.any()
    assert (sensor.std == 1).all()


def test_statistics_of_another_stream_are_refused():
    with pytest.raises(ConfigError, match=r"statistics of hand have 3 values, .* 28; fix"):
        make_sensor(statistics=make_statistics(3))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), per_tick=st.integers(1, 4), num_ticks=st.integers(1, 6))
def test_the_last_valid_position_of_a_tick_equals_a_loop(data, per_tick, num_ticks):
    size = per_tick * num_ticks
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    expected = [
        max((i for i in range((tick + 1) * per_tick) if valid[i]), default=-1)
        for tick in range(num_ticks)
    ]
    assert last_positions(torch.tensor([valid]), per_tick=per_tick).tolist() == [expected]
