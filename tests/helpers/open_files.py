"""What this process holds open, opens and reads, by name.

A mere count would not do: sockets of earlier tests go when they are collected,
at any moment.
"""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path


def open_files(start: str | Path | tuple[str, ...]) -> Counter[str]:
    """How often each file, pipe or memory of such a name is open.

    start: a folder, or what a name may start with ("pipe:", "/memfd:").
    """
    starts = start if isinstance(start, tuple) else str(start)
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            names.append(os.readlink(fd))  # noqa: PTH115 (not all are paths)
    return Counter(name for name in names if name.startswith(starts))


@contextlib.contextmanager
def opens_noted():
    """Every file that is opened inside, by whatever call of Python, once."""
    opened: set[str] = set()
    is_over = False

    def note(event, values):
        if event == "open" and not is_over and isinstance(values[0], str | os.PathLike):
            opened.add(os.fspath(values[0]))

    sys.addaudithook(note)  # for the life of the process
    try:
        yield opened
    finally:
        is_over = True


@contextlib.contextmanager
def reads_counted():
    """Bytes that are read inside at given offsets, by name of the file."""
    read: Counter[str] = Counter()
    pread, preadv = os.pread, os.preadv

    def name_of(fd):
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def count_pread(fd, length, offset):
        content = pread(fd, length, offset)
        read[name_of(fd)] += len(content)
        return content

    def count_preadv(fd, buffers, offset):
        count = preadv(fd, buffers, offset)
        read[name_of(fd)] += count
        return count

    os.pread, os.preadv = count_pread, count_preadv
    try:
        yield read
    finally:
        os.pread, os.preadv = pread, preadv
