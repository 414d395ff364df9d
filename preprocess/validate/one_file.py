"""A single video or sound as the one stream of an imaginary session, so that the checks of sessions
judge it too.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.validate.validate import Report, check_session
from shared.errors import SessionError
from shared.recipe import Stream
from shared.session.folder import AUDIO_FILE, VISION_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe

SOUND_SUFFIXES = frozenset(
    {".wav", ".wave", ".aac", ".aif", ".aiff", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg"}
    | {".opus", ".w64", ".wma"}
)
"""Files that are judged as sound; any other is judged as a video."""

CHECKS_OF_A_FILE = frozenset({"files", "gaps", "starts", "audio", "vision"})
"""The other checks compare streams, or ask for a whole session."""


def require_media(path: Path) -> None:
    """Refuse other parts of a session, which say nothing alone.

    Raises:
        SessionError: it is one.
    """
    if path.suffix in {".json", ".jsonl"}:
        raise SessionError(f"{path}: no video or sound; for a part of a session give its folder")


@contextmanager
def session_of(path: Path) -> Iterator[Path]:
    """The folder to judge: `path` itself, or one that holds a single media file and lasts as long
    as the context.
    """
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="validate-") as root:
        folder = Path(root) / path.name
        folder.mkdir()
        (folder / _name_in_session(path)).symlink_to(path.absolute())
        yield folder


def judge(path: Path, folder: Path, *, recipe: Recipe) -> tuple[Report, SessionProbe | None]:
    """The verdict on a session folder or a single media file, in words that name it.

    Args:
        path: the folder or file.
        folder: what :func:`session_of` gave for it.
        recipe: how it would become fields; of a single file no stream is required.
    """
    if not path.is_file():
        return check_session(folder, recipe=recipe)
    recipe = recipe.model_copy(update={"required": ()})
    report, evidence = check_session(folder, recipe=recipe, only=CHECKS_OF_A_FILE)
    stand_in = _name_in_session(path)

    def named(messages: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(m.replace(f"{folder}/", "").replace(stand_in, path.name) for m in messages)

    return replace(report, warnings=named(report.warnings), errors=named(report.errors)), evidence


def _name_in_session(path: Path) -> str:
    """What a media file would be called in a session folder."""
    is_sound = path.suffix.lower() in SOUND_SUFFIXES
    return AUDIO_FILE if is_sound else VISION_FILES[Stream.VISION_LEFT]
