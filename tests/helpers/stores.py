"""Stores behind URLs: moto's S3 server on this machine, and requests that fail at first."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import fsspec
import pytest

from shared import storage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "do-not-print-me"

REQUESTS = ("find", "info", "cat_file", "pipe_file", "get_file", "put_file", "rm_file")
"""Methods of a file system that shared.storage calls."""


@contextmanager
def s3_server() -> Iterator[Any]:
    """Run moto's server with an empty bucket `here`; yield fsspec's file system of it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patched.setenv(name, value)
        reset = Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urlopen(reset).close()  # all servers of a process share their memory
        file_systems = fsspec.get_filesystem_class("s3")
        file_systems.clear_instance_cache()  # they may have another server's address
        fs = fsspec.filesystem("s3")
        fs.mkdir("here")
        yield fs
        file_systems.clear_instance_cache()
    server.stop()


@contextmanager
def count_requests() -> Iterator[Counter[str]]:
    """Count the requests to S3 of this process by operation, such as GetObject."""
    from aiobotocore.client import AioBaseClient

    counts: Counter[str] = Counter()
    request = AioBaseClient._make_api_call

    async def counted(self: Any, operation: str, arguments: Any) -> Any:
        counts[operation] += 1
        return await request(self, operation, arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AioBaseClient, "_make_api_call", counted)
        yield counts


def upload(folder: Path, fs: Any, root: str) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def stored_hashes(fs: Any, root: str) -> dict[str, str]:
    """Hash every file as oracles.file_hashes does."""
    fs.invalidate_cache()
    names = {path: path.rpartition("/")[2] for path in fs.find(root)}
    return {
        name: hashlib.sha256(fs.cat_file(path)).hexdigest()
        for path, name in names.items()
        if name != "sessions.jsonl"
    }


def fail_at_first(monkeypatch: pytest.MonkeyPatch, fs: Any, num_failures: int) -> Counter[str]:
    """Let every request about every file fail `num_failures` times, and retry without waiting.

    Returns:
        The number of failures so far, by request.
    """
    seen: Counter[tuple[str, str]] = Counter()
    failures: Counter[str] = Counter()

    def failing(name: str, request: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            key = name, str(args)
            seen[key] += 1
            if seen[key] <= num_failures:
                failures[name] += 1
                raise ConnectionResetError("the connection broke")
            return request(self, *args, **options)

        return call

    for name in REQUESTS:
        monkeypatch.setattr(type(fs), name, failing(name, getattr(type(fs), name)))
    monkeypatch.setattr(storage._random, "uniform", lambda low, high: low)
    return failures
