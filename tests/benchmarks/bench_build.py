"""Measure the speed of the shard job beside plain ffmpeg commands, and its memory.

    python tests/benchmarks/bench_build.py                  four cases, 5 interleaved rounds
    python tests/benchmarks/bench_build.py --cases 720p30-gop250 --rounds 3
    python tests/benchmarks/bench_build.py --memory         peak memory, 1 and 30 minutes

Each round runs, one after another on the same cores: (a) ffmpeg decodes all frames of both videos
and scales them to the recipe's size; (b) the same, scaling only the frames kept (5 of 30 per
second); (c) our job from session folder to committed shard set: scan, checksums, both videos,
sound, dMel, sensors, text, Zarr, tar. One core: the videos in sequence, the job in one process. Two
cores: an ffmpeg per video, and a Dask cluster of two workers that was started before. Sessions
are made once, under data/bench: real film from a headset (`--film`), panned, with grain, as a
recorder would encode it (x264 veryfast, up to 3 B-frames in a row, or none). The job's clock starts
when Python and its workers have imported everything, whose time is printed beside it; ffmpeg's
clock starts with ffmpeg.

`--memory` runs the command with its default recipe, in one process and with two Dask workers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click
from bench_sessions import FILM, RATE_HZ, ROOT, Case, make_sessions

SIZE = 224

CASES = {
    c.name: c
    for c in (
        Case("720p30-gop250", 1280, 720, 250, "5M"),
        Case("720p30-gop30", 1280, 720, 30, "5M"),
        Case("720p30-noB", 1280, 720, 30, "5M", b_frames=0),
        Case("1080p30-gop250", 1920, 1080, 250, "10M"),
        Case("1080p30-gop30", 1920, 1080, 30, "10M"),
        Case("1080p30-noB", 1920, 1080, 30, "10M", b_frames=0),
    )
}
MEMORY_CASE = Case("720p30-gop90", 1280, 720, 90, "3M")
DEFAULT_CASES = ["720p30-gop250", "720p30-gop30", "1080p30-gop250", "1080p30-gop30"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument("--workers", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=30, help="length of each session")
    parser.add_argument("--film", type=Path, default=FILM)
    parser.add_argument("--cores", default="0,1", help="the two cores to pin to")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)  # see start_job
    args = parser.parse_args()
    if args.job:
        sessions, seconds, workers, has_profile = args.job
        result = run_job(Path(sessions), int(seconds), int(workers), has_profile == "1")
        click.echo(json.dumps(result))
    elif args.memory:
        measure_memory(args)
    else:
        measure_speed(args)


# --- speed ----------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace) -> None:
    cores = args.cores.split(",")
    click.echo(
        f"{os.uname().machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{ffmpeg_version()}; {args.seconds} s stereo sessions, {args.rounds} rounds"
    )
    folders = {name: make_sessions(CASES[name], args.seconds, args.film) for name in args.cases}
    runs: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for name, folder in folders.items():
            for workers in args.workers:
                pinned = ",".join(cores[:workers])
                sides = {
                    "ffmpeg all": partial(run_ffmpeg, folder, pinned, f"scale={SIZE}:{SIZE}"),
                    "ffmpeg kept": partial(
                        run_ffmpeg, folder, pinned, f"fps=5,scale={SIZE}:{SIZE}"
                    ),
                    "job": partial(start_job, folder, args.seconds, workers, pinned),
                }
                for side, run in sides.items():
                    runs.setdefault((name, workers, side), []).append(run())
            click.echo(f"round {number + 1}, {name}: done", err=True)
    table(runs, frames=2 * RATE_HZ * args.seconds)
    click.echo("\nwhere the job's time goes, one core (shares of its processor time)")
    for name, folder in folders.items():
        result = start_job(folder, args.seconds, 1, cores[0], profile=True)
        parts = ", ".join(f"{part} {share:.1%}" for part, share in result["parts"].items())
        click.echo(
            f"{name}: {parts}; besides it {result['import_s']:.1f} s of start-up and imports"
        )


def table(runs: dict[tuple[str, int, str], list[dict[str, float]]], *, frames: int) -> None:
    """Medians; `frames` are those of one session. Ratios are of runs of the same round, or of the
    medians of processor time, which other programs on the machine disturb less.
    """
    click.echo(
        "\ncase             cores  side         frames/s  (min..max)    rate / ffmpeg's       "
        "cpu ms/frame  / ffmpeg's"
    )
    for (name, workers, side), results in runs.items():
        count = frames * (workers if side == "job" else 1)  # the job has a session per worker
        others = runs[name, workers, "ffmpeg all"]
        rates = sorted(count / r["wall_s"] for r in results)
        ratios = sorted(
            count / r["wall_s"] / (frames / o["wall_s"])
            for r, o in zip(results, others, strict=True)
        )
        cpu_ms = statistics.median(r["cpu_s"] for r in results) / count * 1000
        other_ms = statistics.median(o["cpu_s"] for o in others) / frames * 1000
        click.echo(
            f"{name:16} {workers:5}  {side:11} {statistics.median(rates):9.0f}  "
            f"({rates[0]:4.0f}..{rates[-1]:4.0f})   {statistics.median(ratios):5.2f} "
            f"({ratios[0]:.2f}..{ratios[-1]:.2f}) {cpu_ms:16.2f} {other_ms / cpu_ms:8.2f}"
        )


def run_ffmpeg(folder: Path, cores: str, video_filter: str) -> dict[str, float]:
    """Decode both videos: in parallel on two cores, in sequence on one."""
    eyes = [folder / "1" / "session_a" / f"vision_{eye}.mp4" for eye in ("left", "right")]
    numbers = cores.split(",")
    before, start_s = children_cpu_s(), time.perf_counter()
    running = []
    for i, eye in enumerate(eyes):
        running.append(
            subprocess.Popen(
                [
                    "taskset",
                    "-c",
                    numbers[i % len(numbers)],
                    "ffmpeg",
                    "-nostdin",
                    "-v",
                    "error",
                    "-threads",
                    "1",
                    "-i",
                    str(eye),
                    "-an",
                    "-vf",
                    video_filter,
                    "-f",
                    "null",
                    "-",
                ]
            )
        )
        if len(numbers) == 1:
            require_success(running[-1])
    for process in running:
        require_success(process)
    return {"wall_s": time.perf_counter() - start_s, "cpu_s": children_cpu_s() - before}


def start_job(
    folder: Path, seconds: int, workers: int, cores: str, *, profile: bool = False
) -> dict[str, Any]:
    """Start the job in its own process."""
    command = [
        "taskset",
        "-c",
        cores,
        sys.executable,
        __file__,
        "--job",
        str(folder / str(workers)),
        str(seconds),
        str(workers),
        "1" if profile else "0",
    ]
    before = children_cpu_s()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["total_cpu_s"] = children_cpu_s() - before
    if workers == 2:
        result["cpu_s"] = result["total_cpu_s"] - result["before_cpu_s"]
    return result


def run_job(sessions: Path, seconds: int, workers: int, has_profile: bool) -> dict[str, Any]:
    """Build a shard set of all sessions of a folder, and measure it; runs in the child process."""
    start_s = time.perf_counter()
    from rich.console import Console

    from preprocess.build.job import build_shards
    from preprocess.cluster import Cluster
    from shared.recipe import Recipe
    from shared.shardset.layout import segment_bytes

    recipe = Recipe.model_validate({"split": {"val_fraction": 0}})
    segments = int(seconds / recipe.segment_s)  # a shard per session: each worker gets one
    target_bytes = round(segments * segment_bytes(recipe))
    shard = recipe.shard.model_copy(update={"target_bytes": target_bytes})
    recipe = recipe.model_copy(update={"shard": shard})
    out = Path(tempfile.mkdtemp(dir=sessions.parent, prefix="out."))
    try:
        console = Console(file=io.StringIO())
        num_workers = 0 if workers == 1 else workers
        with Cluster(scheduler=None, num_workers=num_workers, console=console) as cluster:
            cluster.map(_import_all, list(range(4 * max(1, num_workers))), label="start")
            import_s, before_s = time.perf_counter() - start_s, own_cpu_s()
            sampler = Sampler() if has_profile else None
            start_s = time.perf_counter()
            summary = build_shards(sessions, out, recipe=recipe, cluster=cluster)
            wall_s = time.perf_counter() - start_s
            parts = sampler.stop() if sampler else {}
        assert summary.manifest is not None
        assert summary.manifest.counts["samples"] > 0
        assert len(summary.manifest.shards) >= workers
    finally:
        shutil.rmtree(out)
    return {
        "wall_s": wall_s,
        "cpu_s": own_cpu_s() - before_s,
        "before_cpu_s": before_s * (1 + num_workers),  # each worker has imported as much
        "import_s": import_s,
        "parts": parts,
    }


def _import_all(_: int) -> None:
    import preprocess.build.task  # noqa: F401

    time.sleep(0.1)  # so that every worker gets one


class Sampler:
    """Samples the stack by a clock signal, for shares of processor time by activity."""

    PLACES = (
        ("scan: checksums of sources", {"_hash_source_files"}),
        ("scan: frame times", {"_scan_video"}),
        ("scan: sound", {"_scan_audio"}),
        ("scan: sensors and text", {"read_timed_lines"}),
        ("scan: the rest", {"scan_session"}),
        ("tokenizer", {"_choose_tokenizer"}),
        ("video: scale and convert", {"_convert_frame", "reformat"}),
        ("video: encode", {"encode_pictures"}),
        ("video: frame times", {"read_video_track"}),
        ("video: decode", {"read_frames"}),
        ("sound", {"read_audio"}),
        ("dMel", {"read_dmel"}),
        ("sensors", {"read_sensor"}),
        ("text", {"read_text"}),
        ("Zarr", {"_write_zarr"}),
        ("tar", {"_write_tar"}),
        ("sha256 of columns", {"sha256_of_file"}),
        ("the rest of a shard", {"build_shard"}),
    )
    INTERVAL_S = 0.002

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()
        self._last_s = time.process_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, self.INTERVAL_S, self.INTERVAL_S)

    def _look(self, _: int, frame: Any) -> None:
        now_s = time.process_time()
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        place = next((p for p, functions in self.PLACES if functions & names), "the rest")
        self._found[place] += now_s - self._last_s
        self._last_s = now_s

    def stop(self) -> dict[str, float]:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total_s = sum(self._found.values())
        return {place: s / total_s for place, s in self._found.most_common()}


# --- memory ---------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> None:
    """Measure the command with its default recipe: in one process, and each of two workers."""
    click.echo("minutes  workers  wall s  peak MiB of the command, then of its largest child")
    for minutes in (1, 30):
        folder = make_sessions(MEMORY_CASE, 60 * minutes, args.film)
        for workers in (0, 2):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                result = run_command(folder / "1", Path(out), workers)
            click.echo(
                f"{minutes:7}  {workers:7}  {result['wall_s']:6.0f}  {result['own_mib']:.0f}, "
                f"{result['child_mib']:.0f}"
            )


def run_command(sessions: Path, out: Path, workers: int) -> dict[str, float]:
    """Run the shards command in a process that then reports its own and its children's peaks."""
    program = (
        "import json, resource, sys, time\n"
        "from preprocess.__main__ import cli\n"
        "if __name__ == '__main__':\n"
        "    begin_s = time.perf_counter()\n"
        "    cli(sys.argv[1:], standalone_mode=False)\n"
        "    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in "
        "(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    print(json.dumps([time.perf_counter() - begin_s, *peaks]))"
    )
    script = out / "command.py"  # Dask's workers import it again
    script.write_text(program, encoding="utf-8")
    places = ["--sessions", str(sessions), "--out", str(out / "set"), "--workers", str(workers)]
    command = [sys.executable, str(script), "shards", *places]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall_s, own_mib, child_mib = json.loads(done.stdout.splitlines()[-1])
    return {"wall_s": wall_s, "own_mib": own_mib, "child_mib": child_mib}


# --- small things ---------------------------------------------------------------------------


def own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def require_success(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"{process.args!r} failed")


def ffmpeg_version() -> str:
    shown = subprocess.run(["ffmpeg", "-version"], check=True, capture_output=True, text=True)
    return " ".join(shown.stdout.split()[:3])


if __name__ == "__main__":
    main()
