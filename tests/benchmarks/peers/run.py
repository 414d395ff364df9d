"""Compare our loader with the peers', on the same windows and to the same tensors, in one run.

    python tests/benchmarks/peers/run.py              everything, 20 minutes (make bench-peers)
    python tests/benchmarks/peers/run.py --smoke      one short round on few windows
    python tests/benchmarks/peers/run.py --only LitData "ours, mjpeg to RGB" --rounds 9

At the first time it installs the peers into ``data/bench/peers-venv``, makes 400 windows of 4 s of
real stereo footage (224 x 224, 5 frames/s), builds our shard sets of them by our own job and writes
the same JPEG bytes in every peer's format. Then every loader is checked against the truth once, and
all are measured in turn, round after round: two tables, on the terminal, as CSV and as a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

from environment import LEROBOT, PYTHON, ROOT, make_environment  # noqa: E402
from measure import Row, measure, server_environment  # noqa: E402
from recordings import Store, build_sets, make_sessions  # noqa: E402
from report import print_tables, write_csv  # noqa: E402

PEERS = (
    *("sessions, PyAV", "sessions, torchcodec", "WebDataset, Pillow", "WebDataset, simplejpeg"),
    *("MosaicML Streaming", "LitData", "HF datasets", "Megatron-Energon"),
)
AS_FLOATS = ("WebDataset, Pillow", "MosaicML Streaming", "LitData")
"""Measured with frames normalized in the worker too."""

ROWS = (
    *(Row("rgb", name, "rgb") for name in PEERS),
    *(Row("rgb", f"ours, {name} to RGB", "rgb") for name in ("mjpeg", "h264", "yuv420", "raw")),
    *(Row("rgb", f"ours, {name} to yuv420", "rgb") for name in ("mjpeg", "h264", "yuv420")),
    *(Row("rgb", f"limit: {name}", "rgb") for name in ("memcpy", "JPEG to RGB", "h264 to yuv")),
    *(Row("model", name, "worker") for name in AS_FLOATS),
    *(Row("model", name, "device") for name in PEERS if name != "sessions, torchcodec"),
    *(Row("model", f"ours, {name}", "device") for name in ("mjpeg to RGB", "mjpeg to yuv420")),
    *(Row("model", f"ours, {name} to yuv420", "device") for name in ("h264", "yuv420")),
    *(Row("model", f"limit: {name}", "device") for name in ("JPEG to RGB", "h264 to yuv")),
)


def main() -> None:
    """Make what is missing, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measured pass")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted({r.loader for r in ROWS}))
    parser.add_argument("--tables", nargs="+", choices=("rgb", "model"), default=["rgb", "model"])
    parser.add_argument("--smoke", action="store_true", help="one short round on few windows")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.seconds = 1, 0.3
    store = prepare(seconds=24 if args.smoke else 100)
    rows = [r for r in ROWS if r.table in args.tables]
    rows = [r for r in rows if args.only is None or r.loader in args.only]
    print(machine())
    results = measure(rows, store, rounds=args.rounds, workers=args.workers, seconds=args.seconds)
    out = ROOT / "data" / "bench" / ("peers-smoke.csv" if args.smoke else "peers.csv")
    lines = write_csv(out, rows, results, store)
    print_tables(lines)
    print(f"{LEROBOT}\n{machine()}")
    picture = out.with_suffix(".png")
    subprocess.run([str(PYTHON), str(HERE / "picture.py"), str(out), str(picture)], check=True)
    print(f"{out}\n{picture}")


def prepare(*, seconds: int) -> Store:
    """Make the environment, sessions, shard sets and peers' formats that are missing."""
    make_environment()
    store = Store(ROOT / "data" / "bench" / f"peers-{seconds}s", seconds)
    store.root.mkdir(parents=True, exist_ok=True)
    make_sessions(store)
    for name, reason in build_sets(store).items():
        print(f"shard set {name} can't be built: {reason}")
    convert = [str(PYTHON), str(HERE / "convert.py"), str(store.root), str(seconds)]
    subprocess.run(convert, check=True, env=server_environment())
    failures = json.loads((store.root / "failures.json").read_text(encoding="utf-8"))
    for name, reason in failures.items():
        print(f"format {name} can't be written: {reason}")
    return store


def machine() -> str:
    """Describe the machine and its load."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if "model name" in line), "?")
    return f"{os.cpu_count()} cores of {model}; load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
