"""The columns of a set: what they depend on, and the limits and schema of their members."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.oracles import tiny_recipe

from shared.kinds.audio import encode_wav
from shared.kinds.video import encode_pictures
from shared.recipe import Recipe
from shared.shardset.layout import (
    column_basis,
    columns_of,
    field_schema,
    max_run_segments,
    training_columns,
)

DEFAULT_COLUMNS = {
    "audio",
    "audio.dmel",
    "external_text",
    "internal_text",
    "proprio",
    "touch",
    "vision_left",
    "vision_right",
}


def test_every_stream_has_a_column_and_audio_a_second_one_for_tokens():
    assert set(columns_of(Recipe())) == DEFAULT_COLUMNS
    assert list(columns_of(Recipe())) == sorted(DEFAULT_COLUMNS)


def test_training_reads_one_column_of_each_stream():
    recipe = Recipe()
    columns = training_columns(recipe)
    assert set(columns) == set(recipe.streams)
    assert columns["audio"].name == "audio.dmel"
    assert all(columns[s].name == s for s in recipe.streams if s != "audio")


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"segment": {"duration_s": 4.0}}, DEFAULT_COLUMNS),
        ({"video": {"quality": 50}}, {"vision_left", "vision_right"}),
        ({"audio": {"dmel": {"channels": 16}}}, {"audio.dmel"}),
        ({"audio": {"peak_dbfs": -3.0}}, {"audio", "audio.dmel"}),
        ({"sensor": {"max_gap_s": 0.5}}, {"proprio", "touch"}),
        ({"video": {"codec": "mjpeg", "qp": 30}}, set()),  # only h264 has a quantizer
        ({"shard": {"target_bytes": 2**20}, "split": {"salt": "x"}}, set()),
        ({"segment": {"min_coverage": 0.1}}, set()),
        ({"text": {"tokens_per_s": 5.0}}, {"internal_text", "external_text"}),
    ],
)
def test_a_changed_key_changes_the_basis_of_the_columns_that_depend_on_it(change, columns):
    def bases(recipe: Recipe) -> dict[str, object]:
        return {
            name: column_basis(column, recipe, tokenizer_sha256="0")
            for name, column in columns_of(recipe).items()
        }

    start = {"video": {"codec": "mjpeg"}}
    merged = {**start, **change, "video": {**start["video"], **change.get("video", {})}}
    before, after = bases(Recipe.model_validate(start)), bases(Recipe.model_validate(merged))
    assert {name for name in before if before[name] != after[name]} == columns


def test_what_validation_expects_and_what_is_required_change_no_basis():
    spec = {"kind": "sensor", "key": "x", "values": [{"count": 1, "type": "scalar"}]}
    strict = {**spec, "required": True, "expect": {"min_rate_hz": 5, "range": [0, 1]}}
    before, after = (
        column_basis(columns_of(recipe)["x"], recipe, tokenizer_sha256="0")
        for recipe in (tiny_recipe(streams={"x": s}) for s in (spec, strict))
    )
    assert before == after


def test_the_time_of_a_text_changes_its_basis_only():
    streams = {name: spec.as_json() for name, spec in Recipe().streams.items()}
    changed = {**streams, "external_text": {**streams["external_text"], "time_unit": "ms"}}
    before, after = (
        {
            name: column_basis(column, recipe, tokenizer_sha256="0")
            for name, column in columns_of(recipe).items()
        }
        for recipe in (Recipe(), Recipe.model_validate({"streams": changed}))
    )
    assert {name for name in before if before[name] != after[name]} == {"external_text"}


def test_another_tokenizer_changes_only_the_basis_of_text():
    recipe = Recipe()
    changed = {
        name
        for name, column in columns_of(recipe).items()
        if column_basis(column, recipe, tokenizer_sha256="0")
        != column_basis(column, recipe, tokenizer_sha256="1")
    }
    assert changed == {"internal_text", "external_text"}


@pytest.mark.parametrize("codec", ["h264", "mjpeg", "yuv420", "raw"])
def test_noise_stays_within_the_limits_of_members(codec):
    recipe = tiny_recipe(video={"codec": codec, "quality": 100, "qp": 1, "size": [32, 48]})
    spec, columns = recipe.streams["vision_left"], columns_of(recipe)
    shape = (recipe.count(spec.rate_hz), 32, 48, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    samples = np.zeros(columns["audio"].shape, np.int16)
    limit = columns["vision_left"].max_bytes
    assert len(encode_pictures(pictures, spec=spec)) <= limit
    audio = recipe.streams["audio"]
    assert len(encode_wav(samples, rate_hz=audio.rate_hz)) == columns["audio"].max_bytes


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("audio", "a/000004.audio.wav"),
        ("internal_text", "a/000004.internal_text.json"),
        ("vision_left", "a/000004.vision_left.h264"),
    ],
)
def test_member_names_end_in_column_and_extension(column, name):
    assert columns_of(Recipe())[column].member_name("a/000004") == name


def test_the_schema_has_the_shapes_of_one_segment():
    schema = field_schema(Recipe())
    assert schema["vision_left"]["shape"] == [10, 224, 224, 3]
    assert schema["audio"]["shape"] == [32_000]
    assert schema["touch"]["shape"] == [60, 5]
    assert schema["audio.dmel"]["shape"] == [100, 80]
    assert schema["touch"]["unit"] == "0..1"
    assert schema["proprio"]["unit"] == "rad, rad/s"
    assert set(schema) == DEFAULT_COLUMNS


def test_a_session_is_cut_where_it_fills_a_shard_and_at_4096_segments():
    assert max_run_segments(tiny_recipe(shard={"target_bytes": 2**16})) >= 1
    assert max_run_segments(tiny_recipe(shard={"target_bytes": 2**40})) == 4096
    small, large = (
        max_run_segments(tiny_recipe(shard={"target_bytes": n})) for n in (2**22, 2**24)
    )
    assert small < large
