"""What the machine refuses: repeated reads, locks, limits, and the words for its errors.

Trouble of the machine says nothing about the data: a disk that fails or is full, a file server that
does not answer, too many open files, no memory. Reads that meet it are repeated as
:data:`shared.storage.LOCAL_RETRY` says; then a :class:`shared.errors.MachineError` names the file,
the cause and the fix. Features that some file systems lack, such as locks, are done without, after
one warning that says what is lost.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import io
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared import storage
from shared.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

MAX_DESCRIPTORS = 1 << 16
"""More open files than any command needs; programs that count up to a huge limit become slow."""

HOPELESS_S = 60.0
"""How long reads that fail like one that was given up are not repeated: where a file server is
gone, each of thousands of files would take as long."""

_BUFFER_BYTES = 1 << 16

TOO_MANY_OPEN = frozenset({errno.EMFILE, errno.ENFILE})

_TRANSIENT = TOO_MANY_OPEN | {
    errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOMEM, errno.ENOBUFS,
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ESHUTDOWN, errno.ENOLINK,
}  # fmt: skip
_PERMANENT = {
    errno.ENOSPC, errno.EDQUOT, errno.ENXIO, errno.ENODEV, errno.ENOLCK, errno.ENOSYS,
    errno.EOPNOTSUPP, errno.EROFS,
}  # fmt: skip

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of a file system that has no locks, or can't flush a folder."""

_UNSYNCED = _UNSUPPORTED | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}

