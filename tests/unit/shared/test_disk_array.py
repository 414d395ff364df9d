"""Arrays on disk against the arrays in memory that they were made of."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers.processes import open_files
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MachineError
from shared.files import BLOCK_BYTES, DiskArray


@given(
    parts=st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=6),
    start=st.integers(-30, 30) | st.none(),
    stop=st.integers(-30, 30) | st.none(),
)
def test_slices_are_those_of_the_array(parts, start, stop):
    array = DiskArray(np.int16)
    for part in parts:
        array.append(np.array(part, dtype=np.int16))
    expected = np.array([v for part in parts for v in part], dtype=np.int16)
    assert len(array) == len(expected)
    np.testing.assert_array_equal(array[start:stop], expected[start:stop])


def test_blocks_are_the_whole_in_order():
    values = np.arange(3 * BLOCK_BYTES // 8 + 5, dtype=np.float64)
    blocks = list(DiskArray.of(values).iter_blocks())
    assert [len(b) * 8 for b in blocks] == [BLOCK_BYTES] * 3 + [40]
    np.testing.assert_array_equal(np.concatenate(blocks), values)


def test_steps_are_refused():
    with pytest.raises(ValueError, match="without steps"):
        DiskArray.of(np.arange(9))[::2]


def test_copies_and_pickles_carry_the_numbers():
    values = np.arange(1000, dtype=np.int16)
    again = copy.copy(DiskArray.of(values))  # as pickling would
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again[:], values)


def test_a_forked_process_reads_the_same_numbers():
    array = DiskArray.of(np.arange(5000, dtype=np.int64))
    child = os.fork()
    if child == 0:
        os._exit(int(array[4000:4001][0] != 4000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert array[10:11].tolist() == [10]


def test_its_unnamed_file_is_closed_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = DiskArray.of(np.zeros(1000))
    assert list(tmp_path.iterdir()) == []
    assert open_files(tmp_path).total() == 1
    del array
    assert not open_files(tmp_path)


def test_a_full_disk_says_what_to_do():
    program = (
        "import resource, signal, numpy as np; from shared.files import DiskArray\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "DiskArray(np.uint8).append(np.zeros(5000, np.uint8))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "raise `ulimit -f`" in done.stderr


@pytest.mark.parametrize("call", ["create", "write"])
def test_a_full_folder_of_temporary_files_is_named_with_a_way_out(tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target, name = (tempfile, "TemporaryFile") if call == "create" else (os, "pwrite")
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(MachineError, match=r"No space left.*MiB free\); fix: set TMPDIR") as caught:
        DiskArray(np.uint8).append(np.zeros(9, np.uint8))
    assert str(caught.value).startswith(f"{tmp_path}: ")
