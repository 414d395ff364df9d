"""Run the shard job from and to S3, on moto's server on this machine, and compare the sets.

    python tests/experiments/object_store.py

Builds the sessions of tests/experiments/build_kills.py from and to folders and `s3://` in all four
combinations, updates a set behind `s3://`, also by a job that is killed, and compares every file
with the local one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

from helpers.processes import finish, launch

from experiments.build_kills import all_hashes, command, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "not-to-be-printed"


@contextmanager
def s3_server() -> Iterator[Any]:
    """Run moto's server with an empty bucket `here`; set the environment, yield a boto3 client."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="someone",
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_DEFAULT_REGION="us-east-1",
    )
    client = boto3.client("s3")
    client.create_bucket(Bucket="here")
    yield client
    server.stop()


def upload(client: Any, folder: Path, prefix: str) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        client.upload_file(str(path), "here", f"{prefix}/{path.relative_to(folder)}")


def stored_hashes(client: Any, prefix: str) -> dict[str, str]:
    """Hash every object below a prefix by SHA-256."""
    return {
        key[len(prefix) + 1 :]: hashlib.sha256(
            client.get_object(Bucket="here", Key=key)["Body"].read()
        ).hexdigest()
        for key in list_keys(client, prefix)
    }


def list_keys(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="here", Prefix=f"{prefix}/")
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def main() -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="object-store-") as folder, s3_server() as client:
        return compare(Path(folder), client)


def compare(root: Path, client: Any) -> int:
    """Print the rows; return the exit code."""
    first, update = prepare(root)
    outputs: list[str] = []
    num_bad = 0

    def build(sessions: Path | str, out: Path | str) -> float:
        begin_s = time.monotonic()
        start = replace(first, sessions=sessions)
        options = ("--workers", "2", "--keep-old", "0")
        job = launch(command(start, out, *options), scratch=root / "scratch")
        outputs.append(finish(job))
        return time.monotonic() - begin_s

    def report(title: str, hashes: dict[str, str], wanted: dict[str, str], length_s: float) -> None:
        # The builder's cache holds times and tags of files, which differ between stores.
        names = {*hashes, *wanted} - {"sessions.jsonl"}
        bad = sorted(n for n in names if hashes.get(n) != wanted.get(n))
        nonlocal num_bad
        num_bad += len(bad)
        verdict = f"DIFFERENT: {bad[:3]}" if bad else "byte-equal"
        print(f"{title:44} {len(names)} files  {length_s:5.1f} s  {verdict}", flush=True)

    upload(client, first.sessions, "sessions")
    length_s = build(first.sessions, root / "local")
    wanted = all_hashes(root / "local")
    report("folder -> folder", wanted, wanted, length_s)
    length_s = build("s3://here/sessions", root / "from-s3")
    report("s3:// -> folder", all_hashes(root / "from-s3"), wanted, length_s)
    length_s = build(first.sessions, "s3://here/to")
    report("folder -> s3://", stored_hashes(client, "to"), wanted, length_s)
    length_s = build("s3://here/sessions", "s3://here/both")
    report("s3:// -> s3://", stored_hashes(client, "both"), wanted, length_s)
    length_s = build("s3://here/sessions", "s3://here/both")
    report("the same again: nothing changed", stored_hashes(client, "both"), wanted, length_s)

    shutil.copytree(update.old, root / "updated")
    build(first.sessions, root / "updated")
    wanted = all_hashes(root / "updated")
    upload(client, update.old, "updated")
    start = replace(first, sessions="s3://here/sessions")
    job = launch(command(start, "s3://here/updated"), scratch=root / "scratch")
    while job.poll() is None and len(list_keys(client, "updated")) < len(wanted) + 20:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    outputs.append(job.communicate()[0])
    readable = stored_hashes(client, "updated")
    old = all_hashes(update.old)
    is_whole = all(readable.get(n) == h for n, h in old.items() if n != "sessions.jsonl")
    state = "intact" if is_whole else "BROKEN"
    print(f"update of a set behind s3:// killed: old set {state}", flush=True)
    length_s = build("s3://here/sessions", "s3://here/updated")
    report("rerun of it", stored_hashes(client, "updated"), wanted, length_s)
    leaks = sum(SECRET in output for output in outputs)
    left = [p for p in (root / "scratch").rglob("*") if p.is_file() and "dask-" not in str(p)]
    print(f"outputs that hold the secret key: {leaks}; temporary files left: {len(left)}")
    return 1 if num_bad or leaks or not is_whole else 0


if __name__ == "__main__":
    sys.exit(main())
