"""Write the windows in every peer's format; runs in the peers' environment.

The same JPEG bytes and the same arrays go into all of them: into tars with a member per frame (as
is usual) and with a member per camera (fewer members read faster), into MosaicML's MDS,
into LitData's chunks, and the numbers of each session into a file beside its videos for those that
decode sessions on the fly.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from recordings import Store
from windows import (
    EYES,
    NUMBERS,
    decode_eye,
    iter_samples,
    iter_windows,
    open_set,
    split_jpegs,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SHARDS = 8
"""Divides evenly over 2 workers."""

CHUNK_BYTES = 1 << 26
"""Of MDS shards and LitData chunks, which both recommend about as much."""

STEP = 13
"""The frames of every STEP-th window are compared."""


def main() -> None:
    """Write the missing formats; failures go to ``failures.json``, by format."""
    store = Store(Path(sys.argv[1]), int(sys.argv[2]))
    fingerprint = open_set(store, "mjpeg").source.fingerprint
    failures = {}
    for name, write in FORMATS.items():
        out = store.root / "formats" / name
        mark = out / ".fingerprint"
        if mark.exists() and mark.read_text(encoding="utf-8") == fingerprint:
            continue
        print(f"{out}: converting", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            write(store, out)
        except Exception as error:
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
        else:
            mark.write_text(fingerprint, encoding="utf-8")
    (store.root / "failures.json").write_text(json.dumps(failures), encoding="utf-8")


def write_tars(store: Store, out: Path, *, per_frame: bool) -> None:
    """Write WebDataset tars by its own writer."""
    import webdataset

    samples = list(iter_samples(store))
    for number in range(SHARDS):
        with webdataset.TarWriter(str(out / f"train-{number:06}.tar")) as writer:
            for key, eyes, numbers in samples[number::SHARDS]:
                sample: dict[str, Any] = {"__key__": key}
                for eye, member in eyes.items():
                    if per_frame:
                        frames = enumerate(split_jpegs(member))
                        sample |= {f"{eye}{i:02}.jpg": bytes(jpeg) for i, jpeg in frames}
                    else:
                        sample[f"{eye}.mjpeg"] = member
                sample |= {f"{name}.npy": _npy(values) for name, values in numbers.items()}
                writer.write(sample)


def write_energon(_: Store, out: Path) -> None:
    """Write the tars with a member per camera, and run ``energon prepare`` on them."""
    for tar in sorted((out.parent / "tar-eyes").glob("*.tar")):
        os.link(tar, out / tar.name)
    prepare_energon(out)


def prepare_energon(folder: Path) -> None:
    """Make Energon's index of a folder of tars.

    Raises:
        RuntimeError: the command failed.
    """
    command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive"]
    options = ["--no-progress", "--num-workers", "2", "--split-ratio", "1,0,0"]
    kind = ["--sample-type", "CrudeWebdataset", str(folder)]
    done = subprocess.run([*command, *options, *kind], capture_output=True, text=True)
    if done.returncode or not (folder / ".nv-meta" / "dataset.yaml").exists():
        raise RuntimeError((done.stderr or done.stdout)[-500:])


def write_mds(store: Store, out: Path) -> None:
    """Write MosaicML's shards."""
    from mosaic import MDSWriter

    _, _, numbers = next(iter_samples(store))
    shapes = {
        name: f"ndarray:{v.dtype.name}:{','.join(map(str, v.shape))}" for name, v in numbers.items()
    }
    columns = {"key": "str", **dict.fromkeys(EYES, "bytes"), **shapes}
    with MDSWriter(out=str(out), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for key, eyes, arrays in iter_samples(store):
            writer.write({"key": key, **eyes, **arrays})


def write_litdata(store: Store, out: Path) -> None:
    """Write LitData's chunks."""
    import litdata

    samples = list(iter_samples(store))

    def sample(index: int) -> dict[str, Any]:
        key, eyes, numbers = samples[index]
        return {"key": key, **eyes, **numbers}

    litdata.optimize(
        fn=sample,
        inputs=list(range(len(samples))),
        output_dir=str(out),
        chunk_bytes=CHUNK_BYTES,
        num_workers=1,
        start_method="fork",
        mode="overwrite",
    )


def write_numbers(store: Store, out: Path) -> None:
    """Write the numbers of each session's windows, for peers that decode only video on the fly."""
    samples = ((key, numbers) for key, _, numbers in iter_samples(store))
    for session, group in itertools.groupby(samples, key=lambda s: s[0].partition("@")[0]):
        rows = list(group)
        stacked = {name: np.stack([numbers[name] for _, numbers in rows]) for name in NUMBERS}
        np.savez(out / f"{session}.npz", key=np.array([key for key, _ in rows]), **stacked)


def write_truth(store: Store, out: Path) -> None:
    """Write some windows' frames before any codec, and as simplejpeg decodes the JPEGs."""
    every = iter_windows(open_set(store, "raw", streams=EYES))
    raw = {key: np.stack([a[e] for e in EYES]) for key, a in itertools.islice(every, 0, None, STEP)}
    np.savez(out / "raw.npz", **raw)
    jpeg = {
        key: np.stack([decode_eye(members[eye]) for eye in EYES])
        for key, members, _ in iter_samples(store)
        if key in raw
    }
    np.savez(out / "mjpeg.npz", **jpeg)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Store, Path], None]] = {
    "tar-frames": lambda store, out: write_tars(store, out, per_frame=True),
    "tar-eyes": lambda store, out: write_tars(store, out, per_frame=False),
    "energon": write_energon,
    "mds": write_mds,
    "litdata": write_litdata,
    "numbers": write_numbers,
    "truth": write_truth,
}
"""Folder name and writer of each."""


if __name__ == "__main__":
    main()
