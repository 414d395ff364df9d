"""Names of the walkthrough that must keep their meaning, whatever streams a recipe declares."""

from __future__ import annotations

from typing import Final

DEFAULT_HEADS: Final = ("internal_text", "external_text", "audio", "animation")
"""Heads that are trained with weight 1 where the recipe declares their streams."""

STREAM_OF_HEAD: Final = {"animation": "proprio"}
"""Heads that have another name than the stream that they predict."""

LOSS_RANGES: Final = {
    "internal_text": (2.0, 3.0, "Check text tokenization"),
    "audio": (1.5, 2.5, "Check audio normalization"),
}
"""Largest good loss of a head, the loss above which a warning follows, and the advice."""

HEAD_OF_STREAM: Final = {stream: head for head, stream in STREAM_OF_HEAD.items()}
