"""The frozen sessions and their recipe; see tests/frozen/README.md."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from shared.recipe import load_recipe

FROZEN = Path(__file__).parents[1] / "frozen"
SESSIONS = FROZEN / "sessions"
RECIPE = load_recipe(FROZEN / "recipe.yaml")


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the version and header of an index, read by struct and json."""
    content = path.read_bytes()
    magic, number, length = struct.unpack_from("<8sII", content)
    assert magic == b"VRCINDEX"
    return number, json.loads(content[16 : 16 + length])
