"""Declared streams: sizes and labels, and one clear line for each wrong key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import make_section
from shared.errors import ConfigError
from shared.recipe import Recipe
from shared.streams import (
    DEFAULT_STREAMS,
    DEFAULTS_OF_KIND,
    RESERVED_NAMES,
    VECTOR_SIZES,
    AudioStream,
    Kind,
    SensorStream,
    TextStream,
    ValueGroup,
    ValueType,
    VideoStream,
    check_stream_name,
)

CLASSES = {
    Kind.VIDEO: VideoStream,
    Kind.AUDIO: AudioStream,
    Kind.SENSOR: SensorStream,
    Kind.TEXT: TextStream,
}
SCALARS = [{"count": 2, "type": "scalar"}]


def complaint(stream: Any, **sections: Any) -> str:
    """Return the one line that refuses a recipe with a stream called `a`."""
    with pytest.raises(ConfigError) as caught:
        make_section(Recipe, {"streams": {"a": stream}, **sections}, origin="r.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("r.yaml: ")
    return line.removeprefix("r.yaml: ")


def video(**keys: Any) -> dict[str, Any]:
    return {"kind": "video", "file": "a.mp4", **keys}


def audio(**keys: Any) -> dict[str, Any]:
    return {"kind": "audio", "file": "a.wav", **keys}


def sensor(**keys: Any) -> dict[str, Any]:
    return {"kind": "sensor", "key": "k", "values": SCALARS, **keys}


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"kind": "foo"}, "key 'streams.a.kind' is 'foo'; fix: use one of video, audio, sensor"),
        ({"kind": ["video"]}, "key 'streams.a.kind' is ['video']; fix: use one of video, audio"),
        ({"file": "a.mp4"}, "key 'streams.a.kind' is missing; fix: use one of video, audio"),
        (None, "key 'streams.a' is None; expected keys below it: clock, expect, file, kind"),
        ({"kind": "video"}, "key 'streams.a.file' is missing; fix: add it"),
        (video(rate_hzz=3), "unknown key 'streams.a.rate_hzz'; did you mean 'rate_hz'?"),
        (video(track=1), "unknown key 'streams.a.track'; "),
        (video(rate_hz=0), "key 'streams.a.rate_hz' is 0; input should be greater than 0"),
        (video(size=100), "streams.a.size: 100 pixels are not a multiple of 16 from 16 to 2048"),
        (video(size=[64, 40]), "fix: write 32"),
        (video(size="big"), "streams.a.size: 'big' is not a size in pixels; fix: write 224 or ["),
        (video(size=[64]), "streams.a.size: [64] is not a size in pixels"),
        (video(size=True), "streams.a.size: True is not a size in pixels"),
        (
            video(codec="h265"),
            "'streams.a.codec' is 'h265'; fix: use one of h264, mjpeg, yuv420, raw",
        ),
        (video(clock="mine"), "key 'streams.a.clock' is 'mine'; fix: use one of session, own"),
        (video(file="../a.mp4"), "streams.a.file: '../a.mp4' is not the name of a file in the"),
        (
            video(file="/etc/passwd"),
            "fix: store the file in the session folder, and write its name",
        ),
        (video(file="a\x00.mp4"), "streams.a.file: 'a\\x00.mp4' is not the name of a file"),
        (video(file=".."), "streams.a.file: '..' is not the name of a file"),
        (video(file=""), "streams.a.file: '' is not the name of a file"),
        (
            video(expect={"rang": [0, 1]}),
            "unknown key 'streams.a.expect.rang'; did you mean 'range'",
        ),
        (
            video(expect={"range": [1, 1]}),
            "streams.a.expect: range [1.0, 1.0] is empty; fix: write",
        ),
        (
            audio(track=-1),
            "key 'streams.a.track' is -1; input should be greater than or equal to 0",
        ),
        (audio(dmel={"level": 3}), "unknown key 'streams.a.dmel.level'; did you mean 'levels'?"),
        (audio(dmel={"rate_hz": 33}), "streams.a: dmel.rate_hz 33 does not divide the audio's"),
        (
            audio(dmel={"floor_db": 40}),
            "streams.a: dmel.ceiling_db 30 is not above dmel.floor_db 40",
        ),
        (audio(dmel=80), "key 'streams.a.dmel' is 80; expected keys below it: ceiling_db, "),
        ({"kind": "sensor", "key": "k"}, "key 'streams.a.values' is missing; fix: add it"),
        (sensor(values=[]), "key 'streams.a.values' is []; "),
        (
            sensor(values=SCALARS[0]),
            "'streams.a.values' is {'count': 2, 'type': 'scalar'}; expected a list",
        ),
        (
            sensor(key=None),
            "streams.a: neither key nor names of values are set; fix: set `key: KEY`",
        ),
        (
            sensor(file="a.txt"),
            "streams.a: file a.txt is no sensor file; fix: use one of .jsonl, .csv",
        ),
        (
            sensor(time_unit="min"),
            "'streams.a.time_unit' is 'min'; fix: use one of s, ms, us, ns, 100ns",
        ),
        (
            sensor(resample="cubic"),
            "'streams.a.resample' is 'cubic'; fix: use one of by_type, hold",
        ),
        (sensor(values=SCALARS * 2049), "streams.a: 4098 values exceed 4096; fix: declare several"),
        ({"kind": "text", "file": "a.txt"}, "streams.a: file a.txt is not .jsonl; fix: write"),
    ],
)
def test_a_wrong_stream_gets_one_line_with_its_key(stream, message):
    assert message in complaint(stream)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {"count": 2, "type": "foo"},
            "'streams.a.values.1.type' is 'foo'; fix: use one of scalar, ",
        ),
        ({"count": 2, "type": "angel"}, "velocity, position, quaternion, direction"),
        ({"count": 0, "type": "angle"}, "'streams.a.values.1.count' is 0; input should be greater"),
        ({"count": 2}, "key 'streams.a.values.1.type' is missing; fix: add it"),
        (
            {"count": 1, "type": "angle", "name": ["x"]},
            "'streams.a.values.1.name'; did you mean 'names'",
        ),
        (
            {"count": 5, "type": "quaternion"},
            "streams.a.values.1: 5 values of type quaternion are not a",
        ),
        ({"count": 4, "type": "direction"}, "not a multiple of 3; fix: count every component"),
        ({"count": 4, "type": "position"}, "not a multiple of 3; fix: count every component"),
        (
            {"count": 2, "type": "angle", "names": ["x"]},
            "streams.a.values.1: 1 names for 2 values; fix:",
        ),
        (
            {"count": 2, "type": "angle", "names": ["x", "x"]},
            "names are empty or repeat; fix: give each",
        ),
        (
            {"count": 2, "type": "angle", "names": ["x", ""]},
            "names are empty or repeat; fix: give each",
        ),
        (
            {"count": 2, "type": "angle", "unit": "deg"},
            "but their unit is 'deg'; fix: convert to rad, or write `type: scalar`",
        ),
        ({"count": 2, "type": "angle", "unit": ""}, "fix: convert to rad"),
        ({"count": 2, "type": "angle", "names": "xy"}, "expected a list in square brackets"),
    ],
)
def test_a_wrong_group_of_values_gets_one_line_with_its_key(group, message):
    assert message in complaint(sensor(values=[*SCALARS, group]))


def test_names_of_values_do_not_repeat_across_groups():
    group = {"count": 2, "type": "scalar", "names": ["x", "y"]}
    message = "streams.a: names of values repeat; fix: give each value its own name"
    assert complaint(sensor(values=[group, group])) == message


@pytest.mark.parametrize(
    "name", ["a", "wrist_2", "x" * 32, "g", "g1x", "validity", "gaze", *DEFAULT_STREAMS]
)
def test_plain_names_are_accepted(name):
    check_stream_name(name)


@pytest.mark.parametrize(
    "name", ["", "A", "1a", "_a", "a-b", "a.b", "a/b", "ä", "x" * 33, "a\n", "a b"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not lower-case letters, digits and _, up to 32; fix:"):
        check_stream_name(name)


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "a_valid", "g0", "g12"])
def test_reserved_names_are_refused(name):
    with pytest.raises(ValueError, match=f"stream name '{name}' is reserved; fix: rename"):
        check_stream_name(name)


@given(
    counts=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(list(ValueType))), min_size=1, max_size=6
    ),
    is_named=st.booleans(),
)
def test_slices_and_labels_follow_the_groups(counts, is_named):
    groups, columns = [], []
    for number, (vectors, value_type) in enumerate(counts):
        count = vectors * VECTOR_SIZES.get(value_type, 1)
        names = [f"n{number}_{i}" for i in range(count)] if is_named else None
        groups.append({"count": count, "type": value_type, "names": names})
        columns += [(number, i) for i in range(count)]
    stream = SensorStream.model_validate(sensor(values=groups))
    assert stream.size == len(columns)
    for number, where in enumerate(stream.slices):
        assert columns[where] == [(number, i) for i in range(groups[number]["count"])]
    types = [groups[number]["type"] for number, _ in columns]
    numbered = [f"{value_type}_{i}" for value_type, (_, i) in zip(types, columns, strict=True)]
    named = [f"n{number}_{i}" for number, i in columns]
    assert list(stream.labels) == (named if is_named else numbered)
    assert stream.names == (tuple(named) if is_named else None)


def test_units_are_those_of_the_type_unless_the_recipe_gives_one():
    units = {t: ValueGroup(count=12, type=t).unit_label for t in ValueType}
    assert units == {
        "scalar": "", "fraction": "0..1", "angle": "rad", "velocity": "rad/s", "position": "m",
        "quaternion": "", "direction": "",
    }  # fmt: skip
    assert ValueGroup(count=1, type=ValueType.ANGLE, unit="rad").unit_label == "rad"
    assert ValueGroup(count=3, type=ValueType.POSITION, unit="cm").unit_label == "cm"
    assert ValueGroup(count=3, type=ValueType.POSITION, unit="").unit_label == ""


@pytest.mark.parametrize(
    ("keys", "gap_s", "age_s"),
    [
        ({"rate_hz": 60}, 0.05, 0.05),
        ({"rate_hz": 60, "max_gap_s": 0.2}, 0.2, 0.2),
        ({"rate_hz": 60, "max_age_s": 0.4}, 0.05, 0.4),
    ],
)
def test_limits_of_gaps_and_ages_follow_the_rate(keys, gap_s, age_s):
    stream = SensorStream.model_validate(sensor(**keys))
    assert (stream.gap_limit_s, stream.age_limit_s) == (gap_s, age_s)


@pytest.mark.parametrize(("size", "height", "width"), [(64, 64, 64), ([48, 96], 48, 96)])
def test_a_size_is_a_square_or_height_and_width(size, height, width):
    stream = VideoStream.model_validate(video(size=size))
    assert (stream.height, stream.width) == (height, width)


@pytest.mark.parametrize(
    ("keys", "metadata_key"),
    [({}, None), ({"stream": "internal"}, "internal_text"), ({"key": "said"}, "said")],
)
def test_texts_in_metadata_have_the_key_of_their_stream(keys, metadata_key):
    assert TextStream.model_validate({"kind": "text", **keys}).metadata_key == metadata_key


@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_has_its_defaults_as_keys(kind):
    stream = CLASSES[kind].model_fields
    for key, field in DEFAULTS_OF_KIND[kind].model_fields.items():
        assert stream[key].annotation == field.annotation
        assert stream[key].default == field.default
