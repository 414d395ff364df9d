"""A store in memory with a cache, for tests of the cache."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from typing import TYPE_CHECKING

from shared.storage import RetryPolicy
from train.data.cache import CachedFile, ShardCache

if TYPE_CHECKING:
    from pathlib import Path


QUICK = RetryPolicy(attempts=4, first_wait_s=0.01, longest_wait_s=0.02)
SIZE = 1000


class MemoryStore:
    """A store in memory whose responses can be changed.

    Requests are logged to a file, so that those of other processes count.
    """

    def __init__(self, log: Path) -> None:
        self.contents = {f"f{i}": random.Random(i).randbytes(SIZE) for i in range(20)}
        self.log = log
        self.on_fetch = lambda name, content, path: path.write_bytes(content)

    def __str__(self) -> str:
        return "memory://here"

    def file(self, name: str) -> CachedFile:
        content = self.contents[name]
        return CachedFile(name, hashlib.sha256(content).hexdigest(), len(content))

    def download(self, name: str, path: Path) -> None:
        with self.log.open("a") as file:
            file.write(f"{name}\n")
        if name not in self.contents:
            raise FileNotFoundError(name)
        self.on_fetch(name, self.contents[name], path)

    def gets(self) -> Counter[str]:
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()


def make_cache(store, folder, *, num_files=10, retry=QUICK):
    return ShardCache(store, folder, limit_bytes=num_files * SIZE, retry=retry)


def read(cache, file, **options):
    with os.fdopen(cache.open(file, **options), "rb") as opened:
        return opened.read()


def names_in(folder):
    """Names of the cached files; those of temporary files begin with a dot."""
    names = {p.name for p in folder.iterdir()} - {".room"}
    return {n if n.startswith(".") else n.partition(".")[2] for n in names}


def sum_in(folder):
    """Bytes that the cache counts as used or reserved."""
    return int((folder / ".room").read_text())


def in_child(work):
    """Run a function in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def end_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
