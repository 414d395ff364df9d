"""Windows of random streams, segments and strides against a slow reference of the whole session.

The reference reads each stream over the whole session at once and cuts windows sample by sample.
It knows nothing of segments but which are stored, which it decides by itself.
"""

from __future__ import annotations

import math
import tempfile
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.sessions import make_readings, text_lines, write_streams
from helpers.sets import build_set, open_windows, read_sample, sample_locations
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shared.clock import Segment
from shared.recipe import Recipe
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.shardset.layout import max_run_segments
from shared.streams import Kind
from shared.values import resample
from train.config import TrainConfig
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource
from train.shapes import common_period_s

TICK_RATE = 10

STREAMS = {
    "front": {"kind": "video", "file": "front.mp4", "rate_hz": 5, "size": 16},
    "wrist": {"kind": "video", "file": "wrist.mp4", "rate_hz": 15, "size": [16, 32]},
    "voice": {"kind": "audio", "file": "voice.wav"},
    "battery": {
        "kind": "sensor",
        "key": "b",
        "rate_hz": 1,
        "values": [{"count": 1, "type": "scalar"}],
    },
    "hand": {
        "kind": "sensor",
        "key": "hand",
        "rate_hz": 15,
        "values": [{"count": 3, "type": "position"}, {"count": 4, "type": "quaternion"}],
    },
    "arm": {
        "kind": "sensor",
        "key": "arm",
        "rate_hz": 30,
        "values": [{"count": 2, "type": "angle"}, {"count": 2, "type": "velocity"}],
    },
    "gaze": {
        "kind": "sensor",
        "file": "gaze.csv",
        "rate_hz": 120,
        "values": [{"count": 3, "type": "direction", "names": ["x", "y", "z"]}],
    },
    "speech": {"kind": "text", "stream": "speech"},
    "notes": {"kind": "text", "file": "notes.jsonl", "tokens_per_s": 4},
}


