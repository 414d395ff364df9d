"""Configuration: frozen, validated objects from YAML files that people write by hand.

defaults < file < ``key=value``. Leading tabs are accepted, an unknown key names the nearest known
one, and every complaint is one line that says which file, which key and how to mend it.
"""

from __future__ import annotations

import difflib
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
    """Base of every part of a configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


def parse_yaml(text: str, *, origin: str) -> dict[str, Any]:
    """Parse YAML whose lines may begin with tabs into a mapping (empty text gives an empty one).

    Raises:
        ConfigError: not YAML, or not a mapping at the top.
    """
    spaced = re.sub(r"(?m)^[ \t]+", lambda m: m.group().replace("\t", " " * TAB_WIDTH), text)
    try:
        values = yaml.safe_load(spaced)
    except _YAML_FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(
            f"{origin}{line}: not valid YAML: {problem}; check the indentation there"
        ) from error
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
    return make_section(kind, apply_overrides(read_yaml(path), overrides), origin=str(path))


def make_section(
    kind: type[SectionT], values: Mapping[str, Any], *, origin: str = "configuration"
) -> SectionT:
    """Validate plain values into a section.

    Raises:
        ConfigError: all complaints, one per line.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        complaints = [_complaint(kind, detail) for detail in error.errors()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in complaints)) from error


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
            node[last] = yaml.safe_load(text)
        except _YAML_FAULTS as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML") from error
    return merged


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
        case _:
            expected = str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]
            return f"key {key!r} is {detail['input']!r}; {expected}"


def _keys_at(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Known keys of the section at a path below `kind`."""
    section: type[BaseModel] = kind
    for part in (p for p in location if not p.isdecimal()):  # a number is a place in a list
        field = section.model_fields.get(part)
        found = [] if field is None else _sections_in(field.annotation)
        if not found:
            return []
        section = found[0]
    return sorted(section.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 (a type, or a union)
    """Sections that a field may hold, however deep in lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _nearest_file(path: Path) -> str:
    """A hint at a file beside the missing one whose name is near."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in {".yaml", ".yml"}]
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; configs/ holds examples"
