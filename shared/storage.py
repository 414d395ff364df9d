"""Files behind an fsspec URL such as ``s3://bucket/shards/x``.

Local folders are never read or written through this module. An upload is atomic: readers see the
old object or the new one. Addresses and keys of a store come from fsspec's and the store's own
environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``FSSPEC_S3_ANON=true``, ``HTTPS_PROXY``,
``~/.netrc`` ...). They appear in no file and no message.
"""

from __future__ import annotations

import errno
import inspect
import logging
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from shared.errors import MachineError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tenacity import RetryCallState

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""Longest time without one byte over http and https. aiohttp's own limit is 5 minutes for the whole
response, which large files on slow connections would not meet."""

_opened: dict[int, Any] = {}
"""File systems that this process, or the one it was forked from, opened; never released. fsspec
makes new ones after a fork. If the old ones were garbage collected, they would remove their
connections from the epoll instance that the parent process still uses, and the parent would miss
its responses."""

_log = logging.getLogger(__name__)
_random = random.SystemRandom()
"""Independent of the global generator, whose state training saves and restores."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/@]*@")
_VERSION_KEYS = (
    "ETag", "etag", "md5", "checksum", "generation", "mtime", "LastModified", "created"
)  # fmt: skip
"""Keys of fsspec's file info whose value changes when an object's content does, best first."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PERMANENT = (PermissionError, ValueError, TypeError, ImportError, NotImplementedError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
"""Errors that a retry can't fix; botocore's by name, because botocore may not be installed."""
_TRANSIENT_STATUS = {408, 425, 429}
"""HTTP statuses below 500 worth a retry: request timeout, too early, too many requests."""
_PACKAGES = {"s3": "s3fs>=2025.1", "http": "aiohttp>=3.9", "https": "aiohttp>=3.9"}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object as its store lists it."""

    length_bytes: int
    tag: str
    """Changes with the content: a checksum if the store has one, else a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long a request is retried.

    Waits grow exponentially with full jitter (Brooker 2015, "Exponential Backoff And Jitter", AWS
    Architecture Blog), so that many processes don't retry at the same moment.
    """

    attempts: int = 10
    first_wait_s: float = 0.5
    """Upper bound of the first wait; the bound doubles with each attempt."""
    longest_wait_s: float = 30.0
    total_s: float = 240.0
    """No attempt begins later. Shorter than the 10 minutes after which the loader counts as hung.
    """


STARTUP_RETRY = RetryPolicy(attempts=5)
"""For the first request to a store, which mostly fails because of a wrong address."""


LOCAL_RETRY = RetryPolicy(attempts=7, first_wait_s=0.25, longest_wait_s=4.0, total_s=30.0)
"""For reads of local and network file systems, which recover within seconds or not at all."""


def with_retry(call: Callable[[], _T], *, retry: RetryPolicy) -> _T:
    """Call a function, and again while it fails with a transient MachineError.

    Raises:
        MachineError: the last one.
    """
    import tenacity  # takes 40 ms to import

    def wait_s(state: RetryCallState) -> float:
        bound_s = retry.first_wait_s * 2 ** (state.attempt_number - 1)
        return _random.uniform(0, min(bound_s, retry.longest_wait_s))

    def log_retry(state: RetryCallState) -> None:
        number = f"attempt {state.attempt_number + 1} of {retry.attempts}"
        _log.warning("%s; %s in %.1f s", _error_of(state).summary, number, state.upcoming_sleep)

    def give_up(state: RetryCallState) -> _T:
        error = _error_of(state)
        fix = error.fix or (
            "run the command again when the store can be reached (a training: with --resume auto)"
        )
        raise type(error)(
            f"{error.summary}; given up after {state.attempt_number} attempts in "
            f"{state.seconds_since_start:.0f} s; fix: {fix}"
        ) from error

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, MachineError) and error.is_transient
        ),
        wait=wait_s,
        stop=tenacity.stop_after_attempt(retry.attempts)
        | tenacity.stop_before_delay(retry.total_s),
        before_sleep=log_retry,
        retry_error_callback=give_up,
    )
    return retrying(call)


def _error_of(state: RetryCallState) -> MachineError:
    """Return the error of a failed attempt."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, MachineError)
    return error


def _retried(method: Callable[Concatenate[Store, _P], _T]) -> Callable[Concatenate[Store, _P], _T]:
    """Retry a request as the store's policy says; all requests are idempotent."""

    @wraps(method)
    def request(self: Store, /, *args: _P.args, **options: _P.kwargs) -> _T:
        if self.retry is None:
            return method(self, *args, **options)
        return with_retry(lambda: method(self, *args, **options), retry=self.retry)

    return request


