"""The frozen set of format 1 and what it is made of; see tests/frozen/README.md."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from shared.recipe import load_recipe
from shared.shardset.layout import COLUMNS, column_basis

FROZEN = Path(__file__).parents[1] / "frozen"
SESSIONS, OLD = FROZEN / "sessions", FROZEN / "v1"
RECIPE = load_recipe(FROZEN / "recipe.yaml")


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Version and header of an index, by struct and json."""
    content = path.read_bytes()
    magic, number, length = struct.unpack_from("<8sII", content)
    assert magic == b"VRCINDEX"
    return number, json.loads(content[16 : 16 + length])


BUMPED = {
    name
    for name, column in header_of(OLD / "train-000000.index")[1]["columns"].items()
    if column["basis"]["code_version"]
    != column_basis(COLUMNS[name], RECIPE, tokenizer_sha256="")["code_version"]
}
"""Columns that code of today makes with other bytes; an upgrade makes them again."""


def columns_of(out: Path) -> set[str]:
    """Column files that an old set keeps when it is upgraded."""
    gone = tuple(f".{name}.{COLUMNS[name].suffix}" for name in BUMPED)
    return {
        p.name
        for p in out.iterdir()
        if p.name.endswith((".tar", ".zip")) and not (gone and p.name.endswith(gone))
    }