_WORDS: dict[int, str] = {
    number: words
    for words, *numbers in (
        ("fix: correct the path", errno.ENOENT),
        ("a file is where a folder must be; fix: choose another path, or move the file away",
         errno.EEXIST, errno.ENOTDIR),
        ("a folder is where a file must be; fix: choose another path", errno.EISDIR),
        ("fix: use a shorter name", errno.ENAMETOOLONG),
        ("fix: correct the symbolic link", errno.ELOOP),
        ("fix: change the permissions of the file or folder, or run as its owner",
         errno.EACCES, errno.EPERM),
        ("fix: choose a folder on a file system that is mounted for writing", errno.EROFS),
        ("{disk}; fix: free some space there, or use a folder on another disk", errno.ENOSPC),
        ("{disk}; fix: remove files of your quota there, or use a folder on another disk",
         errno.EDQUOT),
        ("fix: raise `ulimit -f`, or use a file system that takes files of this size",
         errno.EFBIG),
        ("the process may open {limit} files; fix: raise `ulimit -n`", errno.EMFILE),
        (("all processes of the machine opened too many files; fix: end some of them, or raise "
          "fs.file-max by sysctl"), errno.ENFILE),
        ("fix: free memory on this machine, or raise `ulimit -v`", errno.ENOMEM),
        ("fix: end other processes, or raise `ulimit -u`, and run it again", errno.EAGAIN),
        (("the disk, or the connection to it, fails; fix: look for the device's errors in `dmesg`, "
          "and copy the data to another disk"), errno.EIO),
        ("its file server replaced it; fix: mount the file system again and run it again",
         errno.ESTALE),
        ("the file server does not answer; fix: run it again when it does",
         errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED,
         errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
        ("fix: connect the device and run it again", errno.ENXIO, errno.ENODEV),
        ("another program uses it; fix: run it again when that has ended", errno.EBUSY),
        ("its file system does not support this; fix: use a folder on another file system",
         errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
        ("fix: choose two paths on the same disk", errno.EXDEV),
    )
    for number in numbers
}  # fmt: skip
"""Cause and fix of errors; an error that is not here gets no guess."""

_hopeless_until_s: dict[int, float] = {}
"""By the number of the error, until when a read that fails with it is not repeated."""

_log = logging.getLogger(__name__)


def describe_os_error(error: OSError | MemoryError, path: Path | str | None = None) -> str:
    """Say in one line which path an error is about, what is wrong, and how to fix it."""
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, f"out of memory ({error})".replace(" ()", ""))
    path = error.filename if path is None else path
    path = path.decode(errors="replace") if isinstance(path, bytes) else path
    reason = error.strerror or str(error) or type(error).__name__
    where = "" if path is None or isinstance(path, int) else f"{path}: "
    return "; ".join(filter(None, (f"{where}{reason}", words_for(error, path))))


def words_for(error: OSError, path: Path | str | None = None) -> str:
    """Return the cause and the fix of an error about a path; empty if there are no words for it."""
    words = _WORDS.get(error.errno or 0, "")
    if path is None and error.errno in storage.DISK_FULL:
        words = "fix: find the full file system by `df`, and free some space there"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return words.format(limit=limit, disk=describe_disk(str(path)))


def describe_disk(path: Path | str) -> str:
    """Name the file system that holds a path, which need not exist, and its free space."""
    parents = (Path(path).absolute(), *Path(path).absolute().parents)
    with suppress(OSError):
        existing = next(each for each in parents if each.exists())
        mount = next((each for each in (existing, *existing.parents) if each.is_mount()), existing)
        return f"disk {mount}, {shutil.disk_usage(existing).free / 2**20:,.0f} MiB free"
    return "its disk can't be examined"


def is_machine_trouble(error: BaseException) -> bool:
    """Return whether an error says nothing about the file that was being read."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT or error.errno in _PERMANENT
    return isinstance(error, (MachineError, MemoryError))


def machine_error(error: OSError, path: Path | str, *, fix: str = "") -> MachineError:
    """Make the error to raise from an OSError about a path; `fix` replaces the usual words."""
    summary = f"{path}: {error.strerror or error}"
    words = fix or words_for(error, path)
    cause, _, its_fix = words.rpartition("fix: ")
    summary = f"{summary}; {cause}".rstrip("; ")
    return MachineError(
        f"{summary}; fix: {its_fix}" if its_fix else summary,
        summary=summary,
        fix=its_fix or "run it again",
        is_transient=error.errno in _TRANSIENT,
    )


def raise_if_refused(error: OSError, path: Path | str) -> None:
    """Raise a MachineError if a file is there but may not be read; otherwise do nothing."""
    if error.errno in {errno.EACCES, errno.EPERM} or is_machine_trouble(error):
        raise machine_error(error, path) from error


@contextmanager
def naming_path(path: Path | str) -> Iterator[None]:
    """Add a path to an OSError that names none, such as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def pause_collector() -> Iterator[None]:
    """Make many objects without a search for reference cycles among them.

    Python searches all objects whenever their number has grown by a quarter. Where a hundred
    thousand sessions are described, that takes longer than everything else.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_steadily(read: Callable[[], _T], path: Path | str) -> _T:
    """Call a function that reads a path, and again while the machine fails.

    Raises:
        MachineError: the machine still fails.
        OSError: anything else, such as a missing file.
    """
    number = 0

    def attempt() -> _T:
        nonlocal number
        try:
            return read()
        except OSError as error:
            error.filename = str(path) if error.filename is None else error.filename
            if not is_machine_trouble(error):
                raise
            number = error.errno or 0
            raise machine_error(error, path) from error

    try:
        return attempt()
    except MachineError as error:
        is_hopeless = time.monotonic() < _hopeless_until_s.get(number, 0.0)
        if is_hopeless or not error.is_transient or not _has_tenacity():
            raise
    try:
        return storage.with_retry(attempt, retry=storage.LOCAL_RETRY)
    except MachineError:
        _hopeless_until_s[number] = time.monotonic() + HOPELESS_S
        raise


def _has_tenacity() -> bool:
    """Return whether reads can be repeated: without a free descriptor nothing can be imported."""
    try:
        importlib.import_module("tenacity")
    except (ImportError, OSError):
        return False
    return True


class SteadyFile(io.RawIOBase):
    """A file open for reading whose reads are repeated while the machine fails.

    Threads and forked processes can share :meth:`pread`, which moves no position. A file that its
    server replaced (ESTALE) is opened again.

    Args:
        descriptor: file descriptor if the file is already open; this object then closes it.

    Raises (all methods):
        MachineError, OSError: see :func:`read_steadily`.
    """

    def __init__(self, path: Path, *, descriptor: int | None = None) -> None:
        self.name = str(path)
        self._position = 0
        self._is_stale = False
        self._fd = -1
        if descriptor is None:
            descriptor = read_steadily(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC), path)
        self._fd = descriptor

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._fd

    def size(self) -> int:
        """Return the size in bytes."""
        return read_steadily(partial(os.fstat, self._fd), self.name).st_size

    def pread(self, length: int, offset: int) -> bytes:
        """Read bytes at an offset; fewer only if the file ends."""
        try:
            content = os.pread(self._fd, length, offset)
        except OSError as error:
            self._is_stale = error.errno == errno.ESTALE
            content = self._steadily(lambda: os.pread(self._fd, length, offset))
        if len(content) == length:
            return content
        while content and len(content) < length:
            left, at = length - len(content), offset + len(content)
            more = self._steadily(partial(os.pread, self._fd, left, at))
            if not more:
                break
            content += more
        return content

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 (any buffer)
        """Read into a buffer at the position; return the number of bytes, 0 at the end."""
        num_read = self._steadily(lambda: os.preadv(self._fd, [buffer], self._position))
        self._position += num_read
        return num_read

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, origin: int = os.SEEK_SET, /) -> int:
        """Move the position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(origin)
        self._position = max(0, offset + (self.size() if start is None else start))
        return self._position

    def close(self) -> None:
        """Close the file."""
        if not self.closed and self._fd >= 0:
            os.close(self._fd)
        super().close()

    def _steadily(self, read: Callable[[], _T]) -> _T:
        try:  # takes a tenth of the time
            return self._read(read)
        except OSError as error:
            if not is_machine_trouble(error):
                raise
        return read_steadily(partial(self._read, read), self.name)

    def _read(self, read: Callable[[], _T]) -> _T:
        if self._is_stale:
            fresh = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(fresh, self._fd, inheritable=False)
            os.close(fresh)
            self._is_stale = False
        try:
            return read()
        except OSError as error:
            self._is_stale = error.errno == errno.ESTALE
            error.filename = self.name
            raise


class _QuietFile(SteadyFile):
    """A file for libraries in C, which take any error for its end: it keeps the error instead."""

    error: Exception | None = None

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 (any buffer)
        if self.error is not None:
            return 0
        try:
            return super().readinto(buffer)
        except (MachineError, OSError) as error:
            self.error = error
            return 0


@contextmanager
def open_for_library(path: Path) -> Iterator[Any]:
    """Open a file for a library that takes file objects and hides their errors.

    Raises:
        MachineError, OSError: a read failed meanwhile, whatever the library made of it.
    """
    with _QuietFile(path) as file:
        try:
            yield file
        finally:
            if file.error is not None:
                raise file.error


def open_steadily(path: Path) -> io.BufferedReader:
    """Open a file for reading in parts; see :class:`SteadyFile`."""
    return io.BufferedReader(SteadyFile(path), _BUFFER_BYTES)


def read_bytes(path: Path) -> bytes:
    """Read a whole file; see :func:`read_steadily`."""
    with SteadyFile(path) as file:
        return file.pread(file.size(), 0)


def lock_file(descriptor: int, operation: int, *, path: Path, loss: str) -> bool | None:
    """Lock an open file by ``flock``; on a file system without locks, warn and go on.

    `path` names the file, and `loss` says what may go wrong without a lock.

    Returns:
        True if it is locked; False if another process holds the lock, only with ``LOCK_NB``; None
        if there are no locks.
    """
    try:
        with naming_path(path):
            fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        folder = path if path.is_dir() else path.parent
        warn_once(f"{folder}: its file system has no file locks ({error.strerror}); {loss}")
        return None
    return True


def sync(descriptor: int, path: Path) -> None:
    """Flush an open file or folder to disk; on a file system that can't, warn and go on."""
    with _accepting_unsynced(path):
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    with _accepting_unsynced(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _accepting_unsynced(path: Path) -> Iterator[None]:
    try:
        with naming_path(path):
            yield
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
        warn_once(
            f"{path if path.is_dir() else path.parent}: its file system can't flush to disk "
            f"({error.strerror}); files are whole when a process is killed, but those written last "
            "may be lost in a power cut"
        )


@cache
def warn_once(message: str) -> None:
    """Log a warning, once per process, and not in processes that the first one started."""
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        _log.warning("warning: %s", message)


def raise_descriptor_limit() -> int:
    """Raise the number of files that the process may open as far as allowed, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft


def count_descriptors() -> int:
    """Count the files that this process has open; 0 if the machine does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names suffice)
    except OSError:
        return 0


@contextmanager
def temporary_folder(prefix: str, purpose: str) -> Iterator[Path]:
    """Make a temporary folder, and remove it at the end.

    Raises:
        MachineError: there is no space for it, or another reason.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise temporary_folder_error(error, purpose) from error
    with folder as name:
        yield Path(name)


def temporary_folder_error(error: OSError, purpose: str) -> MachineError:
    """Make the error to raise when the folder of temporary files refuses a file."""
    try:
        folder = tempfile.gettempdir()
    except OSError:  # none of the usual folders can be written
        folder = os.environ.get("TMPDIR", "/tmp")  # noqa: S108
    if error.errno not in storage.DISK_FULL | {errno.ENOENT, errno.EROFS, errno.EACCES}:
        return machine_error(error, folder)
    fix = (
        f"{purpose} do not fit into the folder of temporary files ({describe_disk(folder)}); fix: "
        "set TMPDIR to a folder on a disk with more space"
    )
    return machine_error(error, folder, fix=fix)
