"""Recipes: their checks, their JSON, and the split of sessions."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shared.config import load_section, make_section, parse_yaml, read_yaml
from shared.errors import ConfigError
from shared.recipe import MOVED_KEYS, Recipe, assign_split, load_recipe
from shared.streams import DEFAULT_STREAMS, Kind, ValueType

VALUES = [{"count": 2, "type": "scalar"}]
WIDE = {
    "kind": "sensor", "key": "k", "rate_hz": 2000, "values": [{"count": 1024, "type": "scalar"}]
}  # fmt: skip
LARGE = {"kind": "video", "file": "a.mp4", "codec": "raw", "rate_hz": 30, "size": 1024}


def complaint(values: dict[str, Any]) -> str:
    """Return the one line that refuses a recipe."""
    with pytest.raises(ConfigError) as caught:
        make_section(Recipe, values, origin="r.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("r.yaml: ")
    return line.removeprefix("r.yaml: ")


def file_complaint(folder, streams):
    """Return the one line that refuses a recipe file of some streams."""
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"streams": streams}))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# --- random recipes --------------------------------------------------------------------------

RATES_HZ = st.sampled_from([0.5, 1, 2.5, 15, 30, 60, 90, 120, 200])
GROUPS = st.builds(
    lambda vectors, value_type: {"count": 12 * vectors, "type": value_type},
    st.integers(1, 4),
    st.sampled_from([t.value for t in ValueType]),
)


def optional(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


VIDEO = {
    "rate_hz": RATES_HZ.filter(lambda rate_hz: rate_hz <= 120),
    "size": st.sampled_from([16, 224, [48, 2048]]),
    "fit": st.sampled_from(["crop", "stretch", "pad"]),
    "codec": st.sampled_from(["h264", "mjpeg", "yuv420", "raw"]),
}
AUDIO = {
    "rate_hz": st.sampled_from([8000, 16_000, 48_000]),
    "loudness_dbfs": st.none() | st.floats(-60, 0),
    "dmel": optional(
        rate_hz=st.sampled_from([25, 50, 100]),
        channels=st.integers(4, 256),
        floor_db=st.floats(-99, 0),
    ),
}
SENSOR = {
    "rate_hz": RATES_HZ,
    "max_gap_s": st.none() | st.floats(0.01, 10),
    "resample": st.sampled_from(["by_type", "hold"]),
}
TEXT = {"tokens_per_s": RATES_HZ}
ANY = {
    "required": st.booleans(),
    "clock": st.sampled_from(["session", "own"]),
    "expect": optional(range=st.just([0.0, 2.0]), min_rate_hz=RATES_HZ),
}


@st.composite
def streams(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Draw declarations of streams with sources of their own."""
    names = draw(
        st.lists(
            st.from_regex(r"[xyz][a-z0-9_]{0,5}", fullmatch=True),
            unique=True,
            min_size=1,
            max_size=6,
        )
    )
    declared = {}
    for number, name in enumerate(name for name in names if not name.endswith("_valid")):
        kind, keys = draw(
            st.sampled_from(
                [("video", VIDEO), ("audio", AUDIO), ("sensor", SENSOR), ("text", TEXT)]
            )
        )
        stream = {"kind": kind, **draw(optional(**ANY)), **draw(optional(**keys))}
        if kind == "sensor":
            stream |= {
                "key": f"k{number}",
                "values": draw(st.lists(GROUPS, min_size=1, max_size=3)),
            }
        else:
            stream["file"] = f"{number}.jsonl" if kind == "text" else f"{number}.mp4"
        declared[name] = stream
    return declared


RECIPES = st.fixed_dictionaries(
    {"streams": streams()},
    optional={
        "video": optional(**VIDEO),
        "audio": optional(**AUDIO),
        "sensor": optional(**SENSOR),
        "text": optional(**TEXT, vocab_size=st.integers(264, 9999)),
        "segment": optional(duration_s=st.sampled_from([2, 4.0, 10])),
    },
)


@given(values=RECIPES)
def test_a_recipe_comes_back_from_its_json_and_yaml(values):
    recipe = make_section(Recipe, values)
    assert make_section(Recipe, recipe.as_json()) == recipe
    assert make_section(Recipe, parse_yaml(yaml.safe_dump(recipe.as_json()), origin="f")) == recipe
    assert Recipe(**{name: getattr(recipe, name) for name in Recipe.model_fields}) == recipe


