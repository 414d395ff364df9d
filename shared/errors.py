"""The errors a user can meet; every message says what, where and how to mend.

- EngineError
  - ConfigError (ValueError): a configuration or recipe file: file, key, mend; exit code 2
  - SessionError (ValueError): a recording that can't be used as it is
    - MediaError: its video or audio doesn't open or decode
  - ShardError (ValueError): a shard set that can't be read
    - FormatVersionError: written by a newer version of this software
    - CorruptError: bytes differ from their checksum, or don't decode
      - TooManyCorruptSamplesError: more than the tolerated share of samples is corrupt
  - StorageError: a place behind a URL
  - JobError: a shard job can't go on
  - CheckpointError (ValueError), DivergedError: training
"""

from __future__ import annotations

REBUILD_HINT = "fix: run `python -m preprocess shards --verify`"
"""Fix for a shard set whose bytes are not those that were written."""


class EngineError(Exception):
    """Base of all errors that are the input's fault and not the program's."""

    exit_code = 1


class ConfigError(EngineError, ValueError):
    """A configuration or recipe can't be used; names the file, the key and the mend."""

    exit_code = 2


class SessionError(EngineError, ValueError):
    """A session can't be used as it is."""


class MediaError(SessionError):
    """A video or audio file doesn't open or decode."""


class ShardError(EngineError, ValueError):
    """A shard set can't be read."""


class FormatVersionError(ShardError):
    """The shard set was written in a format newer than this software reads."""


class CorruptError(ShardError):
    """Bytes differ from their checksum, or don't decode.

    Args:
        message: what, where, how to mend.
        file: the file of the shard set, where that is known.
        offset: where in it the bad member lies; None where all of the file is meant.
    """

    def __init__(self, message: str, *, file: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset


class TooManyCorruptSamplesError(CorruptError):
    """More than the tolerated share of samples is corrupt."""


class StorageError(EngineError):
    """A place behind a URL can't be reached, read or written.

    Args:
        message: what, where, how to mend.
        summary: only what and where; for log lines.
        is_transient: whether the same request may go well later.
    """

    def __init__(self, message: str, *, summary: str = "", is_transient: bool = False) -> None:
        super().__init__(message)
        self.summary = summary or message
        self.is_transient = is_transient


class JobError(EngineError):
    """A shard job can't go on: the disk is full, its workers die, the scheduler is gone."""


class CheckpointError(EngineError, ValueError):
    """A checkpoint can't be written, read, or used with this model or data."""


class DivergedError(EngineError):
    """Training stopped because losses or gradients were not finite many steps in a row."""
