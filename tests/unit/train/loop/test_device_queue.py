"""A GPU's queue, as far as it can be seen without one: in which stream what is done."""

from __future__ import annotations

import contextlib

import pytest
import torch

from train.loop.prefetch import CudaQueue, make_queue


class FakeStreams:
    """Notes in which stream things are done."""

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
