"""Make the peers' own virtual environment, because their pins (numpy < 2.2) restrict ours.

Ours runs in it, too, from the source tree, so that all loaders share one torch and one numpy.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / "data" / "bench" / "peers-venv"
PYTHON = VENV / "bin" / "python"

PEERS = (
    "torch==2.13.0",
    "numpy>=2.1,<2.2",  # mosaicml-streaming 0.13 admits no newer one
    "webdataset==1.0.2",
    "datasets==5.2.0",
    "megatron-energon==7.4.1",
    "torchcodec==0.13.0",  # 0.14 and later want CUDA's libraries beside this torch
    "tensorstore==0.1.86",
    "pillow",
    "matplotlib",
)

ALONE = ("litdata==0.2.76", "mosaicml-streaming==0.13.0")
"""Installed without what they ask for: torchvision does not import beside a CPU torch 2.13, and
clients of clouds are not needed on a local disk."""

NEEDED = (
    *("lightning-utilities", "filelock", "boto3", "requests", "tifffile", "obstore"),
    *("brotli", "catalogue", "python-snappy", "xxhash>=3,<4", "zstd", "tqdm"),
)
"""What the two import."""

LEROBOT = "LeRobotDataset 0.4.4 (the newest for Python 3.11) wants torch < 2.11: not in this run"


def make_environment() -> None:
    """Make the virtual environment, unless it is up to date.

    Raises:
        SystemExit: pip can't install something.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["train"]
    wanted = [*PEERS, *NEEDED, *project["dependencies"], *(d for d in extra if "torch" not in d)]
    mark = VENV / ".installed"
    digest = hashlib.sha256("\n".join([*wanted, *ALONE]).encode()).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") == digest:
        return
    print(f"{VENV}: installing the peers, minutes at the first time", file=sys.stderr, flush=True)
    if not PYTHON.exists():
        _run(sys.executable, "-m", "venv", str(VENV))
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, *wanted)
    _run(*pip, "--no-deps", *ALONE)
    mark.write_text(digest, encoding="utf-8")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
