"""Fixtures of several tests of training."""

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
    """torch on one thread: the same sums every time, and no waiting for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def impatient(monkeypatch):
    """Reads over the network give up soon, and pass no proxy."""
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.5)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tiny_set, tmp_path):
    """A set to serve and to change."""
    return tiny_sets.copy_set(tiny_set, tmp_path / "set")


@pytest.fixture
def server(shards):
    """A server of that set, with faults to choose."""
    with FaultyServer(shards.parent) as running:
        yield running


@pytest.fixture
def settings(tmp_path):
    """An empty cache for what it serves."""
    return CacheSettings(folder=tmp_path / "cache", retry=QUICK)


@pytest.fixture(scope="module")
def s3(tiny_set):
    """moto's server with the set in s3://trained/set, behind a server that counts; that one."""
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
        fs.makedirs("trained", exist_ok=True)  # moto keeps the bucket of the module before
        for path in tiny_set.iterdir():
            fs.pipe_file(f"trained/set/{path.name}", path.read_bytes())
        patched.setenv("AWS_ENDPOINT_URL", counting.url)
        type(fs).clear_instance_cache()  # other tests' file systems know other servers
        yield counting
    moto.stop()


@pytest.fixture
def file_limit():
    """A function that lets no file grow over so many bytes (as on a full disk), or any (None)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(limit_bytes):
        limit_bytes = soft if limit_bytes is None else limit_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    yield set_limit
    set_limit(None)
