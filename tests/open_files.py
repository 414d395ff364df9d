"""What this process holds open, by name.

A mere count would not do: sockets of earlier tests go when they are collected,
at any moment.
"""

import contextlib
import os
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
