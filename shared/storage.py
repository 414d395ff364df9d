"""Files behind an fsspec URL such as ``s3://bucket/shards/x``: the few things that a program needs
of an object store.

Local folders are never read or written through here. An upload is atomic: readers see the old
object or the new one. Addresses and keys of a store come from fsspec's and the store's own
environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``FSSPEC_S3_ANON=true``, ``HTTPS_PROXY``,
``~/.netrc`` ...) and stand in no file and no message.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from shared.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""Of http and https: so long without one byte is a failure. aiohttp has a limit for the whole
answer, 5 minutes, which large files on slow lines would not meet."""

_opened: dict[int, Any] = {}
"""File systems that this process or the one it was forked from opened; never let go. fsspec makes
new ones after a fork, and the old ones, when they went, would take their connections out of the
epoll instance that the parent still uses: it would hear nothing of them any more."""

_log = logging.getLogger(__name__)
_chance = random.SystemRandom()
_P = ParamSpec("_P")
_T = TypeVar("_T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/@]*@")
_FACTS = ("ETag", "etag", "md5", "checksum", "generation", "mtime", "LastModified", "created")
"""What file systems of fsspec call that which changes when an object's content does, best first."""
_FOR_GOOD = (PermissionError, ValueError, TypeError, ImportError, NotImplementedError)
_FOR_GOOD_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
"""Errors that trying again does not mend; botocore's by name, for it may not be there."""
_PASSING_STATUS = {408, 425, 429}
"""HTTP statuses below 500 that pass: request timeout, too early, too many requests."""
_PACKAGES = {"s3": "s3fs>=2025.1", "http": "aiohttp>=3.9", "https": "aiohttp>=3.9"}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object as its store lists it."""

    length_bytes: int
    tag: str
    """Differs when the content does: a checksum, else a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to try again; waits grow exponentially with full jitter (Brooker 2015, "Exponential
    Backoff And Jitter", AWS Architecture Blog), so that many processes don't come back at once.
    """

    attempts: int = 10
    first_wait_s: float = 0.5
    """The longest first wait; each later one may be twice as long."""
    longest_wait_s: float = 30.0
    total_s: float = 240.0
    """No attempt begins later; below the 10 minutes after which a silent loader is given up."""


def with_retry(call: Callable[[], _T], *, patience: RetryPolicy) -> _T:
    """The result of a call that is made again while it fails in a way that may pass.

    Args:
        call: asks a store.
        patience: how often and how long.

    Raises:
        StorageError: the last one.
    """
    begin_s = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except StorageError as error:
            longest_s = min(patience.first_wait_s * 2 ** (attempt - 1), patience.longest_wait_s)
            wait_s = _chance.uniform(0, longest_s)
            passed_s = time.monotonic() - begin_s
            if not error.is_transient:
                raise
            if attempt >= patience.attempts or passed_s + wait_s > patience.total_s:
                raise StorageError(
                    f"{error.summary}; given up after {attempt} attempts in {passed_s:.0f} s; when "
                    "it can be reached, run the command again (a training: with --resume auto)"
                ) from error
            _log.warning(
                "%s; attempt %d of %d in %.1f s",
                error.summary,
                attempt + 1,
                patience.attempts,
                wait_s,
            )
        time.sleep(wait_s)
    raise AssertionError("unreachable")


STARTUP_RETRY = RetryPolicy(attempts=5)
"""For the first thing that is asked of a store: what fails then is mostly a wrong address."""


def _patiently(
    method: Callable[Concatenate[Store, _P], _T],
) -> Callable[Concatenate[Store, _P], _T]:
    """A request that is made again while it fails, as far as the store's patience goes; none does
    other things when it is made twice.
    """

    @wraps(method)
    def ask(self: Store, /, *args: _P.args, **options: _P.kwargs) -> _T:
        if self.patience is None:
            return method(self, *args, **options)
        return with_retry(lambda: method(self, *args, **options), patience=self.patience)

    return ask


@dataclass(frozen=True, slots=True)
class Store:
    """A folder behind a URL; plain values, so that it crosses processes.

    Raises (all methods):
        StorageError: the store refuses or can't be reached; FileNotFoundError where there is no
            such object.
    """

    url: str
    patience: RetryPolicy | None = None
    """How long requests are tried again; None where whoever asks does that."""

    def __str__(self) -> str:
        return shown(self.url)

    def with_policy(self, patience: RetryPolicy) -> Store:
        """The same folder, asked so patiently."""
        return replace(self, patience=patience)

    @_patiently
    def list_files(self) -> dict[str, StoredFile]:
        """Everything below the folder, by its path from there; {} where there is nothing."""
        with self._named():
            fs, root = self._open()
            try:
                found = fs.find(root, detail=True)
            except FileNotFoundError:
                return {}
            prefix = root.rstrip("/") + "/"
            return {
                path[len(prefix) :]: StoredFile(int(facts["size"] or 0), _tag(facts))
                for path, facts in found.items()
                if path.startswith(prefix)
            }

    @_patiently
    def find(self, name: str) -> StoredFile | None:
        """One file as it is now; None where there is none."""
        with self._named(name):
            fs, root = self._open()
            try:
                facts = fs.info(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return StoredFile(int(facts["size"] or 0), _tag(facts))

    @_patiently
    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self._named(name):
            fs, root = self._open()
            return bytes(fs.cat_file(f"{root}/{name}"))

    @_patiently
    def write(self, name: str, content: bytes) -> None:
        """Make a file of these bytes, or replace it."""
        with self._named(name, is_new=True):
            fs, root = self._open()
            fs.pipe_file(f"{root}/{name}", content)

    @_patiently
    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to the local disk."""
        with self._named(name):
            fs, root = self._open()
            fs.get_file(f"{root}/{name}", str(path))

    @_patiently
    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        with self._named(name, is_new=True):
            fs, root = self._open()
            fs.put_file(str(path), f"{root}/{name}")

    @_patiently
    def remove(self, name: str) -> None:
        """Remove a file; does nothing where there is none."""
        with self._named(name):
            fs, root = self._open()
            try:
                fs.rm_file(f"{root}/{name}")
            except FileNotFoundError:
                return

    def _open(self) -> tuple[Any, str]:
        """The file system and the folder's path in it."""
        import fsspec

        # Listings that are kept know nothing of what other processes put there.
        fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **self._options())
        _opened[id(fs)] = fs
        return fs, root.rstrip("/")

    def _options(self) -> dict[str, Any]:
        """What the file system needs to be told; s3fs has timeouts of its own (5 s, 15 s)."""
        protocol = self.url.partition("://")[0]
        if protocol not in {"http", "https"}:
            return {}
        import aiohttp
        import fsspec

        given = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
        )
        # Proxies and ~/.netrc, which aiohttp otherwise ignores.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, **given}}

    @contextmanager
    def _named(self, name: str = "", *, is_new: bool = False) -> Iterator[None]:
        """Says of whatever goes wrong in the store's library where it did.

        Args:
            name: the file, where it is one.
            is_new: it is being made, so that what is missing is the place.
        """
        place = shown(f"{self.url}/{name}" if name else self.url)
        try:
            yield
        except FileNotFoundError as error:
            if not is_new:
                raise
            raise StorageError(f"{place}: no such bucket or folder; make it first") from error
        except ImportError as error:
            protocol = self.url.partition("://")[0]
            package = _PACKAGES.get(protocol)
            mend = f"; run `pip install '{package}'`" if package else ""
            raise StorageError(
                f"{place}: {protocol}:// needs a package that is not installed: {error}{mend}"
            ) from error
        except Exception as error:  # every store's library has exceptions of its own
            silent = (
                "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
            )
            reason = (str(error) or silent).splitlines()[0]
            summary = f"{place}: {shown(reason)} ({type(error).__name__})"
            raise StorageError(
                f"{summary}; is the address right, and may you read and write there? Nothing that "
                "was finished is lost: run it again",
                summary=summary,
                is_transient=_may_pass(error),
            ) from error


def parse_location(text: Path | str) -> Path | Store:
    """The local folder or the store that a user means."""
    if isinstance(text, Path):
        return text
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return Store(text.rstrip("/")) if _URL.match(text) else Path(text)


def shown(url: str) -> str:
    """A URL as it may be printed: without a user name and password."""
    return _USER.sub("", url)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may go well later."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUS
    is_full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    named = type(error).__name__ in _FOR_GOOD_NAMES
    return not (is_full or named or isinstance(error, _FOR_GOOD))


def _tag(facts: dict[str, Any]) -> str:
    value = next((facts[name] for name in _FACTS if facts.get(name) is not None), "")
    # Some file systems say a time as a date in one place and as seconds in another.
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.6f}" if isinstance(seconds, float) else str(seconds)
