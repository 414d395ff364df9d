"""The table of columns: what they depend on, and the limits and schema of their members."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.oracles import tiny_recipe
from hypothesis import given
from hypothesis import strategies as st
from shared.shardset.codec import encode_pictures, encode_wav

from shared.recipe import STREAMS, Recipe, Stream
from shared.shardset.index import MEMBER_TABLES
from shared.shardset.layout import (
    COLUMNS,
    column_basis,
    field_schema,
    member_limits,
    member_name,
    presence_bits,
    streams_from_bits,
)


def test_the_tables_of_members_are_those_of_all_columns():
    assert list(MEMBER_TABLES) == list(COLUMNS)
    assert {t for tables in MEMBER_TABLES.values() for t in tables} == set(member_limits(Recipe()))


def test_every_stream_has_a_column():
    assert {stream for column in COLUMNS.values() for stream in column.streams} == set(STREAMS)


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"window": {"duration_s": 2.0}}, set(COLUMNS)),
        ({"vision": {"quality": 50}}, {"vision_left", "vision_right"}),
        ({"mel": {"channels": 16}}, {"dmel"}),
        ({"audio": {"peak_dbfs": -3.0}}, {"audio", "dmel"}),
        ({"sensors": {"max_gap_s": 0.5}}, {"proprio"}),
        ({"vision": {"codec": "mjpeg", "qp": 30}}, set()),  # only h264 has a quantizer
        ({"shard": {"target_bytes": 2**20}, "split": {"salt": "x"}}, set()),
    ],
)
def test_a_changed_key_changes_the_basis_of_the_columns_that_depend_on_it(change, columns):
    def bases(recipe: Recipe) -> dict[str, object]:
        return {n: column_basis(c, recipe, tokenizer_sha256="0") for n, c in COLUMNS.items()}

    start = {"vision": {"codec": "mjpeg"}}
    merged = {**start, **change, "vision": {**start["vision"], **change.get("vision", {})}}
    before, after = bases(Recipe.model_validate(start)), bases(Recipe.model_validate(merged))
    assert {name for name in COLUMNS if before[name] != after[name]} == columns


def test_another_tokenizer_changes_only_the_basis_of_text():
    changed = {
        name
        for name, column in COLUMNS.items()
        if column_basis(column, Recipe(), tokenizer_sha256="0")
        != column_basis(column, Recipe(), tokenizer_sha256="1")
    }
    assert changed == {"text"}


@pytest.mark.parametrize("codec", ["h264", "mjpeg", "yuv420", "raw"])
def test_noise_stays_within_the_limits_of_members(codec):
    recipe = tiny_recipe(vision={"codec": codec, "quality": 100, "qp": 1})
    frames, size = recipe.count(recipe.vision.rate_hz), recipe.vision.size
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (frames, size, size, 3), np.uint8)
    samples = np.zeros(recipe.count(recipe.audio.rate_hz), np.int16)
    limits = member_limits(recipe)
    assert len(encode_pictures(pictures, recipe=recipe.vision)) <= limits["vision_left"]
    assert len(encode_wav(samples, rate_hz=recipe.audio.rate_hz)) == limits["audio"]


@given(streams=st.sets(st.sampled_from(STREAMS)))
def test_presence_bits_come_back_as_the_same_streams(streams):
    assert set(streams_from_bits(presence_bits(streams))) == streams


def test_the_first_stream_is_the_lowest_bit():
    assert presence_bits([Stream.VISION_LEFT]) == 1


@pytest.mark.parametrize(
    ("column", "name"), [("audio", "a/000004.audio.wav"), ("text", "a/000004.text.json")]
)
def test_member_names_end_in_column_and_extension(column, name):
    assert member_name("a/000004", column, Recipe()) == name


def test_the_schema_has_the_shapes_of_one_sample():
    schema = field_schema(Recipe())
    assert schema["vision_left"]["shape"] == [20, 224, 224, 3]
    assert schema["audio"]["shape"] == [64_000]
    assert schema["touch"]["shape"] == [120, 5]
    assert schema["dmel"]["shape"] == [200, 80]
    assert {field["column"] for field in schema.values()} == set(COLUMNS)
