"""Durable writes, checksums and fingerprints."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shared.files import (
    fingerprint_of,
    publish_file,
    sha256_of_bytes,
    sha256_of_file,
    write_atomic,
)


def test_a_reader_sees_the_whole_old_file_until_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    seen = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (seen.append(path.read_bytes()), replace(self, to))
    )
    write_atomic(path, lambda file: file.write(b"new"))
    assert (seen, path.read_bytes()) == ([b"old"], b"new")


@pytest.mark.parametrize("failing", ["fsync", "replace", "content"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path, temporary = tmp_path / "file", tmp_path / ".file.partial"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "fsync":
            patched.setattr(os, "fsync", fail)
        elif failing == "replace":
            patched.setattr(Path, "replace", fail)
        content = fail if failing == "content" else b"new"
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, content, temporary=temporary)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_temporary_file_is_reported_and_the_old_file_stays(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        publish_file(tmp_path / "gone", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("rb") as file:
        from_open_file = sha256_of_file(file)
    expected = hashlib.sha256(b"content").hexdigest()
    assert sha256_of_file(tmp_path / "file") == from_open_file == expected
    assert sha256_of_bytes(b"content") == expected


def test_fingerprints_are_frozen():
    # Every column's fingerprint is made this way: another hash rebuilds every existing set.
    expected = hashlib.sha256('[{"a":[1,2.5,"ä"],"b":null}]'.encode()).hexdigest()[:32]
    assert fingerprint_of({"b": None, "a": (1, 2.5, "ä")}) == expected
