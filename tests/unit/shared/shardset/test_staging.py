"""Staging directories end with their job; errors of a full disk name the disk."""

from __future__ import annotations

import errno
import tempfile

import pytest

from shared.errors import JobError
from shared.shardset.staging import (
    discard,
    disk_errors,
    job_folder,
    remove_leftover,
    staging_folder,
)
from shared.storage import Store

STORE = Store("memory://store/set")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_with_its_free_space(tmp_path, number):
    with (
        pytest.raises(
            JobError, match=r"MiB free\); fix: free some space and run it again"
        ) as caught,
        disk_errors(tmp_path),
    ):
        raise OSError(number, "Full")
    assert str(caught.value).startswith(f"{tmp_path}: full (disk ")


def test_other_errors_of_the_file_system_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_tasks_of_one_job_have_folders_beside_each_other_and_remove_them(temporary):
    with staging_folder(STORE, "job") as first, staging_folder(STORE, "job") as second:
        assert first != second
        assert first.parent == second.parent
        assert first.is_dir()
    assert list(temporary.iterdir()) == []


def test_a_later_job_removes_the_folders_of_a_killed_one_but_a_reader_does_not(temporary):
    killed = staging_folder(STORE, "killed")
    folder = killed.__enter__()  # and never left
    with staging_folder(STORE, ""):
        assert folder.is_dir()
    with staging_folder(STORE, "later"):
        assert not folder.exists()
    killed.__exit__(None, None, None)
    assert list(temporary.iterdir()) == []


def test_a_discarded_folder_is_gone_at_once_for_its_users(tmp_path):
    folder = job_folder(tmp_path, "job")
    folder.mkdir()
    (folder / "file").touch()
    discard(folder)
    assert list(tmp_path.iterdir()) == []
    discard(folder)  # a folder that is missing already


def test_leftover_files_and_folders_are_removed(tmp_path):
    (tmp_path / ".a.tmp").touch()
    (tmp_path / ".b.tmp").mkdir()
    (tmp_path / ".b.tmp" / "file").touch()
    for leftover in list(tmp_path.iterdir()):
        remove_leftover(leftover)
    assert list(tmp_path.iterdir()) == []
