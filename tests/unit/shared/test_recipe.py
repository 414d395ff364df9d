"""Recipes: their checks, their JSON, and the split of sessions."""

from __future__ import annotations

import hashlib
import re

import pytest

from shared.config import make_section
from shared.errors import ConfigError
from shared.recipe import Recipe, assign_split


def test_a_recipe_comes_back_from_its_json():
    recipe = Recipe.model_validate({"required": ["audio"], "vision": {"size": 64}})
    assert make_section(Recipe, recipe.as_json()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": {"duration_s": 0.3}}, "vision.rate_hz 5 x window.duration_s 0.3 is 1.5"),
        ({"mel": {"rate_hz": 33}}, "mel.rate_hz 33 does not divide audio.rate_hz 16000"),
        ({"mel": {"floor_db": 40}}, "ceiling_db 30 is not above mel.floor_db 40"),
        ({"mel": {"levels": 256}}, "less than or equal to 255"),  # 255 means masked
        ({"required": ["sight"]}, "'required.0' is 'sight'"),
    ],
)
def test_an_impossible_recipe_is_refused_with_the_reason(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_section(Recipe, values)


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
