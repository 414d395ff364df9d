"""End a program on Ctrl-C, SIGTERM or SIGHUP, whatever it does at that moment.

Python drops a KeyboardInterrupt that is raised in one of its callbacks, such as that of an import
lock, and libraries turn one that is raised while they load into other errors. Therefore:

- While no command runs, and while the main module imports, nothing needs cleanup: the process
  exits at once.
- During any other import, and while a library in C reads a file through Python, the interrupt is
  raised when that has ended.
- Otherwise it is raised at once. If Python drops it, it is raised again.

Imports only what Python itself has loaded at its start, so that a program can call
:func:`catch_interrupts` before it imports anything.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import TextIO

_CALLBACKS = {"shared.machine": ("seek", "readable", "readinto"), "soundfile": ("vio_",)}
"""Module -> how the names of functions begin that libraries in C call."""

_RETRY_S = 0.05
"""How long a deferred or dropped interrupt waits until it is tried again."""

REPEAT_S = 1.0
"""Signals within this time count as one: `make` and schedulers pass on what a terminal sends."""


class _State:
    pid = -1
    """The process that catches its interrupts; forked children do not."""
    is_running = False
    """Whether a command runs."""
    number: int = signal.SIGINT
    """The signal that arrived last."""
    was_raised = False
    is_deferred = False
    """Whether an interrupt still has to be raised."""
    ignored_until_s = 0.0


def catch_interrupts() -> None:
    """Handle signals as described above, from now on; SIGHUP stays ignored under nohup."""
    _State.pid = os.getpid()
    for number in ending_signals():
        signal.signal(number, _receive)
    signal.signal(signal.SIGALRM, _interrupt)
    report = sys.unraisablehook

    def retry_or_report(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            _defer()
        else:
            report(dropped)

    sys.unraisablehook = retry_or_report


@contextmanager
def running_command() -> Iterator[None]:
    """Raise KeyboardInterrupt inside, because a command may have something to clean up.

    Raises:
        KeyboardInterrupt: also at the end, if it could not be raised before.
    """
    _State.is_running, _State.was_raised = True, False
    try:
        yield
    finally:
        _State.is_running = False
        if _State.is_deferred:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block Ctrl-C and SIGHUP in threads and processes started here: they inherit the mask.

    A terminal interrupts all processes of a job at once. The client alone answers and stops its
    workers, which would otherwise die with a traceback each.
    """
    from multiprocessing import resource_tracker

    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # it unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def was_interrupted() -> bool:
    """Return whether the last command was interrupted."""
    return _State.was_raised


def exit_code(number: int | None = None) -> int:
    """Return the exit code of a program that a signal ended, by default the latest, as shells do.

    It is 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP.
    """
    return 128 + (_State.number if number is None else number)


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a program: Ctrl-C, SIGTERM and, unless ignored, SIGHUP."""
    is_kept = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_kept else []))


def write_line(line: str) -> None:
    """Write a line to stderr from a signal handler, where print may not be entered again."""
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"{line}\n".encode())


def ignore_lost_terminal() -> None:
    """Ignore errors of output from now on; after SIGHUP, the reader may be gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Unheard):
            setattr(sys, name, _Unheard(stream))


class _Unheard:
    """A text stream whose writes may fail unnoticed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (any attribute of the stream)
        return getattr(self._stream, name)


def _receive(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.pid:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now_s = time.monotonic()
    if now_s >= _State.ignored_until_s:
        _State.number, _State.ignored_until_s = number, now_s + REPEAT_S
        if number == signal.SIGHUP:
            ignore_lost_terminal()
        _interrupt(number, frame)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    importer = _outermost_importer(frame)
    _State.is_deferred = False
    if not _State.is_running or importer == "__main__":
        write_line("Interrupted.")
        os._exit(exit_code())
    if importer is not None or _is_in_callback(frame):
        _defer()
        return
    _State.was_raised = True
    raise KeyboardInterrupt


def _defer() -> None:
    _State.is_deferred = True
    signal.setitimer(signal.ITIMER_REAL, _RETRY_S)


def _is_in_callback(frame: FrameType | None) -> bool:
    """Return whether a library in C may have called what is being executed."""
    while frame is not None:
        names = _CALLBACKS.get(str(frame.f_globals.get("__name__")))
        if names and frame.f_code.co_name.startswith(names):
            return True
        frame = frame.f_back
    return False


def _outermost_importer(frame: FrameType | None) -> str | None:
    """Return the name of the module whose import is being executed; None outside imports."""
    importer, is_inside = None, False
    while frame is not None:
        is_import = frame.f_code.co_filename.startswith("<frozen importlib")
        if is_inside and not is_import:
            importer = str(frame.f_globals.get("__name__"))
        is_inside = is_import
        frame = frame.f_back
    return importer
