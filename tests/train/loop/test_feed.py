"""The feed of a GPU, on a device whose clock is this test's."""

from __future__ import annotations

import contextlib

import pytest
import torch

from train.loop import feed as module
from train.loop.feed import BatchFeed

LOADER_S = 0.05


class Device:
    """A queue of work: an event is reached when all that was launched before is done."""

    def __init__(self):
        self.now_s = 0.0
        self.free_s = 0.0
        self.calls = []

    def launch(self, seconds):
        self.free_s = max(self.now_s, self.free_s) + seconds

    def event(self):
        return Event(max(self.now_s, self.free_s))

    def wait_stream(self, stream):
        self.calls.append("compute waits for copies")


class Event:
    def __init__(self, time_s):
        self.time_s = time_s

    def elapsed_time(self, later):
        return 1e3 * (later.time_s - self.time_s)


class SlowLoader:
    """Batches that take LOADER_S each."""

    def __init__(self, device):
        self.device = device

    def state_at(self, next_batch):
        return {"next_batch": next_batch}

    def load_state_dict(self, state):
        self.first = state["next_batch"]

    def __iter__(self):
        index = getattr(self, "first", 0)
        while True:
            self.device.now_s += LOADER_S
            yield {"inputs": {"audio": torch.tensor([index])}, "index": index}
            index += 1


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(module, "_side_stream", lambda _: "side stream")
    monkeypatch.setattr(module, "_recorded_event", device.event)
    monkeypatch.setattr(module.time, "perf_counter", lambda: device.now_s)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, _: device.calls.append(tensor.item())
    )
    return device


def run_steps(device, *, count, compute_s, num_steps):
    """Batches of each step, and its wait for data."""
    feed = BatchFeed(SlowLoader(device), torch.device("cpu"), seed=0)
    steps = []
    for _ in range(num_steps):
        steps.append([batch["index"] for batch in feed.take(count)])
        device.launch(compute_s)
        feed.fetch_ahead()
    device.now_s = max(device.now_s, device.free_s)
    return feed, steps, feed.take_waits_s()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "compute_s", [0.0, 0.02, 0.12, 0.5], ids=["no work", "little", "some", "much"]
)
def test_a_step_waits_for_what_its_batches_take_longer_than_the_step_before(
    device, count, compute_s
):
    _, _, waits_s = run_steps(device, count=count, compute_s=compute_s, num_steps=4)
    first, *later = waits_s
    assert first == pytest.approx(count * LOADER_S)
    assert later == pytest.approx([max(0.0, count * LOADER_S - compute_s)] * 3)


@pytest.mark.parametrize("count", [1, 3])
def test_a_steps_batches_are_there_when_it_begins_and_the_position_is_of_those_taken(device, count):
    feed, steps, _ = run_steps(device, count=count, compute_s=1.0, num_steps=3)
    assert steps == [list(range(i * count, (i + 1) * count)) for i in range(3)]
    assert feed.state() == {"next_batch": 3 * count}
    before_s = device.now_s
    assert len(feed.take(count)) == count
    assert device.now_s == before_s  # nothing was left to fetch
    assert feed.state() == {"next_batch": 4 * count}


def test_the_compute_stream_waits_for_copies_and_the_allocator_knows_of_it(device):
    feed = BatchFeed(SlowLoader(device), torch.device("cpu"), seed=0)
    feed.take(2)
    assert device.calls == ["compute waits for copies", 0, "compute waits for copies", 1]


def test_a_feed_that_took_more_before_hands_out_what_is_there_first(device):
    feed = BatchFeed(SlowLoader(device), torch.device("cpu"), seed=0)
    feed.take(3)
    feed.fetch_ahead()
    feed.fetch_ahead()  # twice is once
    assert [batch["index"] for batch in feed.take(1)] == [3]
    feed.fetch_ahead()
    assert [batch["index"] for batch in feed.take(3)] == [4, 5, 6]
