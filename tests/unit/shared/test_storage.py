"""Retries: how often, how long, for which errors, and what is logged."""

from __future__ import annotations

import logging
import time

import pytest
from helpers.faulty_server import FaultyServer

from shared import storage
from shared.errors import StorageError
from shared.storage import RetryPolicy, Store, with_retry

RETRY = RetryPolicy(attempts=6, first_wait_s=1.0, longest_wait_s=5.0)


@pytest.fixture
def waits(monkeypatch):
    """Waits that were requested; the clock advances only by them."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + sum(slept))
    return slept


def failing(num, *, is_transient=True):
    """Make a call that fails `num` times."""
    times = iter(range(1000))

    def call():
        number = next(times)
        if number < num:
            raise StorageError(f"failure {number}", is_transient=is_transient)
        return number

    return call


def test_a_transient_error_is_retried_until_it_passes(waits):
    assert with_retry(failing(5), retry=RETRY) == 5
    assert len(waits) == 5


def test_the_bound_of_the_waits_doubles_up_to_the_longest(monkeypatch, waits):
    bounds = []
    monkeypatch.setattr(storage._random, "uniform", lambda low, high: bounds.append(high) or low)
    with pytest.raises(StorageError):
        with_retry(failing(99), retry=RETRY)
    assert bounds == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_full_jitter_spreads_the_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for _ in range(200):
        with_retry(failing(1), retry=RETRY)
    assert 0 <= min(waits) < 0.1
    assert 0.9 < max(waits) <= 1


def test_the_number_of_attempts_is_bounded(waits):
    with pytest.raises(StorageError, match="failure 5; given up after 6 attempts in") as caught:
        with_retry(failing(99), retry=RETRY)
    assert "--resume auto" in str(caught.value)
    assert len(waits) == 5


def test_the_total_time_is_bounded(waits):
    retry = RetryPolicy(attempts=10**6, first_wait_s=1.0, longest_wait_s=8.0, total_s=60.0)
    with pytest.raises(StorageError, match="given up after"):
        with_retry(failing(10**6), retry=retry)
    assert 50 < sum(waits) <= 60


def test_a_permanent_error_is_not_retried(waits):
    with pytest.raises(StorageError, match=r"failure 0$"):
        with_retry(failing(99, is_transient=False), retry=RETRY)
    assert waits == []


def test_each_retry_is_logged_once(waits, caplog):
    with caplog.at_level(logging.WARNING):
        with_retry(failing(2), retry=RETRY)
    said = [r.getMessage() for r in caplog.records]
    assert [s.partition(" in ")[0] for s in said] == [
        "failure 0; attempt 2 of 6",
        "failure 1; attempt 3 of 6",
    ]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x").write_bytes(b"content" * 1000)
    with FaultyServer(tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("fault", "is_transient"),
    [("500", True), ("503", True), ("reset", True), ("cut", True), ("403", False)],
)
def test_which_responses_are_transient(server, tmp_path, fault, is_transient):
    server.plan = lambda _name, _before: fault
    with pytest.raises(StorageError, match=rf"{server.url}/set/x: ") as caught:
        Store(f"{server.url}/set").download("x", tmp_path / "x")
    assert caught.value.is_transient is is_transient


@pytest.mark.parametrize("fault", ["stall", "silence"])
def test_a_silent_server_times_out(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.2)
    server.plan = lambda _name, _before: fault
    with pytest.raises(StorageError) as caught:
        Store(f"{server.url}/set").download("x", tmp_path / "x")
    assert caught.value.is_transient


def test_a_missing_file_is_not_a_storage_error(server, tmp_path):
    with pytest.raises(FileNotFoundError):
        Store(f"{server.url}/set").download("y", tmp_path / "y")


@pytest.mark.parametrize("url", ["s3://b/x", "https://host/x"])
def test_a_missing_package_is_named(monkeypatch, url, tmp_path):
    def fail(*_args, **_options):
        raise ImportError("no such module")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(StorageError, match=r"run `pip install '(s3fs|aiohttp)>=") as caught:
        Store(url).download("x", tmp_path / "x")
    assert not caught.value.is_transient


def test_a_pickled_error_keeps_its_fields():
    import multiprocessing.reduction

    error = StorageError("all", summary="short", is_transient=True)
    send = multiprocessing.reduction.ForkingPickler
    again = send.loads(send.dumps(error))
    assert (str(again), again.summary, again.is_transient) == ("all", "short", True)
