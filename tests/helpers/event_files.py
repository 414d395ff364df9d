"""What TensorBoard's files of a run say."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder):
    """TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def text_of(folder, tag):
    events = read_events(folder).Tensors(f"{tag}/text_summary")
    return " ".join(event.tensor_proto.string_val[0].decode() for event in events)