@st.composite
def worlds(draw):
    """Draw a recipe, a session with gaps, and windows."""
    names = sorted(draw(st.sets(st.sampled_from(sorted(STREAMS)), min_size=1, max_size=5)))
    assume(any(STREAMS[name]["kind"] != "video" for name in names))  # one is predicted
    segment_s = draw(st.sampled_from([1.0, 2.0]))
    recipe = Recipe.model_validate(
        {
            "segment": {"duration_s": segment_s},
            "video": {"codec": draw(st.sampled_from(["raw", "yuv420"]))},
            "audio": {"rate_hz": 8000, "dmel": {"fft_size": 256, "channels": 4}},
            "text": {"vocab_size": 264},
            "split": {"val_fraction": 0},
            "shard": {"target_bytes": draw(st.sampled_from([1 << 16, 1 << 24]))},
            "streams": {name: STREAMS[name] for name in names},
        }
    )
    # Gaps and starts are no multiples of any sample's time, so that rounding decides nothing.
    duration_s = draw(st.integers(5, 90)) / 10
    gaps, starts = {}, {}
    for name in names:
        kind = recipe.streams[name].kind
        if kind is Kind.SENSOR and draw(st.booleans()):
            start = draw(st.integers(10, 60)) / 10 + 0.003
            gaps[name] = [(start, start + draw(st.integers(1, 40)) / 10)]
        if kind in (Kind.VIDEO, Kind.AUDIO) and draw(st.booleans()):
            starts[name] = draw(st.integers(0, round(10 * duration_s) - 4)) / 10
    rates = [
        spec.dmel.rate_hz if spec.kind is Kind.AUDIO else spec.rate_hz
        for spec in recipe.streams.values()
        if spec.kind is not Kind.TEXT
    ]
    period = round(common_period_s([TICK_RATE, *rates]) * TICK_RATE)
    ticks = period * draw(st.integers(1, 40 // period))
    stride = period * draw(st.integers(1, ticks // period))
    return SimpleNamespace(
        recipe=recipe, duration_s=duration_s, gaps=gaps, starts=starts, ticks=ticks, stride=stride
    )


def make_config(world, pixels):
    """Read every stream; text alone is put on ticks by the reference only."""
    window = {"duration_s": world.ticks / TICK_RATE, "stride_s": world.stride / TICK_RATE}
    targets = [n for n, s in world.recipe.streams.items() if s.kind is not Kind.VIDEO]
    return TrainConfig.model_validate(
        {
            "data": {"window": window, "pixels": pixels, "modalities": list(world.recipe.streams)},
            "training": {"loss_weights": dict.fromkeys(targets, 1.0)},
        }
    )


class Reference:
    """Every stream of a session on its clock, and the windows that it has."""

    def __init__(self, folder, world, tokenizer):
        self.world, recipe = world, world.recipe
        scan = scan_session(folder, recipe=recipe)
        self.duration_s = scan.duration_s
        reader = SessionReader(folder, scan, recipe=recipe, tokenizer=tokenizer)
        self.num_segments = math.ceil((self.duration_s - 1e-6) / recipe.segment_s)
        whole = Segment(0, self.num_segments * recipe.segment_s)
        self.samples, self.valid, self.tokens = {}, {}, {}
        for name, spec in recipe.streams.items():
            if name not in scan.intervals:
                continue
            if spec.kind is Kind.TEXT:
                self.tokens[name] = self.read_tokens(name, spec, tokenizer)
                continue
            if spec.kind is Kind.VIDEO:
                ((_, frames),) = reader.iter_frames(name, [whole])
                samples, valid, rate = frames.pictures, np.isfinite(frames.error_s), spec.rate_hz
            elif spec.kind is Kind.AUDIO:
                samples, rate = reader.read_dmel(name, whole), spec.dmel.rate_hz
                valid = (samples < 255).all(axis=1)
            else:
                grid_s, rate = whole.grid(spec.rate_hz), spec.rate_hz
                readings = make_readings(
                    spec,
                    world.duration_s,
                    start_s=world.starts.get(name, 0.0),
                    gaps=world.gaps.get(name, ()),
                )
                samples = resample(*readings, grid_s, stream=spec)
                valid = ~np.isnan(samples).any(axis=1)
            # Nothing is valid after the session's end.
            times_s = np.arange(len(samples)) / rate
            self.samples[name], self.valid[name] = (
                samples,
                valid & (times_s < self.duration_s - 1e-6),
            )

    def read_tokens(self, name, spec, tokenizer):
        """Return (tick, token); each has a time of its own, in microseconds."""
        tokens, free = [], Fraction(0)
        for line in text_lines(name, spec, self.world.duration_s):
            begin = max(Fraction(str(line["timestamp"])), free)
            for number, token in enumerate(tokenizer.encode(line["text"])):
                time = begin + Fraction(number) / Fraction(str(spec.tokens_per_s))
                tokens.append((math.floor(time * TICK_RATE), token))
                free = time + 1 / Fraction(str(spec.tokens_per_s))
        return tokens

    def spoken(self, name):
        """Return the first and last segment of each text: at most a token per byte, before any."""
        free = Fraction(0)
        spec, segment_s = self.world.recipe.streams[name], self.world.recipe.segment_s
        for line in text_lines(name, spec, self.world.duration_s):
            begin = max(Fraction(str(line["timestamp"])), free)
            free = begin + Fraction(len(line["text"].encode())) / Fraction(str(spec.tokens_per_s))
            yield math.floor(begin / Fraction(segment_s)), math.floor(free / Fraction(segment_s))

    def runs(self):
        """Return the segments of each run: those with a sample or perhaps a token, up to cuts."""
        recipe = self.world.recipe
        stored = []
        for number in range(self.num_segments):
            has_token = any(
                first <= number <= last for name in self.tokens for first, last in self.spoken(name)
            )
            has_sample = any(
                valid.reshape(self.num_segments, -1)[number].any() for valid in self.valid.values()
            )
            if has_sample or has_token:
                stored.append(number)
        length = max_run_segments(recipe)
        grouped = groupby(enumerate(stored), key=lambda p: (p[1] - p[0], p[1] // length))
        return [[number for _, number in run] for _, run in grouped]

    def windows(self):
        """Return (first tick, last tick of the run + 1) of each window."""
        per_segment = round(self.world.recipe.segment_s * TICK_RATE)
        windows = []
        for run in self.runs():
            start, stop = run[0] * per_segment, (run[-1] + 1) * per_segment
            more = max(0, math.ceil((stop - start - self.world.ticks) / self.world.stride))
            windows += [(start + i * self.world.stride, stop) for i in range(1 + more)]
        return windows

    def check(self, out, first, stop, seen):
        """Compare the arrays of a window that begins at a tick, position by position."""
        for name, spec in self.world.recipe.streams.items():
            values, valid = out.get(name), out.get(f"{name}_valid")
            if values is None:  # packed text
                continue
            for position in range(len(valid)):
                value, is_valid = self.at(name, spec, first, stop, position, seen)
                where = f"{name} at {position} of window {first}"
                assert valid[position] == is_valid, where
                if not is_valid:
                    assert not values[position].any(), where
                elif spec.kind is Kind.SENSOR:
                    np.testing.assert_allclose(values[position], value, atol=2e-5, err_msg=where)
                else:
                    np.testing.assert_array_equal(values[position], value, err_msg=where)

    def at(self, name, spec, first, stop, position, seen):
        """Return the value at a position of a window, and whether it is valid."""
        if spec.kind is Kind.TEXT:
            tick = first + position
            is_valid = (
                name in self.tokens
                and tick < stop
                and tick < math.ceil((self.duration_s - 1e-6) * TICK_RATE)
            )
            ids = [token for at, token in self.tokens.get(name, []) if at == tick]
            return (ids[0] if ids else 0), is_valid
        rate = spec.dmel.rate_hz if spec.kind is Kind.AUDIO else round(spec.rate_hz)
        per_tick = 1 if spec.kind is Kind.VIDEO else math.ceil(rate / TICK_RATE)
        if spec.kind is Kind.VIDEO:
            sample = position * max(rate, TICK_RATE) // TICK_RATE if rate > TICK_RATE else position
        else:
            tick, place = divmod(position, per_tick)
            own = [
                k
                for k in range(rate * self.world.ticks // TICK_RATE + 1)
                if k * TICK_RATE // rate == tick
            ]
            if place >= len(own):
                return 0, False
            sample = own[place]
        number = first * rate // TICK_RATE + sample
        if number >= stop * rate // TICK_RATE or name not in self.valid:
            return 0, False
        seen.add((name, number))
        return self.samples[name][number], bool(self.valid[name][number])


@pytest.mark.parametrize("pixels", ["rgb"])
@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(world=worlds())
def test_windows_equal_those_of_the_whole_session(world, pixels):
    with tempfile.TemporaryDirectory() as root:
        folder = write_streams(
            Path(root) / "sessions" / "s",
            world.recipe,
            duration_s=world.duration_s,
            gaps=world.gaps,
            starts=world.starts,
        )
        config = make_config(world, pixels)
        shards = open_windows(
            ShardSource(build_set(folder.parent, Path(root) / "set", world.recipe)), config
        )
        direct = open_windows(SessionSource(folder.parent, recipe=world.recipe), config)
        assert direct.tokenizer.json == shards.tokenizer.json
        reference = Reference(folder, world, shards.tokenizer)
        windows = {f"s@{first}": (first, stop) for first, stop in reference.windows()}
        ours = {shards.key(*p): p for p in sample_locations(shards)}
        theirs = {direct.key(*p): p for p in sample_locations(direct)}
        assert list(ours) == list(windows) == list(theirs)
        seen = set()
        for key, (first, stop) in windows.items():
            out, texts = read_sample(shards, ours[key], pixels=pixels)
            same, same_texts = read_sample(direct, theirs[key], pixels=pixels)
            for name, values in out.items():
                np.testing.assert_array_equal(values, same[name], err_msg=f"{key} {name}")
            for name, text in texts.items():
                for one, other in zip(text, same_texts[name], strict=True):
                    np.testing.assert_array_equal(one, other, err_msg=f"{key} {name}")
            reference.check(out, first, stop, seen)
        # The windows cover all that was recorded; of a fast video, the frames that a tick sees.
        for name, valid in reference.valid.items():
            spec = world.recipe.streams[name]
            if spec.kind is not Kind.VIDEO or spec.rate_hz <= TICK_RATE:
                assert {(name, number) for number in np.flatnonzero(valid).tolist()} <= seen
