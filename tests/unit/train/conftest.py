"""Fixtures of the tests of train."""

from __future__ import annotations

import logging
import resource

import fsspec
import pytest
import torch
from helpers import sets as tiny_sets
from helpers.faulty_server import FaultyServer
from helpers.remote_sets import QUICK, SECRET

from shared import storage
from train.data.cached_set import CacheSettings


@pytest.fixture
def one_thread():
    """Run torch on one thread: sums are reproducible, and no thread waits for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def impatient(monkeypatch):
    """Let network reads time out soon, and use no proxy."""
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.5)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tiny_set, tmp_path):
    """Copy the tiny set, to serve and change it."""
    return tiny_sets.copy_set(tiny_set, tmp_path / "set")


@pytest.fixture
def server(shards):
    """Serve the copy of the set, with faults by a plan."""
    with FaultyServer(shards.parent) as running:
        yield running


@pytest.fixture
def settings(tmp_path):
    """Return settings of an empty cache."""
    return CacheSettings(folder=tmp_path / "cache", retry=QUICK)


@pytest.fixture(scope="module")
def s3(tiny_set):
    """Serve the set as s3://trained/set by moto; yield the counting proxy in front of it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with (
        pytest.MonkeyPatch.context() as patched,
        FaultyServer(upstream=moto.get_host_and_port()) as counting,
    ):
        patched.setenv("AWS_ACCESS_KEY_ID", "someone")
        patched.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        host, port = moto.get_host_and_port()
        fs = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}")
        fs.makedirs("trained", exist_ok=True)  # moto keeps the bucket of the previous module
        for path in tiny_set.iterdir():
            fs.pipe_file(f"trained/set/{path.name}", path.read_bytes())
        patched.setenv("AWS_ENDPOINT_URL", counting.url)
        type(fs).clear_instance_cache()  # cached file systems have other servers' addresses
        yield counting
    moto.stop()


@pytest.fixture
def file_limit():
    """Yield a function that limits the size of files, as a full disk does; None removes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(limit_bytes):
        limit_bytes = soft if limit_bytes is None else limit_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    yield set_limit
    set_limit(None)
