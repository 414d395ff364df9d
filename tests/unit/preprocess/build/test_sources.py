"""Scans are kept by session: what did not change is read back, and little is written."""

from __future__ import annotations

import json
import os

import pytest
from helpers.oracles import cluster_of, tiny_recipe
from helpers.sessions import write_lines

from preprocess import session_log
from preprocess.build import sources
from preprocess.build.sources import scan_sessions
from preprocess.recordings import survey_recordings
from shared.shardset.store import LocalShardSet

RECIPE = tiny_recipe(streams={"note": {"kind": "text", "file": "text.jsonl"}})


class CountingSet(LocalShardSet):
    """A set in a folder that notes the size of every file that is written."""

    written: list[tuple[str, int]]

    def write(self, name: str, content: bytes) -> None:
        self.written.append((name, len(content)))
        super().write(name, content)


CountingSet.written = []


def write_session(root, number, text="hello"):
    folder = root / f"s{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "text.jsonl", [{"timestamp": 1.0, "text": text}])


@pytest.fixture
def root(tmp_path):
    for number in range(40):
        write_session(tmp_path / "sessions", number)
    (tmp_path / "set").mkdir()
    return tmp_path / "sessions"


@pytest.fixture
def store(tmp_path):
    CountingSet.written = []
    return CountingSet(tmp_path / "set")


def run(root, store, cluster=None):
    recordings = survey_recordings(root, RECIPE).recordings
    present = os.listdir(store.root)  # noqa: PTH208
    CountingSet.written = []
    if cluster is not None:
        return scan_sessions(recordings, store, RECIPE, cluster, present=present)
    with cluster_of(0) as own:
        return scan_sessions(recordings, store, RECIPE, own, present=present)


def test_only_sessions_that_changed_are_scanned(root, store):
    first, num = run(root, store)
    assert (len(first), num) == (40, 40)
    assert list(first) == sorted(first)
    assert run(root, store) == (first, 0)
    assert CountingSet.written == []
    write_session(root, 7, "other words")
    write_session(root, 40)
    second, num = run(root, store)
    assert num == 2
    assert {n: s for n, s in second.items() if n not in ("s0007", "s0040")} == {
        n: s for n, s in first.items() if n != "s0007"
    }
    assert run(root, store) == (second, 0)


def test_an_added_session_does_not_write_the_others_again(root, store, monkeypatch):
    monkeypatch.setattr(session_log, "LEVEL_BYTES", 4000)
    run(root, store)
    all_bytes = sum(size for _, size in CountingSet.written)
    sizes = []
    for number in range(40, 60):
        write_session(root, number)
        run(root, store)
        sizes.append(sum(size for _, size in CountingSet.written))
    assert sorted(sizes)[len(sizes) // 2] <= 4000
    assert sum(sizes) / len(sizes) < all_bytes / 4
    assert run(root, store)[1] == 0


def test_a_scan_that_is_interrupted_keeps_what_is_finished(root, store):
    class Interrupted:
        def iterate(self, function, arguments, **_options):
            for index in range(10):
                yield index, function(arguments[index])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, store, Interrupted())
    assert run(root, store)[1] == 30


def test_finished_scans_are_written_while_others_are_made(root, store, monkeypatch):
    monkeypatch.setattr(sources, "_SAVE_S", 0.0)
    run(root, store)
    assert len(CountingSet.written) >= 40


def test_a_failed_scan_stops_the_job_after_the_others(root, store):
    class Failing:
        def iterate(self, function, arguments, **_options):
            yield 0, ValueError("broken")
            yield from ((i, function(a)) for i, a in enumerate(arguments) if i)

    with pytest.raises(ValueError, match="broken"):
        run(root, store, Failing())
    assert run(root, store)[1] == 1


@pytest.mark.parametrize("name", ["s0003", "s0003/text.jsonl"])
def test_a_session_that_is_gone_for_a_moment_is_not_kept_without_its_files(root, store, name):
    class Moving:
        def iterate(self, function, arguments, **_options):
            (root / name).rename(root / "away")
            yield from ((i, function(a)) for i, a in enumerate(arguments))
            (root / "away").rename(root / name)

    assert not run(root, store, Moving())[0]["s0003"].intervals
    scans, num = run(root, store)
    assert num == 1
    assert scans["s0003"].intervals


def test_the_cache_of_an_earlier_release_is_taken_over(root, store):
    scans, _ = run(root, store)
    lines = (store.root / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
    old = [{k: v for k, v in json.loads(line).items() if k != "session"} for line in lines]
    write_lines(store.root / "sessions.jsonl", old)
    assert run(root, store) == (scans, 0)
    assert (store.root / "sessions.jsonl").read_text(encoding="utf-8").splitlines() == lines
