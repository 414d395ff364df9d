"""Predicted tokens as events."""

from __future__ import annotations

from helpers.trained_models import TOKENIZER

from shared.media.tokenizer import EVENT_TOKEN
from train.model.outputs import group_events


def test_events_start_at_the_event_mark_and_after_silence():
    ball, reach = TOKENIZER.encode("ball")[1:], TOKENIZER.encode("reach")[1:]
    tokens = [EVENT_TOKEN, *ball, EVENT_TOKEN, *reach, 0, 0, *ball, 0]
    times_s = [0.1 * (i + 1) for i in range(len(tokens))]
    starts = [0, 1 + len(ball), 4 + len(ball) + len(reach)]
    events = group_events(tokens, times_s, TOKENIZER)
    assert [e["text"] for e in events] == ["ball", "reach", "ball"]
    assert [e["timestamp"] for e in events] == [round(times_s[i], 6) for i in starts]
    assert [e["tokens"] for e in events] == [[EVENT_TOKEN, *ball], [EVENT_TOKEN, *reach], ball]


def test_silence_is_no_event():
    assert group_events([0, 0, 0], [0.1, 0.2, 0.3], TOKENIZER) == []
