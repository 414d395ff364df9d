"""Configuration: frozen, validated objects from YAML files that people write by hand.

defaults < file < ``key=value``. Leading tabs are accepted, an unknown key names the nearest known
one, and every complaint is one line that says which file, which key and how to mend it.
"""

from __future__ import annotations

import difflib
import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

TAB_WIDTH = 4
"""Spaces that a leading tab stands for."""

MAX_CONFIG_BYTES = 1 << 20
"""A larger file is no configuration."""

_YAML_FAULTS = (yaml.YAMLError, ValueError, RecursionError)
"""What parsing raises; ValueError for dates such as 2001-99-99, the last for deep nesting."""


class Section(BaseModel):
    """Base of every part of a configuration: frozen, closed to unknown keys, numbers finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, for manifests and fingerprints."""
        return self.model_dump(mode="json")


T = TypeVar("T")
SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice, of which PyYAML silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 (stubs err)
        """Read one mapping, as it is written: before anchors are merged into it.

        Raises:
            yaml.MarkedYAMLError: two of its keys are the same.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} stands in line {lines[key.value]} already",
                    problem_mark=key.start_mark,
                    note="make one of the two, else only the last would count",
                )
            lines[key.value] = key.start_mark.line + 1
        return node


def parse_yaml(text: str, *, origin: str) -> dict[str, Any]:
    """Parse YAML whose lines may begin with tabs into a mapping (empty text gives an empty one).

    Raises:
        ConfigError: not YAML, or not a mapping at the top.
    """
    spaced = re.sub(r"(?m)^[ \t]+", lambda m: m.group().replace("\t", " " * TAB_WIDTH), text)
    try:
        values = _load(spaced)
    except _YAML_FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        mend = getattr(error, "note", None) or "check the indentation there"
        raise ConfigError(f"{origin}{line}: not valid YAML: {problem}; {mend}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file as :func:`parse_yaml` does.

    Raises:
        ConfigError: the file is missing, too large, not text or not YAML.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is no configuration file"
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

    Args:
        kind: the section.
        values: of its keys.
        origin: where they come from, for messages.
        overrides: what of them :func:`apply_overrides` laid over it, to be named instead.

    Raises:
        ConfigError: all complaints, one per line.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = [
            f"{_blamed(origin, detail['loc'], overrides)}: {_complaint(kind, detail)}"
            for detail in _causes(error.errors())
        ]
        raise ConfigError("\n".join(lines)) from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay ``key.sub=value`` strings over nested values; each value is parsed as YAML.

    Raises:
        ConfigError: an override without ``=``, or one that reaches into a value that has no keys.
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
        except _YAML_FAULTS as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML") from error
    return merged


def _load(text: str) -> Any:  # noqa: ANN401 (any YAML)
    """Plain values of a YAML text."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _causes(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Errors without those that only follow: a list whose items are refused counts as empty."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail, place in zip(details, places, strict=True)
        if detail["type"] != "too_short"
        or not any(len(p) > len(place) and p[: len(place)] == place for p in places)
    ]


def _blamed(origin: str, location: Sequence[str | int], overrides: Sequence[str]) -> str:
    """Whose the value at a location is: an override's, or the file's; of a section whose keys are
    at odds, the file's with the overrides in it.
    """
    place = [str(part) for part in location]
    within = []
    for override in reversed(overrides):  # the last one counts
        keys = override.partition("=")[0].split(".")
        if keys == place[: len(keys)]:
            return f"command line: {override}"
        if keys[: len(place)] == place:
            within.append(override)
    return f"{origin} with {' '.join(reversed(within))}" if within else origin


def _complaint(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """One line for one pydantic error: key, what is wrong, mend."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    match detail["type"]:
        case "extra_forbidden":
            known = _keys_at(kind, location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            return f"unknown key {key!r}; {mend}"
        case "missing":
            return f"key {key!r} is missing; add it"
        case "value_error":
            return f"{key + ': ' if key else ''}{str(detail['msg']).removeprefix('Value error, ')}"
        case "model_type" | "model_attributes_type":
            known = _keys_at(kind, location)
            return f"key {key!r} is {detail['input']!r}; expected keys below it: {', '.join(known)}"
        case "tuple_type":
            return f"key {key!r} is {detail['input']!r}; expected a list{_example(kind, location)}"
        case _:
            expected = str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]
            return f"key {key!r} is {detail['input']!r}; {expected}"


def _keys_at(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Known keys of the section at a path below `kind`."""
    section: type[BaseModel] = kind
    for part in (p for p in location if not p.isdecimal()):  # a number is a place in a list
        found = _held(section, part, BaseModel)
        if not found:
            return []
        section = found[0]
    return sorted(section.model_fields)


def _example(kind: type[BaseModel], location: Sequence[str]) -> str:
    """How a list of a field's words is written, where it takes only certain ones."""
    section = kind
    for part in location[:-1]:
        section = next(iter(_held(section, part, BaseModel)), section)
    words = [str(word) for each in _held(section, location[-1], enum.StrEnum) for word in each]
    return f", such as [{', '.join(words[:2])}]" if words else " in square brackets"


def _held(section: type[BaseModel], key: str, base: type[T]) -> list[type[T]]:
    """Classes below `base` that a section's field may hold."""
    field = section.model_fields.get(key)
    return [] if field is None else _classes_in(field.annotation, base)


def _classes_in(annotation: Any, base: type[T]) -> list[type[T]]:  # noqa: ANN401 (any annotation)
    """Classes below `base`, however deep in lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, base):
        return [annotation]
    return [found for part in get_args(annotation) for found in _classes_in(part, base)]


def _nearest_file(path: Path) -> str:
    """A hint at a file beside the missing one whose name is near."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in {".yaml", ".yml"}]
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; configs/ holds examples"