@given(values=RECIPES, data=st.data())
def test_the_order_of_keys_means_nothing(values, data):
    def shuffled(mapping: dict[str, Any]) -> dict[str, Any]:
        items = data.draw(st.permutations(list(mapping.items())))
        return {k: shuffled(v) if isinstance(v, dict) else v for k, v in items}

    recipe, other = make_section(Recipe, values), make_section(Recipe, shuffled(values))
    assert other == recipe
    assert list(other.streams) == sorted(values["streams"])
    assert str(other.as_json()["streams"]) == str(recipe.as_json()["streams"])


@given(values=RECIPES)
def test_a_stream_has_the_defaults_of_its_kind_unless_it_sets_them(values):
    recipe = make_section(Recipe, values)
    for name, declared in values["streams"].items():
        stream = recipe.streams[name].as_json()
        section = values.get(declared["kind"], {})
        plain = make_section(Recipe, {}).as_json()[declared["kind"]]
        for key in set(plain) & set(stream):
            if key == "dmel":
                continue
            expected = declared.get(key, section.get(key, plain[key]))
            assert stream[key] == expected, (name, key)
        for key, default in plain.get("dmel", {}).items():
            expected = declared.get("dmel", {}).get(key, section.get("dmel", {}).get(key, default))
            assert stream["dmel"][key] == expected, (name, key)


WORDS = st.text(max_size=4)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@given(values=RECIPES, data=st.data())
def test_whatever_is_written_is_a_recipe_or_lines_with_the_file(values, data):
    where: Any = values
    while keys := [k for k, v in where.items() if isinstance(v, dict) and v]:
        if data.draw(st.booleans()):
            break
        where = where[data.draw(st.sampled_from(keys))]
    where[data.draw(st.sampled_from([*where, "new"]) if where else st.just("new"))] = data.draw(
        NESTED
    )
    lines = []
    try:
        make_section(Recipe, values, origin="r.yaml")
    except ConfigError as error:
        lines = str(error).splitlines()
    assert all(line.startswith("r.yaml: ") for line in lines)


# --- one line for each fault -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streams": [1]}, "streams is '[1]'; fix: write `NAME: {kind: ..., file: ...}` below it"),
        ({"streams": {}}, "streams declares no stream; fix: declare one, or leave streams out"),
        ({"streams": {"Eye": {}}}, "stream name 'Eye' is not lower-case letters, digits and _, up"),
        ({"streams": {True: {}}}, "stream name 'True' is not lower-case"),
        ({"streams": {"index": {}}}, "stream name 'index' is reserved; fix: rename the stream"),
        ({"segments": {}}, "unknown key 'segments'; did you mean 'segment'?"),
        ({"video": 3}, "key 'video' is 3; expected keys below it: codec, fit, "),
        ({"video": {"rate": 3}}, "unknown key 'video.rate'; did you mean 'rate_hz'?"),
        ({"video": {"file": "a.mp4"}}, "unknown key 'video.file'; "),
        ({"video": {"rate_hz": -1}}, "key 'video.rate_hz' is -1; input should be greater than 0"),
        ({"video": {"size": 100}}, "video.size: 100 pixels are not a multiple of 16"),
        ({"audio": {"dmel": {"levels": 256}}}, "'audio.dmel.levels' is 256; input should be less"),
        (
            {"audio": {"dmel": {"rate_hz": 33}}},
            "audio: dmel.rate_hz 33 does not divide the audio's",
        ),
        (
            {"sensor": {"resample": "cubic"}},
            "'sensor.resample' is 'cubic'; fix: use one of by_type",
        ),
        ({"text": {"vocab_size": 2}}, "key 'text.vocab_size' is 2; input should be greater than"),
        (
            {"segment": {"duration_s": 0.3}},
            "streams.vision_left: rate_hz 5 x segment.duration_s 0.3 is 1.5, not a whole number",
        ),
        (
            {"segment": {"duration_s": 150}, "streams": {"a": WIDE}},
            "streams.a: a segment of 150 s has 1.14 GiB, more than 1 GiB; fix: lower segment.dur",
        ),
        (
            {"segment": {"duration_s": 12}, "streams": {"a": LARGE}},
            "streams.a: a segment of 12 s has 1.05 GiB, more than 1 GiB; fix: lower segment.durat",
        ),
        (
            {"streams": {"a": {"kind": "sensor", "key": "k", "values": VALUES, "rate_hz": 0.25}}},
            "streams.a: rate_hz 0.25 x segment.duration_s 2 is 0.5, not a whole number of samples",
        ),
        (
            {
                "streams": {"a": {"kind": "audio", "file": "a.wav", "dmel": {"rate_hz": 25}}},
                "segment": {"duration_s": 0.5},
            },
            "streams.a: dmel.rate_hz 25 x segment.duration_s 0.5 is 12.5, not a whole number",
        ),
    ],
)
def test_an_impossible_recipe_gets_one_line_with_its_key(values, message):
    assert message in complaint(values)


