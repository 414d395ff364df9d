"""Keep what validation found of each session, so that the next run looks only at what changed.

The verdicts of the sessions in a folder are in its hidden folder ``.verdicts``, which may be
deleted at any time. A verdict holds as long as all that the checks depend on stays the same: the
content of the session's files, the names beside them, some keys of the recipe, and the versions of
the checks. The content is compared by size and time, and if these changed, by SHA-256.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess.recordings import UNREAD, RemoteRecording
from preprocess.session_log import SessionLog, log_line
from preprocess.validate.report import CHECK_VERSIONS, CHECKS, ValidationReport
from shared.errors import MachineError
from shared.files import fingerprint_of
from shared.machine import machine_error
from shared.shardset.store import LocalShardSet
from shared.storage import RetryPolicy, Store, parse_location

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from preprocess.recordings import Recording, Survey
    from preprocess.session_log import LogFiles
    from preprocess.validate.duplicates import Signature
    from preprocess.validate.probe import Depth
    from shared.recipe import Recipe

FOLDER = ".verdicts"
"""Hidden folder beside the session folders."""

_STEM = "verdicts"

_VERSION = 1
"""Raised when verdicts have other keys, or signatures are made in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is kept of one session."""

    session: str
    stamp: Mapping[str, list[Any]]
    """File -> size and time, as in its recording."""
    sha256: Mapping[str, str]
    """The same files -> the hash of their content."""
    bases: Mapping[Depth, str]
    """Depth -> what its checks depended on besides the files, see :func:`basis_of`; a full report
    has both."""
    report: ValidationReport
    signature: Signature
    """By which sessions with the same content are found."""

    @property
    def key(self) -> str:
        """Return a fingerprint of everything that a page about the session depends on."""
        return fingerprint_of(self.sha256, dict(self.bases), self.report.as_dict())

    def as_line(self) -> bytes:
        """Return the line of the log."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "session"}
        return log_line(self.session, {**values, "report": self.report.as_dict()})

    @classmethod
    def from_line(cls, line: bytes) -> Verdict | None:
        """Parse a line of the log; None if it can't be read."""
        try:
            values = json.loads(line)
            if not all(
                isinstance(values[f.name], dict) for f in fields(cls) if f.name != "session"
            ):
                return None
            return cls(**{**values, "report": ValidationReport.from_dict(values["report"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def bases_of_recipe(recipe: Recipe, depth: Depth) -> dict[Depth, str]:
    """Return fingerprints of the checks, and the settings that they depend on, by depth.

    A full look is a quick one, too.
    """
    depths: tuple[Depth, ...] = ("quick",) if depth == "quick" else ("quick", "full")
    streams = {
        name: {k: v for k, v in spec.as_json().items() if k not in UNREAD.get(spec.kind, ())}
        for name, spec in recipe.streams.items()
    }
    settings = [_VERSION, recipe.segment_s, recipe.segment.min_coverage, streams]
    return {
        d: fingerprint_of(
            settings, {n: CHECK_VERSIONS[n] for n, c in CHECKS.items() if d in ("full", c.depth)}
        )
        for d in depths
    }


def basis_of(recording: Recording, recipe_basis: str) -> str:
    """Return a fingerprint of what the verdict of a session depends on besides its files."""
    return fingerprint_of(recipe_basis, sorted(astuple(name) for name in recording.unused))


class Verdicts:
    """The verdicts in one folder; of runs at the same time, those of the last one to end are kept.

    Args:
        root: the folder; None keeps them in memory only.
        present: names of the files in the folder; None lists them.
        sessions: those whose verdicts are kept; None keeps all.
    """

    def __init__(
        self,
        root: Path | Store | None,
        *,
        present: Collection[str] | None = None,
        sessions: Collection[str] | None = None,
    ) -> None:
        self.taken: set[str] = set()
        """Sessions of this run, as two locations may have some of the same name."""
        self._root = root
        # A set without a claim is a folder whose files are replaced atomically.
        files: LogFiles = root if isinstance(root, Store) else LocalShardSet(root or Path())
        try:
            if present is None:
                names = root.list_files() if isinstance(root, Store) else (root or Path()).glob("*")
                present = [Path(name).name for name in names]
            self._log = SessionLog(files, _STEM, present)
        except (MachineError, OSError):  # the sessions are looked at again
            self._log = SessionLog(files, _STEM, ())
        self._sessions = self._log if sessions is None else sessions
        self._is_changed = False
        self._can_write = root is not None

    def __len__(self) -> int:
        return len(self._log)

    def get(self, session: str) -> Verdict | None:
        """Return the verdict of a session, if there is one that can be read."""
        line = self._log.get(session)
        return None if line is None else Verdict.from_line(line)

    def add(self, verdict: Verdict) -> None:
        """Add or replace a verdict; :meth:`save` writes it."""
        self._log.add(verdict.session, verdict.as_line())
        self._is_changed = True

    def save(self) -> str:
        """Write what is new; return a warning at the first time that this fails."""
        if not (self._is_changed and self._can_write):
            return ""
        try:
            if isinstance(self._root, Path):
                self._root.mkdir(parents=True, exist_ok=True)
            self._log.save(self._sessions)
            self._is_changed = False
        except (MachineError, OSError) as error:
            self._can_write = False
            if isinstance(error, OSError):
                error = machine_error(error, error.filename)
            return (
                f"warning: verdicts are not kept, so the next run looks at these sessions again: "
                f"{error.summary}; fix: give another folder for them (--verdicts FOLDER)"
            )
        return ""


def open_verdicts(
    location: Path | str,
    survey: Survey,
    *,
    folder: str | None = None,
    opened: dict[str, Verdicts] | None = None,
) -> Verdicts:
    """Open the verdicts of the sessions that were found at a location.

    They are in `folder`, or else beside the session folders. A location that is itself a session
    has some only if the folder around it already has. `opened` remembers those of each folder; of
    two sessions with one name, it keeps the verdict of the first.
    """
    opened = {} if opened is None else opened
    root, first = parse_location(location), next(iter(survey.recordings.values()))
    own = first.store.url if isinstance(first, RemoteRecording) else str(first.folder)
    if isinstance(root, Store):
        around, is_one = root.url, own == root.url
    else:
        around, is_one = str(root), root.samefile(own)
    around = own.rpartition("/")[0] if is_one else around
    text, names = folder or f"{around}/{FOLDER}", survey.recordings.keys()
    if text not in opened:
        parsed, present = parse_location(text), None
        if isinstance(parsed, Store):
            parsed = parsed.with_policy(RetryPolicy())
            if not (folder or is_one):  # the listing of the sessions has them
                prefix = f"{FOLDER}/"
                present = [n.removeprefix(prefix) for n in survey.hidden if n.startswith(prefix)]
        sessions = None if folder or is_one else names
        opened[text] = Verdicts(parsed, present=present, sessions=sessions)
    verdicts = opened[text]
    has_none = is_one and not folder and not len(verdicts)
    if has_none or not verdicts.taken.isdisjoint(names):
        return Verdicts(None, present=())
    verdicts.taken.update(names)
    return verdicts
