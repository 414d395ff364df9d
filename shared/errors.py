"""Errors that a user can meet; each message says what is wrong, where, and how to fix it.

- EngineError
  - ConfigError (ValueError): a configuration or recipe file: file, key, fix; exit code 2
  - SessionError (ValueError): a recording can't be used as it is
    - MediaError: its video or audio doesn't open or decode
      - MissingMediaError: its video or audio file doesn't exist
  - ShardError (ValueError): a shard set can't be read
    - FormatVersionError: this software does not read its format version
    - CorruptError: bytes differ from their checksum, or don't decode
      - TooManyCorruptSamplesError: more than the tolerated share of samples is corrupt
  - MachineError: the machine refuses a request, whatever the data is; exit code 3
    - StorageError: a folder or file behind a URL can't be reached, read or written
  - JobError: a shard job can't continue
  - CheckpointError (ValueError), DivergedError: training
"""

from __future__ import annotations

import shlex


def rebuild_hint(location: object) -> str:
    """Return the fix for a shard set whose bytes are not those that were written."""
    return (
        "fix: rebuild it by `python -m preprocess shards --verify --out "
        f"{shlex.quote(str(location))}` with its --recipe and --sessions"
    )


LINK_FAULT = "links to a missing file; fix: copy the file itself"
"""What is wrong with a file of a session that is a link without a target."""

REBUILD_HINT = rebuild_hint("SHARDS")
"""The fix where the location of the set is not known."""


def rebuild_hint_for(path: object) -> str:
    """Return the fix for the set that a file belongs to, in a folder or behind a URL."""
    location, slash, _ = str(path).rpartition("/")
    return rebuild_hint(location) if slash else REBUILD_HINT


def upgrade_hint_for(path: object) -> str:
    """Return the fix for the set of an older format that a file belongs to."""
    location = str(path).rpartition("/")[0] or "SHARDS"
    return f"fix: run `python -m preprocess upgrade {shlex.quote(location)}`"


class EngineError(Exception):
    """Base of all errors that the input or the machine causes, not a bug in the program."""

    exit_code = 1


class ConfigError(EngineError, ValueError):
    """A configuration or recipe can't be used; the message names file, key and fix."""

    exit_code = 2


class SessionError(EngineError, ValueError):
    """A session can't be used as it is."""


class MediaError(SessionError):
    """A video or audio file doesn't open or decode."""


class MissingMediaError(MediaError):
    """A video or audio file doesn't exist."""


class ShardError(EngineError, ValueError):
    """A shard set can't be read."""


class FormatVersionError(ShardError):
    """A shard set has a format version that this software does not read."""


class CorruptError(ShardError):
    """Bytes differ from their checksum, or don't decode.

    `file` is the file of the shard set, if it is known, and `offset` that of the corrupt member in
    it; None means the whole file.
    """

    def __init__(self, message: str, *, file: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset


class TooManyCorruptSamplesError(CorruptError):
    """More than the tolerated share of samples is corrupt."""


class MachineError(EngineError):
    """The machine refuses a request: a disk, a limit, memory. It says nothing about the data.

    `summary` says only what and where, for log lines; by default it is the message. `fix` is what
    to do once retries are used up. With `is_transient`, the same request may succeed later.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, summary: str = "", fix: str = "", is_transient: bool = False
    ) -> None:
        super().__init__(message)
        self.summary = summary or message
        self.fix = fix
        self.is_transient = is_transient


class StorageError(MachineError):
    """A folder or file behind a URL can't be reached, read or written."""


class JobError(EngineError):
    """A shard job can't continue: the disk is full, workers die, or the scheduler is gone."""


class CheckpointError(EngineError, ValueError):
    """A checkpoint can't be written, read, or used with this model or data."""


class DivergedError(EngineError):
    """Training stopped because losses or gradients were not finite for many steps in a row."""
