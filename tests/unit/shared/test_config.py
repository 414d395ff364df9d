"""Configuration files that people write by hand."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from shared.config import Section, apply_overrides, load_section, make_section, parse_yaml
from shared.errors import ConfigError
from shared.recipe import Recipe

CONFIGS = Path(__file__).parents[3] / "configs"


class Inner(Section):
    rate_hz: float = Field(5.0, gt=0)
    codec: str = "mjpeg"


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Outer(Section):
    name: str
    vision: Inner = Inner()
    sizes: tuple[int, ...] = ()
    colors: tuple[Color, ...] | None = Field(None, min_length=1)
    kind: Literal["a", "b"] = "a"


def complaint(values: dict, kind: type[Section] = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        make_section(kind, values, origin="my.yaml")
    return str(caught.value)


def test_leading_tabs_are_four_spaces():
    text = "a:\n\tb: 1\n\tc:\n\t\td: 'x\ty'\n"
    assert parse_yaml(text, origin="f") == yaml.safe_load("a:\n  b: 1\n  c:\n    d: 'x\ty'\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_any_yaml_reader_reads_the_files_of_the_project(path):
    text = path.read_text()
    assert parse_yaml(text, origin="f") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\n\t\n"])
def test_an_empty_file_is_all_defaults(text):
    assert parse_yaml(text, origin="f") == {}


@pytest.mark.parametrize("text", ["- 1\n", "just words", "3"])
def test_yaml_that_is_not_a_mapping_is_refused(text):
    with pytest.raises(ConfigError, match=r"^f: expected `key: value` lines"):
        parse_yaml(text, origin="f")


def test_broken_yaml_names_file_and_line():
    with pytest.raises(ConfigError, match=r"^f line 3: not valid YAML"):
        parse_yaml("a: 1\nb: 2\nc: {x: ]}\n", origin="f")


def test_no_yaml_tag_runs_code():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.system ['true']\n", origin="f")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb:\n  x: 1\na: 2\n", "f line 4: .*key 'a' is already in line 1"),
        ("b:\n  x: 1\n  y: 2\n  x: 3\n", "f line 4: .*key 'x' is already in line 2"),
        ("- {x: 1, x: 2}\n", "f line 1: .*key 'x' is already in line 1"),
    ],
)
def test_a_duplicate_key_is_refused_with_both_lines(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, origin="f")


def test_keys_of_a_yaml_merge_can_be_overridden():
    text = "base: &base {x: 1, y: 2}\nmore: &more {<<: *base, x: 3}\nmost: {<<: *more, y: 4}\n"
    assert parse_yaml(text, origin="f") == yaml.safe_load(text)


def test_an_override_with_a_key_twice_is_refused():
    with pytest.raises(ConfigError, match="not valid YAML"):
        apply_overrides({}, ["vision={codec: raw, codec: h264}"])


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite(number):
    values = parse_yaml(f"name: x\nvision: {{rate_hz: {number}}}", origin="f")
    assert "'vision.rate_hz'" in complaint(values)
    assert "finite number" in complaint(values)


def test_an_unknown_key_names_the_nearest_known_one():
    message = complaint({"name": "x", "vision": {"rate_hzz": 3}})
    assert message == "my.yaml: unknown key 'vision.rate_hzz'; did you mean 'rate_hz'?"


def test_an_unknown_key_without_a_near_one_lists_all():
    message = complaint({"name": "x", "vision": {"qqqqqq": 3}})
    assert message == "my.yaml: unknown key 'vision.qqqqqq'; known keys here: codec, rate_hz"


def test_a_missing_key_and_a_wrong_value_get_a_line_each():
    lines = complaint({"vision": {"rate_hz": -1}, "sizes": [1, "x"]}).splitlines()
    assert lines[0] == "my.yaml: key 'name' is missing; fix: add it"
    assert lines[1].startswith("my.yaml: key 'vision.rate_hz' is -1; input should be greater")
    assert lines[2].startswith("my.yaml: key 'sizes.1' is 'x'; input should be a valid integer")


def test_a_value_where_a_section_belongs_names_the_keys_below():
    message = complaint({"name": "x", "vision": 3})
    assert message == "my.yaml: key 'vision' is 3; expected keys below it: codec, rate_hz"


def test_a_word_where_a_list_belongs_shows_how_a_list_is_written():
    message = complaint({"name": "x", "colors": "red"})
    assert message == "my.yaml: key 'colors' is 'red'; expected a list, such as [red, blue]"


def test_a_list_whose_items_are_wrong_is_not_called_empty_too():
    (line,) = complaint({"name": "x", "colors": ["redd"]}).splitlines()
    assert "'colors.0' is 'redd'" in line
    (line,) = complaint({"name": "x", "colors": []}).splitlines()
    assert "'colors' is []" in line


def test_errors_name_the_override_that_caused_them_or_else_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("name: 3\nvision: {codec: raw}\n")
    overrides = ["vision.rate_hz=-1", "kind=c", "colors=[redd]", "vision.codec=x"]
    with pytest.raises(ConfigError) as caught:
        load_section(Outer, path, overrides)
    origins = [line.partition(": key")[0] for line in str(caught.value).splitlines()]
    assert origins == [str(path), *(f"command line: {overrides[i]}" for i in (0, 2, 1))]


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Inner().codec = "raw"


def test_overrides_replace_values_of_the_file_in_a_copy():
    values = {"name": "x", "vision": {"rate_hz": 5}}
    merged = apply_overrides(values, ["vision.rate_hz=7", "vision.codec=raw", "sizes=[1, 2]"])
    expected = {"name": "x", "vision": {"rate_hz": 7, "codec": "raw"}, "sizes": [1, 2]}
    assert merged == expected
    assert values == {"name": "x", "vision": {"rate_hz": 5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("novalue", "expected key=value"),
        ("=3", "expected key=value"),
        ("name.deeper=3", "name is 'x' and has no keys below it"),
        ("name=[1", "not valid YAML"),
    ],
)
def test_an_impossible_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"name": "x"}, [override])


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*recipe\.yaml"):
        load_section(Recipe, tmp_path / "recipes.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: 1\n" * 300_000])
def test_a_binary_or_far_too_large_file_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_section(Recipe, path)
