"""A survey lists each session folder once, and finds what looking at each file would find."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from helpers.oracles import tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from preprocess.recordings import survey_recordings
from shared.session.folder import scanned_files, source_files
from shared.session.names import find_unused_files, printable, session_name

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = tiny_recipe()


def slow_stamp(folder):
    """Look at each file by itself."""
    paths = {name: folder / name for name in scanned_files(RECIPE)}
    stats = {name: path.stat() for name, path in paths.items() if path.exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def slow_names(folder):
    """List what is in a folder, and source files one folder deeper, by one call each."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = [name for name in source_files(RECIPE) if os.path.lexists(path / name)]
            names += [f"{session_name(path)}/{name}" for name in ("", *inside)]
        else:
            names.append(session_name(path))
    return [printable(name) for name in names]


NAMES = [*scanned_files(RECIPE), "Audio.WAV", "notes.txt", "frames", os.fsdecode(b"caf\xe9.bin")]
FORMS = st.sampled_from(["file", "folder", "full folder", "link", "dangling", "pipe"])


def put(path: Path, form: str, elsewhere: Path) -> None:
    if form == "file":
        path.write_text("x" * len(path.name), encoding="utf-8")
    elif form == "pipe":
        os.mkfifo(path)
    elif form.endswith("folder"):
        path.mkdir()
        if form == "full folder":
            (path / "audio.wav").touch()
    else:
        path.symlink_to(elsewhere if form == "link" else elsewhere / "gone")


@given(content=st.dictionaries(st.sampled_from(NAMES), FORMS, max_size=6), links=st.booleans())
def test_a_listing_tells_what_looking_at_each_file_tells(tmp_path_factory, content, links):
    root, elsewhere = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("elsewhere")
    (root / "good").mkdir()
    (root / "good" / "audio.wav").touch()
    folder = (elsewhere if links else root) / "odd"
    folder.mkdir()
    if links:
        (root / "odd").symlink_to(folder)
    (elsewhere / "target").write_text("a target", encoding="utf-8")
    for name, form in content.items():
        put(folder / name, form, elsewhere / "target")
    recordings = survey_recordings(root, RECIPE).recordings
    is_session = any(os.path.lexists(folder / name) for name in source_files(RECIPE))
    assert set(recordings) == ({"good", "odd"} if is_session else {"good"})
    if is_session:
        assert recordings["odd"].stamp == slow_stamp(folder)
        assert recordings["odd"].unused == find_unused_files(
            slow_names(folder), source_files(RECIPE)
        )
        assert recordings["odd"].changed_files(scanned_files(RECIPE)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("mode", [0o400, 0o100])
def test_a_folder_that_is_half_readable_is_found_as_before(tmp_path, mode):
    for name in ("good", "odd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audio.wav").touch()
    (tmp_path / "odd").chmod(mode)
    try:
        recordings, skipped, _ = survey_recordings(tmp_path, RECIPE)
    finally:
        (tmp_path / "odd").chmod(0o700)
    if mode == 0o100:  # may be entered, not listed
        assert set(recordings) == {"good", "odd"}
    else:
        assert set(recordings) == {"good"}
        assert "can't be opened" in skipped[0].reason


def test_each_session_folder_is_listed_once_and_nothing_is_looked_for(tmp_path, monkeypatch):
    for number in range(20):
        folder = tmp_path / f"s{number}"
        folder.mkdir()
        (folder / "audio.wav").touch()
        (folder / "metadata.jsonl").touch()
    calls = []
    real = {"scandir": os.scandir, "stat": os.stat, "lstat": os.lstat}
    for name, function in real.items():
        monkeypatch.setattr(
            os,
            name,
            lambda *a, f=function, n=name, **k: (calls.append((n, str(a[0]))), f(*a, **k))[1],
        )
    recordings = survey_recordings(tmp_path, RECIPE).recordings
    assert len(recordings) == 20
    listed = [path for name, path in calls if name == "scandir" and path != str(tmp_path)]
    assert sorted(listed) == sorted(str(tmp_path / name) for name in recordings)
    others = {path for name, path in calls if name != "scandir"}
    assert others <= {str(tmp_path), *(str(tmp_path / name) for name in source_files(RECIPE))}
