"""Names of the walkthrough that must keep their meaning, whatever streams a recipe declares."""

from __future__ import annotations

from typing import Final

DEFAULT_HEADS: Final = ("internal_text", "external_text", "audio", "animation")
"""Heads that are trained with weight 1 where the recipe declares their streams."""

STREAM_OF_HEAD: Final = {"animation": "proprio"}
"""Heads that have another name than the stream that they predict."""

HEAD_OF_STREAM: Final = {stream: head for head, stream in STREAM_OF_HEAD.items()}
