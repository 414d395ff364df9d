"""Trouble of the machine: repeated reads, features that file systems lack, words for errors."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import machine
from shared.cli import CommandGroup
from shared.errors import MachineError
from shared.files import publish_file, sha256_of_bytes, sha256_of_file, write_atomic

TRANSIENT = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM]


def failing(function, number: int, *, times: int):
    """Return the function with an OSError instead of its first calls."""
    left = [times]

    def call(*args, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return function(*args, **options)

    return call


@pytest.mark.parametrize("number", TRANSIENT)
@pytest.mark.parametrize("name", ["open", "preadv", "pread"])
def test_a_read_that_fails_twice_is_repeated(tmp_path, monkeypatch, quick_retries, number, name):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(os, name, failing(getattr(os, name), number, times=2))
    with machine.SteadyFile(path) as file:
        assert file.read() == b"content"
        assert file.pread(3, 2) == b"nte"


@pytest.mark.parametrize("number", TRANSIENT)
def test_a_read_that_keeps_failing_names_file_cause_and_fix(
    tmp_path, monkeypatch, quick_retries, number
):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with machine.SteadyFile(path) as file:
        monkeypatch.setattr(os, "preadv", failing(os.preadv, number, times=99))
        with pytest.raises(MachineError) as caught:
            file.read()
    message = str(caught.value)
    assert message.startswith(f"{path}: {os.strerror(number)}")
    assert "given up after" in message
    assert "; fix: " in message


def test_where_a_file_server_is_gone_only_the_first_file_is_waited_for(
    tmp_path, monkeypatch, quick_retries
):
    attempts = []

    def read(number):
        attempts.append(number)
        raise OSError(number, os.strerror(number))

    for _ in range(1000):
        with pytest.raises(MachineError, match="fix: mount the file system again"):
            machine.read_steadily(partial(read, errno.ESTALE), tmp_path)
    assert len(attempts) < 1020
    attempts.clear()
    with pytest.raises(MachineError):  # another trouble has attempts of its own
        machine.read_steadily(partial(read, errno.EMFILE), tmp_path)
    assert len(attempts) > 3
    attempts.clear()
    monkeypatch.setattr(machine, "HOPELESS_S", -1.0)
    machine._hopeless_until_s.clear()
    for _ in range(2):  # later it is tried again
        with pytest.raises(MachineError):
            machine.read_steadily(partial(read, errno.ESTALE), tmp_path)
    assert len(attempts) > 6


def test_a_full_disk_is_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    read = failing(path.read_bytes, errno.ENOSPC, times=1)
    with pytest.raises(MachineError, match=r"No space left.*MiB free; fix: free some space"):
        machine.read_steadily(read, path)


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError])
def test_an_error_about_the_path_itself_is_raised_as_it_is(tmp_path, error):
    def read():
        raise error(errno.ENOENT, "reason")

    with pytest.raises(OSError, match="reason"):
        machine.read_steadily(read, tmp_path)


def test_a_file_that_its_server_replaced_is_opened_again(tmp_path, monkeypatch, quick_retries):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with machine.SteadyFile(path) as file:
        path.unlink()
        path.write_bytes(b"new")
        monkeypatch.setattr(os, "pread", failing(os.pread, errno.ESTALE, times=1))
        assert file.pread(3, 0) == b"new"


@given(st.binary(max_size=99), st.lists(st.tuples(st.integers(0, 120), st.integers(-1, 120))))
def test_a_steady_file_reads_like_a_plain_one(tmp_path_factory, content, requests):
    path = tmp_path_factory.mktemp("steady") / "file"
    path.write_bytes(content)
    expected = io.BytesIO(content)
    with machine.SteadyFile(path) as file:
        for position, length in requests:
            assert file.seek(position) == expected.seek(position)
            assert file.read(length) == expected.read(length)
            assert file.seek(0, os.SEEK_END) == len(content)
            assert file.pread(max(0, length), position) == content[position:][: max(0, length)]
        assert sha256_of_file(path) == sha256_of_bytes(content)


def test_reads_that_return_less_than_asked_are_continued(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 7), at))
    with machine.SteadyFile(path) as file:
        assert file.pread(60, 30) == bytes(range(30, 90))
        assert file.pread(60, 70) == bytes(range(70, 100))


def test_a_library_that_hides_a_failed_read_does_not_hide_it_from_us(
    tmp_path, monkeypatch, quick_retries
):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, times=99))
    with (
        pytest.raises(MachineError, match="Input/output error"),
        machine.open_for_library(path) as file,
    ):
        assert file.read() == b""  # what a library in C takes for the end of the file


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_after_one_warning(
    tmp_path, monkeypatch, caplog, number
):
    machine.warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, number, times=99))
    with (tmp_path / "file").open("wb") as file:
        for _ in range(3):
            locked = machine.lock_file(
                file.fileno(), fcntl.LOCK_EX, path=tmp_path / "file", loss="nothing is safe"
            )
            assert locked is None
    (record,) = caplog.records
    message = record.getMessage()
    assert message == (
        f"warning: {tmp_path}: its file system has no file locks ("
        f"{os.strerror(number)}); nothing is safe"
    )


def test_a_lock_that_fails_otherwise_is_an_error_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.EIO, times=1))
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="file'"):
        machine.lock_file(file.fileno(), fcntl.LOCK_EX, path=tmp_path / "file", loss="")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_folder_that_cannot_be_flushed_costs_one_warning(
    tmp_path, monkeypatch, caplog, number, call
):
    machine.warn_once.cache_clear()
    real = getattr(os, call)

    def refuse_folders(target, *args):
        path = Path(f"/proc/self/fd/{target}") if isinstance(target, int) else Path(target)
        if path.is_dir():
            raise OSError(number, os.strerror(number), None if call == "fsync" else str(target))
        return real(target, *args)

    monkeypatch.setattr(os, call, refuse_folders)
    for content in (b"one", b"two"):
        write_atomic(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"two"
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"warning: {tmp_path}: its file system can't flush to disk"
    )


def test_a_flush_that_fails_by_the_disk_is_an_error_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, times=9))
    with pytest.raises(OSError, match=r"Input/output error: '.*file"):
        write_atomic(tmp_path / "file", b"content")
    (tmp_path / "draft").write_bytes(b"")
    with pytest.raises(OSError, match=r"Input/output error: '.*draft"):
        publish_file(tmp_path / "draft", tmp_path / "file")


def test_a_failed_write_of_the_content_names_the_file(tmp_path):
    def fail(_file):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"Input/output error: '.*file"):
        write_atomic(tmp_path / "file", fail)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_no_words_for_an_error_are_a_guess(number):
    described = machine.describe_os_error(OSError(number, os.strerror(number), "/some/path"))
    assert described.startswith(f"/some/path: {os.strerror(number)}")
    assert ("disk" in described) <= (number in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EXDEV})
    assert "check that" not in described


def test_a_command_says_path_and_fix_and_ends_with_the_machines_exit_code(tmp_path, capsys):
    import click

    @click.group(cls=CommandGroup)
    def cli() -> None: ...

    @cli.command()
    @click.argument("number", type=int)
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    for number, code in ((errno.EMFILE, 3), (errno.EIO, 3), (errno.EACCES, 1), (errno.ENOENT, 1)):
        with pytest.raises(SystemExit) as ended:
            cli(["fail", str(number)])
        assert ended.value.code == code
        message = capsys.readouterr().err
        assert message.startswith(f"Error: {tmp_path}: {os.strerror(number)}")
        assert "fix: " in message


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
    script = (
        "import json, resource; from shared.machine import raise_descriptor_limit as r; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); "
        "print(json.dumps([r(), resource.getrlimit(resource.RLIMIT_NOFILE)]))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [128, [128, 128]]
