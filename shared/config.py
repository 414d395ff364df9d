"""Load configuration: frozen, validated objects from hand-written YAML files.

Precedence: defaults < file < ``key=value``. Leading tabs are accepted. Every error is one line that
names the file, the key and the fix; for an unknown key it suggests the nearest known one.
"""

from __future__ import annotations

import difflib
import enum
import re
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

TAB_WIDTH = 4
"""Number of spaces that replace a leading tab."""

MAX_CONFIG_BYTES = 1 << 20
"""A larger file is not a configuration."""

_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""Errors of parsing; ValueError for dates such as 2001-99-99, the last for deep nesting."""


class Section(BaseModel):
    """Base of every section of a configuration: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, for manifests and fingerprints."""
        return self.model_dump(mode="json")


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses duplicate keys; PyYAML silently keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 (stubs err)
        """Read one mapping as it is written, before anchors are merged into it.

        Raises:
            yaml.MarkedYAMLError: a key occurs twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is already in line {lines[key.value]}",
                    problem_mark=key.start_mark,
                    note="fix: keep one of the two; otherwise only the last would count",
                )
            lines[key.value] = key.start_mark.line + 1
        return node


def parse_yaml(text: str, *, origin: str) -> dict[str, Any]:
    """Parse YAML into a mapping; lines may begin with tabs, and empty text gives an empty mapping.

    Raises:
        ConfigError: it is not YAML, or not a mapping at the top.
    """
    spaced = re.sub(r"(?m)^[ \t]+", lambda m: m.group().replace("\t", " " * TAB_WIDTH), text)
    try:
        values = _load(spaced)
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        fix = getattr(error, "note", None) or "fix: check the indentation there"
        raise ConfigError(f"{origin}{line}: not valid YAML: {problem}; {fix}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file with :func:`parse_yaml`.

    Raises:
        ConfigError: the file is missing, too large, not text or not YAML.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: larger than {MAX_CONFIG_BYTES} bytes; fix: give a configuration file"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as text: {error}") from error
    return parse_yaml(text, origin=str(path))


def load_section(kind: type[SectionT], path: Path | str, overrides: Sequence[str] = ()) -> SectionT:
    """Read a file into a section, with ``key.sub=value`` overrides on top.

    Raises:
        ConfigError: the file or an override can't be used.
    """
    values = apply_overrides(read_yaml(path), overrides)
    return make_section(kind, values, origin=str(path), overrides=overrides)


def make_section(
    kind: type[SectionT],
    values: Mapping[str, Any],
    *,
    origin: str = "configuration",
    overrides: Sequence[str] = (),
) -> SectionT:
    """Validate plain values into a section.

    Messages name `origin`, the file that the values come from, or the override that set the value,
    of those that :func:`apply_overrides` has applied.

    Raises:
        ConfigError: all errors, one per line.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for detail in _root_errors(error.errors()):
            source = _origin_of(_follow(kind, detail["loc"])[0], origin, overrides)
            lines += [f"{source}: {line}" for line in _describe(kind, detail).splitlines()]
        raise ConfigError("\n".join(lines)) from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key.sub=value`` strings to nested values; each value is parsed as YAML.

    Raises:
        ConfigError: an override has no ``=``, or its key is below a value that has no keys.
    """
    merged = dict(values)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"{override!r}: expected key=value, such as training.max_steps=200")
        node = merged
        *parents, last = dotted.split(".")
        for key in parents:
            child = node.get(key)
            if child is not None and not isinstance(child, dict):
                raise ConfigError(f"{override!r}: {key} is {child!r} and has no keys below it")
            node[key] = dict(child or {})
            node = node[key]
        try:
            node[last] = _load(text)
        except _YAML_ERRORS as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML") from error
    return merged


def _load(text: str) -> Any:  # noqa: ANN401 (any YAML)
    """Parse YAML text into plain values."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _root_errors(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Drop errors that only follow from others: a list with refused items also counts as empty."""
    locations = [detail["loc"] for detail in details]
    return [
        detail
        for detail, location in zip(details, locations, strict=True)
        if detail["type"] != "too_short"
        or not any(len(x) > len(location) and x[: len(location)] == location for x in locations)
    ]