@pytest.mark.parametrize(
    ("stream", "keys"),
    [
        (
            {"kind": "video", "file": "a.mp4"},
            "file a.mp4; fix: remove one of them, or change its file",
        ),
        ({"kind": "audio", "file": "a.mp4", "track": 1}, "or change its file or track"),
        (
            {"kind": "sensor", "key": "k", "values": VALUES},
            "file metadata.jsonl, key k; fix: remove",
        ),
        (
            {"kind": "text", "stream": "said"},
            "file text.jsonl, stream said; fix: remove one of them",
        ),
    ],
)
def test_two_streams_of_one_source_in_a_file_are_refused(tmp_path, stream, keys):
    message = file_complaint(tmp_path, {"a": stream, "b": {**stream, "required": True}})
    assert message.startswith("streams.b has the same source as streams.a: ")
    assert keys in message


@pytest.mark.parametrize("file", ["metadata.jsonl", "hands.csv"])
def test_names_do_not_make_two_sources_of_one_key(tmp_path, file):
    named = [{"count": 2, "type": "scalar", "names": ["x", "y"]}]
    both = {
        name: {"kind": "sensor", "file": file, "key": "k", "values": values}
        for name, values in (("a", VALUES), ("b", named))
    }
    assert f"file {file}, key k" in file_complaint(tmp_path, both)


def test_streams_may_share_a_file_with_other_keys_and_tracks():
    declared = {
        "eye": {"kind": "video", "file": "a.mp4"},
        "ear": {"kind": "audio", "file": "a.mp4"},
        "other_ear": {"kind": "audio", "file": "a.mp4", "track": 1},
        "hand": {"kind": "sensor", "file": "a.jsonl", "key": "k", "values": VALUES},
        "foot": {"kind": "sensor", "file": "a.jsonl", "key": "l", "values": VALUES},
        "said": {"kind": "text", "file": "a.jsonl", "stream": "k"},
        "left": {"kind": "sensor", "file": "a.csv",
                 "values": [{"count": 1, "type": "scalar", "names": ["x"]}]},
        "right": {"kind": "sensor", "file": "a.csv",
                  "values": [{"count": 1, "type": "scalar", "names": ["y"]}]},
    }  # fmt: skip
    assert len(make_section(Recipe, {"streams": declared}).streams) == 8


def test_segments_of_up_to_1_gib_are_accepted():
    for stream, below_s in ((WIDE, 131), (LARGE, 11), ({**LARGE, "codec": "h264"}, 600)):
        make_section(Recipe, {"segment": {"duration_s": below_s}, "streams": {"a": stream}})


def test_faults_of_several_streams_get_a_line_each():
    declared = {"a": {"kind": "video"}, "b": {"kind": "sensor", "key": "k"}, "c": {"kind": "x"}}
    with pytest.raises(ConfigError) as caught:
        make_section(Recipe, {"streams": declared, "shard": {"target_bytes": 1}}, origin="r.yaml")
    keys = [line.split("'")[1] for line in str(caught.value).splitlines()]
    assert keys == ["streams.a.file", "streams.b.values", "streams.c.kind", "shard.target_bytes"]


def test_a_fault_of_a_stream_names_the_override_that_set_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("streams: {a: {kind: video, file: a.mp4}}\n")
    with pytest.raises(
        ConfigError, match=r"^command line: streams\.a\.rate_hz=-1: key 'streams\.a"
    ):
        load_section(Recipe, path, ["streams.a.rate_hz=-1"])


# --- keys that moved -------------------------------------------------------------------------


def nested(key: str) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {section: {name: 3} if name else {}}


@pytest.mark.parametrize("key", MOVED_KEYS)
def test_a_key_that_moved_says_what_to_write_now(key):
    assert (
        complaint(nested(key)) == f"{key} is not a key of recipes any more; fix: {MOVED_KEYS[key]}"
    )


