"""Requests to S3 of a build, by operation: none per session that is known, one per shard."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from helpers.oracles import build, cluster_of
from helpers.sessions import write_lines
from helpers.stores import count_requests, s3_server, upload

from preprocess.validate.job import Settings, find_jobs, run_jobs
from shared.recipe import Recipe

SET = f"s3://here/counted{os.getpid()}"  # builds of one URL share a folder of this machine
RECIPE = Recipe.model_validate(
    {
        "segment": {"duration_s": 1.0},
        "split": {"val_fraction": 0},
        "text": {"vocab_size": 300},
        "streams": {
            "touch": {
                "kind": "sensor",
                "file": "metadata.jsonl",
                "key": "touch",
                "rate_hz": 5,
                "values": [{"type": "fraction", "count": 2}],
            },
        },
    }
)
NUM_COLUMNS = 1

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def s3():
    with s3_server() as fs:
        yield fs


def add_sessions(fs, folder, names):
    for name in names:
        rng = random.Random(name)
        lines = [{"timestamp": i / 5, "touch": [rng.random(), 0.5]} for i in range(11)]
        (folder / name).mkdir()
        write_lines(folder / name / "metadata.jsonl", lines)
        upload(folder / name, fs, f"here/sessions/{name}")


def requests_of_build(**options):
    with count_requests() as counts:
        build("s3://here/sessions", SET, RECIPE, **options)
    return counts


def stored_names(fs):
    fs.invalidate_cache()
    return {path.rpartition("/")[2] for path in fs.find(SET.removeprefix("s3://"))}


def test_a_build_asks_for_no_known_session_and_once_for_each_shard(s3, tmp_path):
    nothing, added = [], []
    for number, names in enumerate(["abcdef", "g", "h", "i"]):
        add_sessions(s3, tmp_path, names)
        added.append(requests_of_build())
        nothing.append(requests_of_build())
        assert sum(name.endswith(".index") for name in stored_names(s3)) == number + 1
    # Lists the sessions, the set, and twice the files of killed jobs. Reads three times the
    # manifest, twice the tokenizer, and once the scans, what the set lacks, and the claim.
    fixed = Counter(ListObjectsV2=4, GetObject=8, PutObject=1, DeleteObject=1)
    assert nothing == [fixed + Counter(GetObject=number) for number in (1, 2, 3, 4)]
    # Besides, writes scans, columns, index, what the set lacks if it changed, and the manifest,
    # each after a look at the claim; reads the session twice, checks it, and reads the new index.
    num_written = 3 + NUM_COLUMNS
    more = Counter(PutObject=num_written, GetObject=num_written + 2 + 1, HeadObject=1)
    assert added[1:] == [fixed + more + Counter(GetObject=number) for number in (1, 2, 3)]


def test_added_sessions_leave_no_manifest_for_readers_as_nothing_is_deleted(s3, tmp_path):
    for name in ("added-1", "added-2"):
        add_sessions(s3, tmp_path, [name])
        before = stored_names(s3)
        requests_of_build(keep_old_s=3600)
        assert before <= stored_names(s3)
    assert not [name for name in stored_names(s3) if name.startswith("manifest.g")]


def test_a_set_that_drops_files_keeps_its_manifest_for_readers(s3, tmp_path):
    add_sessions(s3, tmp_path, ["more-1"])
    requests_of_build()
    before = stored_names(s3)
    requests_of_build(keep_old_s=3600, compact=True)
    assert before < stored_names(s3)
    assert len([name for name in stored_names(s3) if name.startswith("manifest.g")]) == 1
    requests_of_build()
    assert not before <= stored_names(s3)


def test_a_validation_asks_for_no_session_that_has_a_verdict(s3, tmp_path):
    def requests_of_validation():
        with count_requests() as counts, cluster_of(0) as cluster:
            jobs = find_jobs(["s3://here/sessions"], RECIPE, verdicts_at=None)
            assert len(list(run_jobs(jobs, Settings(recipe=RECIPE), cluster=cluster))) == len(jobs)
        return counts

    add_sessions(s3, tmp_path, ["checked-1", "checked-2"])
    requests_of_validation()
    known = Counter(ListObjectsV2=1, GetObject=1)
    assert requests_of_validation() == known
    add_sessions(s3, tmp_path, ["checked-3"])
    assert requests_of_validation() == known + Counter(GetObject=1, PutObject=1)