def _origin_of(path: Sequence[str], origin: str, overrides: Sequence[str]) -> str:
    """Name the source of a value: the override that set it, or the file.

    If an error concerns a whole section, name the file and the overrides inside that section.
    """
    inside = []
    for override in reversed(overrides):  # the last one wins
        keys = override.partition("=")[0].split(".")
        if keys == list(path[: len(keys)]):
            return f"command line: {override}"
        if keys[: len(path)] == list(path):
            inside.append(override)
    return f"{origin} with {' '.join(reversed(inside))}" if inside else origin


def _describe(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """Describe one pydantic error: key, what is wrong, fix; a value error may have more lines."""
    location, options = _follow(kind, detail["loc"])
    key, value = ".".join(location), detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(_follow(kind, detail["loc"][:-1])[1])
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            return f"unknown key {key!r}; {fix}"
        case "missing":
            return f"key {key!r} is missing; fix: add it"
        case "union_tag_not_found" | "union_tag_invalid":
            tag = detail["ctx"]["discriminator"].strip("'")
            problem = f"is {value[tag]!r}" if tag in value else "is missing"
            tags = [tag for option in options if _is_section(option) for tag in _tags(option)]
            return f"key {f'{key}.{tag}'!r} {problem}; fix: use one of {', '.join(tags)}"
        case "enum" | "literal_error":
            choices = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
            return f"key {key!r} is {value!r}; fix: use one of {choices}"
        case "value_error":
            return f"{key + ': ' if key else ''}{str(detail['msg']).removeprefix('Value error, ')}"
        case "model_type" | "model_attributes_type":
            known = _known_keys(options)
            return f"key {key!r} is {value!r}; expected keys below it: {', '.join(known)}"
        case "tuple_type":
            items = [item for option in options for item in _below(option, "0")]
            enums = [t for t in items if isinstance(t, type) and issubclass(t, enum.StrEnum)]
            words = [str(member) for members in enums for member in members][:2]
            example = f", such as [{', '.join(words)}]" if words else " in square brackets"
            return f"key {key!r} is {value!r}; expected a list{example}"
        case _:
            expected = str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]
            return f"key {key!r} is {value!r}; {expected}"


def _follow(kind: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[Any]]:
    """Follow the location of an error below `kind`.

    Returns:
        The location as the file has it, without the tags that pydantic adds for members of a union;
        and the annotations that the value there may have.
    """
    keys: list[str] = []
    options: list[Any] = [kind]
    for key in map(str, location):
        sections = [option for option in options if _is_section(option)]
        tagged = [section for section in sections if key in _tags(section)]
        if len(sections) > 1 and tagged:
            options = tagged
        else:
            keys.append(key)
            options = [below for option in options for below in _below(option, key)]
    return keys, options


def _is_section(option: Any) -> bool:  # noqa: ANN401 (any annotation)
    return isinstance(option, type) and issubclass(option, BaseModel)


def _tags(section: type[BaseModel]) -> list[str]:
    """List the values that tell a section from the others of a union."""
    annotations = (field.annotation for field in section.model_fields.values())
    literals = [get_args(a) for a in annotations if get_origin(a) is Literal]
    return [str(values[0]) for values in literals if len(values) == 1]


def _known_keys(options: Sequence[Any]) -> list[str]:
    """List the keys that all sections among some annotations have."""
    keys = [set(option.model_fields) for option in options if _is_section(option)]
    return sorted(set.intersection(*keys)) if keys else []


def _below(option: Any, key: str) -> list[Any]:  # noqa: ANN401 (any annotation)
    """List the annotations that the value of a key may have: of a section, mapping or list."""
    if _is_section(option):
        field = option.model_fields.get(key)
        return [] if field is None else _members(field.annotation)
    items = [argument for argument in get_args(option) if argument is not Ellipsis]
    if get_origin(option) is dict:
        del items[0]
    return [member for item in items for member in _members(item)]


def _members(annotation: Any) -> list[Any]:  # noqa: ANN401 (any annotation)
    """List the members of a union; of another annotation, itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _nearest_file(path: Path) -> str:
    """Suggest a file with a similar name in the same folder."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in {".yaml", ".yml"}]
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; configs/ has examples"