@dataclass(frozen=True, slots=True)
class Store:
    """A folder behind a URL; a plain value that can be sent to other processes.

    Raises (all methods):
        StorageError: the store refuses the request or can't be reached.
        FileNotFoundError: there is no such object.
    """

    url: str
    retry: RetryPolicy | None = None
    """None if the caller retries."""

    def __str__(self) -> str:
        return redact_url(self.url)

    def with_policy(self, retry: RetryPolicy) -> Store:
        """Return the same folder with another retry policy."""
        return replace(self, retry=retry)

    @_retried
    def list_files(self, prefix: str = "") -> dict[str, StoredFile]:
        """List what is below the folder, by relative path that begins with `prefix`.

        An object store lists about 1,000 files per request, and with a prefix no others.
        """
        with self._errors():
            fs, root = self._open()
            try:
                files = fs.find(root, detail=True, **_accepted(fs.find, prefix=prefix or None))
            except FileNotFoundError:
                return {}
            folder = root.rstrip("/") + "/"
            return {
                path[len(folder) :]: _stored_file(info)
                for path, info in files.items()
                if path.startswith(folder + prefix)
            }

    @_retried
    def stat(self, name: str) -> StoredFile | None:
        """Look up one file as it is now; None if it does not exist."""
        with self._errors(name):
            fs, root = self._open()
            try:
                return _stored_file(fs.info(f"{root}/{name}"))
            except FileNotFoundError:
                return None

    @_retried
    def read(self, name: str) -> bytes:
        """Read a whole file."""
        with self._errors(name):
            fs, root = self._open()
            # Otherwise s3fs asks for the size before every read.
            options = _accepted(fs.cat_file, max_concurrency=1)
            return bytes(fs.cat_file(f"{root}/{name}", **options))

    @_retried
    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file."""
        with self._errors(name, is_new=True):
            fs, root = self._open()
            fs.pipe_file(f"{root}/{name}", content)

    @_retried
    def download(self, name: str, path: Path) -> None:
        """Copy a file to the local disk."""
        with self._errors(name):
            fs, root = self._open()
            fs.get_file(f"{root}/{name}", str(path))

    @_retried
    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        with self._errors(name, is_new=True):
            fs, root = self._open()
            fs.put_file(str(path), f"{root}/{name}")

    @_retried
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with self._errors(name):
            fs, root = self._open()
            try:
                fs.rm_file(f"{root}/{name}")
            except FileNotFoundError:
                return

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the folder's path in it."""
        import fsspec

        # A cached listing would miss what other processes write.
        fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **self._options())
        _opened[id(fs)] = fs
        return fs, root.rstrip("/")

    def _options(self) -> dict[str, Any]:
        """Return options of the file system; s3fs has timeouts of its own (5 s, 15 s)."""
        protocol = self.url.partition("://")[0]
        if protocol not in {"http", "https"}:
            return {}
        import aiohttp
        import fsspec

        user_options = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
        )
        # trust_env: use proxies and ~/.netrc, which aiohttp otherwise ignores.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, **user_options}}

    @contextmanager
    def _errors(self, name: str = "", *, is_new: bool = False) -> Iterator[None]:
        """Turn any error of the store's library into a StorageError that names the URL.

        While a file is created (`is_new`), a missing path is the folder's or bucket's.
        """
        url = redact_url(f"{self.url}/{name}" if name else self.url)
        try:
            yield
        except FileNotFoundError as error:
            if not is_new:
                raise
            raise StorageError(f"{url}: no such bucket or folder; fix: create it first") from error
        except ImportError as error:
            protocol = self.url.partition("://")[0]
            package = _PACKAGES.get(protocol)
            fix = f"; fix: run `pip install '{package}'`" if package else ""
            raise StorageError(
                f"{url}: {protocol}:// needs a package that is not installed: {error}{fix}"
            ) from error
        except Exception as error:  # every store's library has its own exceptions
            kind = type(error).__name__
            silent = "no response in time" if isinstance(error, TimeoutError) else kind
            reason = (str(error) or silent).splitlines()[0]
            summary = f"{url}: {redact_url(reason)} ({kind})"
            raise StorageError(
                f"{summary}; fix: check the address and your read and write permissions, then run "
                "it again; finished work is kept",
                summary=summary,
                is_transient=_is_transient(error),
            ) from error


def parse_location(text: Path | str) -> Path | Store:
    """Parse a local folder or a URL."""
    if isinstance(text, Path):
        return text
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return Store(text.rstrip("/")) if _URL.match(text) else Path(text)


def redact_url(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return _USER.sub("", text)


def _accepted(method: Callable[..., Any], **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return those options that a file system's method has, without those that are None."""
    known = inspect.signature(method).parameters
    return {name: v for name, v in options.items() if name in known and v is not None}


def _is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _TRANSIENT_STATUS
    is_disk_full = isinstance(error, OSError) and error.errno in DISK_FULL
    is_permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
    return not (is_disk_full or is_permanent)


def _stored_file(info: dict[str, Any]) -> StoredFile:
    """Make a StoredFile of fsspec's file info."""
    version = next((info[key] for key in _VERSION_KEYS if info.get(key) is not None), "")
    # Some file systems give a time as a date in one call and as seconds in another.
    seconds = version.timestamp() if isinstance(version, datetime) else version
    tag = f"{seconds:.6f}" if isinstance(seconds, float) else str(seconds)
    return StoredFile(int(info["size"] or 0), tag)
