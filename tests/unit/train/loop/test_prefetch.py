"""The batch feed: what it waits for, its positions, plain loaders, and a GPU's queue."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref

import pytest
import torch
from helpers.fakes import EmulatedDevice

from train.loop import prefetch as module
from train.loop.prefetch import BatchFeed, CudaQueue, PlainLoader, make_queue

LOADER_S = 0.05
CPU = torch.device("cpu")


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self):
        self.time_s = 1.0

    def now_s(self):
        return self.time_s

    def sleep(self, seconds):
        self.time_s += seconds


class SlowLoader:
    """Batches that take LOADER_S each; it knows which of them are still referenced."""

    def __init__(self, clock):
        self._clock = clock
        self._given = weakref.WeakValueDictionary()
        self._first = 0

    @property
    def held(self):
        return sorted(self._given)

    def state_at(self, next_batch):
        return {"next_batch": next_batch}

    def load_state_dict(self, state):
        self._first = state["next_batch"]

    def __iter__(self):
        for index in itertools.count(self._first):
            self._clock.sleep(LOADER_S)
            audio = torch.tensor([index])
            self._given[index] = audio
            yield {"inputs": {"audio": audio}, "index": index}


class CopyingDevice(EmulatedDevice):
    """A device with memory of its own."""

    def send(self, batch):
        sent, mark = super().send(batch)
        return copy.deepcopy(sent), mark


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock.now_s)
    return clock


def make_feed(clock, *, copy_s=0.0):
    device = CopyingDevice(copy_s=copy_s, now_s=clock.now_s, sleep=clock.sleep)
    loader = SlowLoader(clock)
    return BatchFeed(loader, CPU, seed=0, queue=device), loader, device


def run_steps(clock, *, count, compute_s, num_steps, copy_s=0.0):
    """Batches of each step, and its wait for data."""
    feed, _, device = make_feed(clock, copy_s=copy_s)
    steps = []
    for _ in range(num_steps):
        steps.append([batch["index"] for batch in feed.take(count)])
        device.launch(compute_s)
        feed.fetch_ahead()
    device.mark().synchronize()
    return feed, steps, feed.take_waits_s()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "compute_s", [0.0, 0.02, 0.12, 0.5], ids=["no work", "little", "some", "much"]
)
def test_a_step_waits_for_what_its_batches_take_longer_than_the_step_before(
    clock, count, compute_s
):
    _, _, waits_s = run_steps(clock, count=count, compute_s=compute_s, num_steps=4)
    first, *later = waits_s
    assert first == pytest.approx(count * LOADER_S)
    assert later == pytest.approx([max(0.0, count * LOADER_S - compute_s)] * 3)


def test_a_copy_that_outlasts_the_step_before_is_waited_for_by_the_device(clock):
    _, _, waits_s = run_steps(clock, count=1, compute_s=0.08, num_steps=6, copy_s=0.1)
    assert waits_s[3:] == pytest.approx([0.1 - 0.08] * 3)


@pytest.mark.parametrize("count", [1, 3])
def test_a_steps_batches_are_there_when_it_begins_and_the_position_is_of_those_taken(clock, count):
    feed, steps, _ = run_steps(clock, count=count, compute_s=1.0, num_steps=3)
    assert steps == [list(range(i * count, (i + 1) * count)) for i in range(3)]
    assert feed.state() == {"next_batch": 3 * count}
    before_s = clock.time_s
    assert len(feed.take(count)) == count
    assert clock.time_s == before_s  # nothing was left to fetch
    assert feed.state() == {"next_batch": 4 * count}


def test_a_feed_that_took_more_before_hands_out_what_is_there_first(clock):
    feed, _, _ = make_feed(clock)
    feed.take(3)
    feed.fetch_ahead()
    feed.fetch_ahead()  # twice is once
    assert [batch["index"] for batch in feed.take(1)] == [3]
    feed.fetch_ahead()
    assert [batch["index"] for batch in feed.take(3)] == [4, 5, 6]


def test_the_host_does_not_wait_for_copies_and_keeps_their_memory_until_they_are_done(clock):
    feed, loader, _ = make_feed(clock, copy_s=0.2)
    feed.take(2)
    feed.fetch_ahead()
    assert clock.time_s == pytest.approx(1 + 4 * LOADER_S)
    assert loader.held == [0, 1, 2, 3]
    clock.sleep(0.3)  # now 0 and 1 are copied
    feed.take(2)
    feed.fetch_ahead()
    assert loader.held == [2, 3, 4, 5]


def test_no_more_batches_are_kept_than_have_a_slot(clock):
    feed, loader, _ = make_feed(clock, copy_s=10.0)
    for step in range(4):
        feed.take(2)
        feed.fetch_ahead()
        assert loader.held == [2 * step + i for i in range(4)]
    assert clock.time_s == pytest.approx(1 + LOADER_S + 6 * 10.0 + LOADER_S)


@pytest.mark.parametrize("end", [BatchFeed.close, lambda feed: None], ids=["closed", "forgotten"])
def test_a_feed_that_ends_waits_for_copies_before_it_releases_batches(clock, end):
    feed, loader, _ = make_feed(clock, copy_s=10.0)
    feed.take(2)
    end(feed)
    del feed
    assert clock.time_s > 20.0
    assert loader.held == []


@pytest.mark.parametrize("start", [0, 2, 3, 7])
def test_a_plain_loader_resumes_behind_every_batch_of_every_pass(start):
    loader = PlainLoader([{"name": name} for name in "abc"], seed=0)
    batches = loader.open()
    states = [loader.state_at(0)]
    names = []
    for _ in range(9):
        batch = next(batches)
        names.append(batch["name"])
        states.append(loader.state_at(batch["index"] + 1))
    assert names == list("abcabcabc")
    resumed = PlainLoader([{"name": name} for name in "abc"], seed=0)
    resumed.load_state_dict(states[start])
    assert resumed.state_at(states[start]["next_batch"]) == states[start]
    rest = list(itertools.islice(resumed.open(), 9 - start))
    assert [batch["name"] for batch in rest] == names[start:]


class FakeStreams:
    """Records in which stream something is done."""

    def __init__(self):
        self.calls = []
        self.current = "compute"

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def note(self, what):
        self.calls.append((self.current, what))

    def wait_stream(self, stream):
        self.note(f"waits for {stream}")

    def Event(self, *, enable_timing):  # noqa: N802
        assert enable_timing
        streams = self

        class Recorded:
            def record(self):
                streams.note("event")

        return Recorded()


@pytest.fixture
def streams(monkeypatch):
    streams = FakeStreams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    monkeypatch.setattr(torch.cuda, "Event", streams.Event)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, used_by: streams.note(tensor.item())
    )
    return streams


def test_copies_and_the_mark_behind_them_are_on_the_side_stream(streams, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: streams.note("copy"))
    CudaQueue("cuda").send({"inputs": {"a": torch.ones(2), "b": torch.ones(2)}, "keys": ["s/0"]})
    assert streams.calls == [("copies", "copy"), ("copies", "copy"), ("copies", "event")]


def test_the_compute_stream_waits_for_copies_and_the_allocator_knows_of_it(streams):
    queue = CudaQueue("cuda")
    queue.mark()
    queue.receive({"inputs": {"a": torch.tensor(1), "b": torch.tensor(2)}})
    assert streams.calls == [
        ("compute", "event"),
        ("compute", "waits for copies"),
        ("compute", 1),
        ("compute", 2),
    ]


def test_a_cpu_has_no_queue():
    assert make_queue(torch.device("cpu")) is None
