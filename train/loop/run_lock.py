"""One run at a time writes checkpoints into a folder, and the next one takes over when it is dead.

A run holds a lock on a file in the folder. The kernel releases it when the process ends, however it
ends. But file servers may not show a lock to other hosts, and some file systems have none. So the
file also names the run, and a run changes the file's time as a sign of life: where the lock does
not decide, the next run waits for such a sign, and takes over if none comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import CheckpointError
from shared.machine import lock_file
from train.loop.checkpoint_manager import prepare_folder
from train.machine import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK_NAME: Final = ".run.lock"

LIFE_SIGN_S: Final = 2.0
"""Time between two signs of life."""

SILENCE_S: Final = 20.0
"""A run that gives no sign of life for this long is dead."""

RELEASE_S: Final = 5.0
"""Longer than loader processes, which inherit the lock, outlive a killed run."""

_POLL_S: Final = 0.2

_LOSS: Final = (
    "runs that use this folder find each other by signs of life only, so do not start two in the "
    "same moment"
)

_held: set[Path] = set()
"""Folders that this process holds."""


@contextlib.contextmanager
def hold_folder(folder: Path, *, log: Callable[[str], object]) -> Iterator[None]:
    """Let no other run write checkpoints into a folder; create it. All ranks of a run call this.

    A process that holds the folder already may hold it again.

    Raises:
        CheckpointError: another run holds it, or it is not writable.
    """
    own = folder.resolve()
    if own in _held:
        yield
        return
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: _hold(folder, log, stack))
        _held.add(own)
        stack.callback(_held.discard, own)
        yield


def _hold(folder: Path, log: Callable[[str], object], stack: contextlib.ExitStack) -> None:
    """Hold a folder until the stack is closed."""
    prepare_folder(folder)
    path = folder / LOCK_NAME
    while True:
        try:
            file, is_locked = _open_locked(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror}; fix: set training.checkpointing.save_dir to a folder "
                "of your own"
            ) from error
        stack.callback(os.close, file)
        owner = _read_owner(file)
        if owner and not (is_locked and _is_here(owner)):
            _await_silence(path, owner, log)
        if _is_at(file, path):
            break  # otherwise the owner ended meanwhile, and the next one locks a new file
    content = {**_this_machine(), "pid": os.getpid(), "since": time.time()}
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(content).encode(), 0)
    ended = threading.Event()
    thread = threading.Thread(target=_give_signs_of_life, args=(file, ended), daemon=True)
    stack.callback(_release, file, path)
    stack.callback(thread.join)
    stack.callback(ended.set)
    thread.start()


def _this_machine() -> dict[str, str]:
    """Name this machine; containers on different machines may have the same host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}


def _is_here(owner: dict[str, Any]) -> bool:
    """Return whether a run is or was on this machine, where locks are seen."""
    return _this_machine().items() <= owner.items()


def _open_locked(path: Path) -> tuple[int, bool]:
    """Open and lock the file; return its descriptor, and False if the file system has no locks."""
    deadline_s = time.monotonic() + RELEASE_S
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_locked = lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path=path, loss=_LOSS)
        if is_locked is not False and _is_at(file, path):
            return file, bool(is_locked)
        owner = _read_owner(file)
        os.close(file)
        if is_locked is False and time.monotonic() > deadline_s:
            raise _refusal(path, owner)
        time.sleep(_POLL_S)


def _await_silence(path: Path, owner: dict[str, Any], log: Callable[[str], object]) -> None:
    """Wait until a run must be dead; refuse if it gives a sign of life."""
    log(
        f"{path.parent}: {_describe(owner)} may still write its checkpoints here; if it gives no "
        f"sign of life within {SILENCE_S:g} s, this run takes over"
    )
    seen = _time_of(path)
    deadline_s = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        latest = _time_of(path)
        if latest is None:
            return
        if latest != seen:
            raise _refusal(path, owner)


def _refusal(path: Path, owner: dict[str, Any]) -> CheckpointError:
    return CheckpointError(
        f"{path.parent}: {_describe(owner)} writes its checkpoints here; fix: wait until it ends, "
        "stop it, or set training.checkpointing.save_dir to another folder"
    )


def _describe(owner: dict[str, Any]) -> str:
    """Name a run by what it wrote about itself."""
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner["since"])))
        return f"process {owner['pid']} on host {owner['host']}, a run since {since},"
    except (KeyError, TypeError, ValueError, OverflowError):
        return "another run"


def _read_owner(file: int) -> dict[str, Any]:
    """Read what a run wrote about itself; empty if it ended properly or wrote nothing."""
    try:
        owner = json.loads(os.pread(file, 1 << 16, 0))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _time_of(path: Path) -> int | None:
    """Return the time of the last sign of life; None if the run removed the file at its end."""
    try:
        with path.open("rb") as file:  # opening makes an NFS client ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _is_at(file: int, path: Path) -> bool:
    """Return whether a path still names an open file, which a run removes at its end."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _give_signs_of_life(file: int, ended: threading.Event) -> None:
    while not ended.wait(LIFE_SIGN_S):
        with contextlib.suppress(OSError):
            os.utime(file)


def _release(file: int, path: Path) -> None:
    """Remove the file, and unlock it although loader processes may still have it open."""
    with contextlib.suppress(OSError):
        if _is_at(file, path):
            path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)