def test_every_key_of_an_old_recipe_that_moved_gets_a_line():
    old = {
        "required": ["vision_left"],
        "window": {"duration_s": 4.0, "stride_s": None, "min_coverage": 0.5},
        "vision": {"rate_hz": 5.0, "size": 224},
        "audio": {"rate_hz": 16000},
        "mel": {"rate_hz": 50},
        "sensors": {"rate_hz": 30.0, "max_gap_s": 0.1, "touch_size": 5, "proprio_size": 20},
        "text": {"vocab_size": 1024},
        "split": {"val_fraction": 0.1},
    }
    with pytest.raises(ConfigError) as caught:
        make_section(Recipe, old, origin="old.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("old.yaml: ") and "; fix: " in line for line in lines)
    assert {line.split()[1] for line in lines} == set(MOVED_KEYS) - {"window", "sensors"}


# --- the default and derived recipes ---------------------------------------------------------


def test_a_recipe_without_streams_has_the_default_seven():
    recipe = Recipe()
    assert list(recipe.streams) == sorted(DEFAULT_STREAMS)
    assert make_section(Recipe, {"streams": DEFAULT_STREAMS}) == recipe
    assert make_section(Recipe, {"streams": None}) == recipe
    assert recipe.required == ("audio", "proprio", "vision_left")
    assert recipe.of_kind(Kind.SENSOR) == ("proprio", "touch")
    assert recipe.of_kind(Kind.AUDIO, Kind.TEXT) == ("audio", "external_text", "internal_text")
    assert (recipe.segment_s, recipe.count(30)) == (2.0, 60)


def test_the_default_recipe_file_writes_out_every_default():
    assert load_recipe("configs/recipe.yaml") == Recipe()
    written = read_yaml("configs/recipe.yaml")
    defaults = Recipe().as_json()
    for section in set(defaults) - {"streams"}:
        assert set(written[section]) == set(defaults[section]), section
    assert set(written["audio"]["dmel"]) == set(defaults["audio"]["dmel"])
    assert written["streams"] == DEFAULT_STREAMS


@pytest.mark.parametrize("name", ["demo_recipe.yaml", "any_session.yaml"])
def test_the_other_recipe_files_are_recipes_of_the_default_streams(name):
    assert list(load_recipe(f"configs/{name}").streams) == sorted(DEFAULT_STREAMS)


def test_any_session_requires_no_stream():
    recipe = load_recipe("configs/any_session.yaml")
    default = Recipe().as_json()["streams"]
    for stream in default.values():
        stream["required"] = False
    assert recipe.as_json()["streams"] == default


@given(values=RECIPES, duration_s=st.sampled_from([0.3, 2.0, 4.0]))
def test_another_segment_changes_nothing_else(values, duration_s):
    recipe = make_section(Recipe, values)
    streams = [s.as_json() for s in recipe.streams.values()]
    rated = [*streams, *(s["dmel"] for s in streams if "dmel" in s)]
    counts = [s["rate_hz"] * duration_s for s in rated if "rate_hz" in s]
    if all(abs(count - round(count)) < 1e-9 and round(count) for count in counts):
        other = recipe.with_segment(duration_s)
        assert other.segment_s == duration_s
        assert other.model_copy(update={"segment": recipe.segment}) == recipe
    else:
        with pytest.raises(
            ConfigError, match=r"^recipe: streams\..* not a whole number of samples"
        ):
            recipe.with_segment(duration_s)


@pytest.mark.parametrize("name", ["ann", "bob", "cat", "session_7", "ünï"])
def test_the_split_is_the_documented_hash_of_the_name(name):
    recipe = make_section(Recipe, {"split": {"val_fraction": 0.25, "salt": "salt2"}})
    digest = hashlib.sha256(f"salt2/{name}".encode()).digest()
    is_val = int.from_bytes(digest[:8], "big") < 0.25 * 2**64
    assert assign_split(name, recipe) == ("val" if is_val else "train")


@pytest.mark.parametrize(("fraction", "num_val"), [(0.0, 0), (0.5, 45)])
def test_about_the_asked_share_of_sessions_is_held_out(fraction, num_val):
    recipe = make_section(Recipe, {"split": {"val_fraction": fraction}})
    splits = [assign_split(f"session_{i}", recipe) for i in range(100)]
    assert splits.count("val") == pytest.approx(num_val, abs=10)
