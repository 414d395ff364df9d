"""Batches copied to the training device: each tensor once, finished when handed out."""

from __future__ import annotations

import pytest
import torch

from train.data.device import to_device


def test_copies_to_a_gpu_are_done_when_the_batch_is_handed_out(monkeypatch):
    """The loader recycles the memory as soon as the batch is released."""
    events = []

    class Stream:
        def synchronize(self):
            events.append("waited")

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: events.append("sent"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    to_device({"inputs": {"a": torch.ones(2), "b": torch.ones(2)}, "keys": ["s/0"]}, "cuda")
    assert events == ["sent", "sent", "waited"]


def test_inputs_that_are_targets_are_copied_once_and_stay_one_tensor(monkeypatch):
    copied = []
    to = torch.Tensor.to

    def note(tensor, *args, **options):
        copied.append(tensor.data_ptr())
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", note)
    audio, touch = torch.ones(2), torch.ones(2)
    batch = {"inputs": {"audio": audio, "touch": touch}, "targets": {"audio": audio}}
    moved = to_device(batch, "meta")
    assert copied == [audio.data_ptr(), touch.data_ptr()]
    assert moved["targets"]["audio"] is moved["inputs"]["audio"]
    assert moved["inputs"]["touch"] is not moved["inputs"]["audio"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_batch_goes_to_the_device_with_its_nesting_and_its_names(kind):
    batch = {"inputs": {"a": torch.ones(2)}, "more": kind([torch.ones(1), 3]), "keys": ["s/0"]}
    moved = to_device(batch, "meta")
    assert moved["inputs"]["a"].device.type == "meta"
    assert isinstance(moved["more"], kind)
    assert moved["more"][0].device.type == "meta"
    assert moved["more"][1] == 3
    assert moved["keys"] == ["s/0"]
