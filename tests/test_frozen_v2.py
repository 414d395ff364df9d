"""Sets of format 2, orders, batches and resumed runs, frozen by the code of commit `faeac30`.

tests/frozen/v2 has three sets of tests/frozen/sessions, two checkpoints, and what that code made of
them in `expected.json`: see the README there. The functions before the tests gather what is frozen;
the same functions made `expected.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.training import read_events

from preprocess.__main__ import cli as preprocess_cli
from train import Loader, load_checkpoint, open_source
from train.__main__ import cli as train_cli
from train.config import load_train_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import click
    import torch

SESSIONS = Path(__file__).parent / "frozen" / "sessions"
FROZEN = Path(__file__).parent / "frozen" / "v2"
SETS = ("touching", "overlapping", "strided")
RUNS = ("train", "mix")
RESUMED_AT = 4
SEEDS = (0, 7)
CACHE = "sessions.jsonl"

READINGS = {
    "all": {"batch_size": 1},
    "rgb": {"batch_size": 1, "modalities": ["vision_left", "vision_right"], "pixels": "rgb"},
    "text": {"batch_size": 3, "modalities": ["internal_text", "external_text"]},
}
"""Ways to read a set, by changes of train.yaml's `data`; text alone is packed densely."""

HEADS = {
    "all": {"internal_text": 1, "external_text": 1, "audio": 1, "animation": 1},
    "rgb": {"internal_text": 0, "external_text": 0, "audio": 0, "animation": 1},
    "text": {"internal_text": 1, "external_text": 1, "audio": 0, "animation": 0},
}
"""Loss weights of these ways."""

VISION = ("av", "simplejpeg", "numpy")
SOUND = ("av", "soxr", "soundfile", "librosa", "numpy")
ZARR = ("zarr", "numcodecs", "numpy")
PARTS = {
    "vision": ((".vision_left.tar", ".vision_right.tar"), VISION),
    "audio": ((".audio.tar",), SOUND),
    "dmel": ((".dmel.zarr.zip",), (*SOUND, *ZARR)),
    "proprio": ((".proprio.zarr.zip",), ZARR),
    "text": ((".text.tar", "tokenizer.json", "rejected.jsonl"), ("tokenizers",)),
    "checksums": ((".index", "manifest.json"), (*VISION, *SOUND, *ZARR, "tokenizers")),
}
"""Ends of file names, and the packages that decide the bytes of such files."""

PACKAGES = sorted({*PARTS["checksums"][1], "torch"})


@cache
def expected() -> dict[str, Any]:
    return json.loads((FROZEN / "expected.json").read_text(encoding="utf-8"))


# --- what is frozen --------------------------------------------------------------------------


def invoke(cli: click.Command, *arguments: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def build(name: str, out: Path) -> str:
    """Build a set of the frozen sessions by its recipe."""
    recipe = FROZEN / f"{name}.yaml"
    options = {"--recipe": recipe, "--sessions": SESSIONS, "--out": out, "--workers": 0}
    return invoke(preprocess_cli, "shards", *(word for pair in options.items() for word in pair))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a set; the builder's cache is no part of it."""
    files = sorted(path for path in folder.iterdir() if path.name != CACHE)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_config(to: Path, name: str, **sections: dict[str, Any]) -> Path:
    """A frozen training configuration with whole paths, logs and checkpoints beside `to`."""
    values = yaml.safe_load((FROZEN / f"{name}.yaml").read_text(encoding="utf-8"))
    for section, changes in sections.items():
        values[section].update(changes)
    data, training = values["data"], values["training"]
    for part in [data, *data.get("mix", ())]:
        if "shards" in part:
            part["shards"] = str(FROZEN / part["shards"])
    training["log_dir"] = str(to.parent / "runs")
    training["checkpointing"]["save_dir"] = str(to.parent / "checkpoints")
    to.write_text(yaml.safe_dump(values), encoding="utf-8")
    return to


def make_loader(folder: Path, name: str, *, split: str = "train", changes: Any, **options: Any):
    """A loader by a frozen configuration with some changes."""
    config = load_train_config(write_config(folder / "config.yaml", name, **changes))
    return Loader(open_source(config, split=split), config, **options)


def arrays_of(folder: Path, name: str) -> dict[str, Any]:
    """Each array that each way of reading a set gives: by the batch's keys its SHA-256 (the first
    half), dtype and shape.
    """
    found: dict[str, Any] = {}
    for reading, data in READINGS.items():
        changes = {
            "data": {"shards": name, "modalities": None, **data},
            "training": {"loss_weights": HEADS[reading]},
        }
        batches = {}
        for split in ("train", "val"):
            loader = make_loader(
                folder, "train", split=split, changes=changes, is_shuffled=False, num_epochs=1
            )
            for batch in loader:
                batches[" ".join(batch["keys"])] = dict(arrays_in(batch))
        found[reading] = batches
    return found


def arrays_in(batch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name, and SHA-256, dtype and shape of each array of a batch."""
    for group in ("inputs", "targets"):
        for name, tensor in batch[group].items():
            yield f"{group}.{name}", described(tensor)
    yield "weight", described(batch["weight"])


def described(tensor: torch.Tensor) -> str:
    array = tensor.contiguous().numpy()
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:32]
    return f"{digest} {array.dtype} {list(array.shape)}"


def orders_of(folder: Path, name: str) -> dict[str, list[list[str]]]:
    """Keys of the batches of two epochs, for each seed, number of ranks and rank; "" stands where a
    sample only fills up a batch.
    """
    found = {}
    for seed in SEEDS:
        for world_size in (1, 2):
            for rank in range(world_size):
                loader = make_loader(
                    folder,
                    "mix" if name == "mix" else "train",
                    changes={
                        "data": {"modalities": ["proprio"]} | own_set(name),
                        "training": {"seed": seed, "loss_weights": HEADS["rgb"]},
                    },
                    rank=rank,
                    world_size=world_size,
                )
                wanted = 2 * loader.batches_per_epoch
                batches = [batch for batch, _ in zip(loader, range(wanted), strict=False)]
                found[f"seed {seed}, rank {rank} of {world_size}"] = [real_keys(b) for b in batches]
    return found


def own_set(name: str) -> dict[str, str]:
    return {} if name == "mix" else {"shards": name}


def real_keys(batch: dict[str, Any]) -> list[str]:
    weights = batch["weight"].tolist()
    return [key if weight else "" for key, weight in zip(batch["keys"], weights, strict=True)]


def resume(folder: Path, name: str) -> dict[str, Any]:
    """Go on from a frozen checkpoint: losses of each step, held-out ones of the last, and of each
    parameter in the end its norm and first values.
    """
    config = write_config(folder / f"{name}.yaml", name)
    checkpoint = FROZEN / f"{name}_step_{RESUMED_AT}.pt"
    invoke(train_cli, "run", "--config", config, "--resume", checkpoint)
    (log,) = (folder / "runs").iterdir()
    final = load_checkpoint(folder / "checkpoints" / "model_final.pt")
    return {"losses": losses_in(log), "weights": weights_in(final["model"])}


def losses_in(log: Path) -> dict[str, dict[str, float]]:
    """Every loss that TensorBoard has of a run, by name and step."""
    events = read_events(log)
    names = sorted(n for n in events.Tags()["scalars"] if n.removeprefix("val/")[:5] == "loss_")
    return {name: {str(e.step): e.value for e in events.Scalars(name)} for name in names}


def weights_in(model: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Norm and first four values of each parameter."""
    return {
        name: [float(tensor.double().norm()), *tensor.flatten()[:4].tolist()]
        for name, tensor in sorted(model.items())
    }


# --- built again -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The frozen sets, made by the code of today."""
    folder = tmp_path_factory.mktemp("built")
    for name in SETS:
        build(name, folder / name)
    return folder


def require_versions(packages: Iterable[str]) -> None:
    """Skip where a library that decides the bytes is another one than that of the frozen sets."""
    others = [
        f"{package} {version(package)} instead of {expected()['versions'][package]}"
        for package in sorted(set(packages))
        if version(package) != expected()["versions"][package]
    ]
    if others:
        pytest.skip(f"the frozen bytes are those of other libraries; here is {', '.join(others)}")


@pytest.mark.parametrize("name", SETS)
def test_the_frozen_files_are_what_the_list_says(name):
    assert file_hashes(FROZEN / name) == expected()["files"][name]


@pytest.mark.parametrize("name", SETS)
def test_a_set_built_again_has_the_same_files(built, name):
    assert file_hashes(built / name).keys() == expected()["files"][name].keys()


@pytest.mark.parametrize("part", PARTS)
def test_sets_built_again_have_the_same_bytes(built, part):
    ends, packages = PARTS[part]
    require_versions(packages)
    for name in SETS:
        here, there = (
            {file: digest for file, digest in hashes.items() if file.endswith(ends)}
            for hashes in (file_hashes(built / name), expected()["files"][name])
        )
        assert here
        assert here == there, name


def test_every_file_of_a_set_is_in_one_part():
    for name in SETS:
        for file in expected()["files"][name]:
            assert sum(file.endswith(ends) for ends, _ in PARTS.values()) == 1, file


@pytest.mark.parametrize("name", SETS)
def test_a_build_onto_a_frozen_set_changes_no_file(tmp_path, name):
    out = Path(shutil.copytree(FROZEN / name, tmp_path / name))
    before = identities(out)
    assert "is up to date" in build(name, out)
    assert identities(out) == before


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file stands under each name, and when it was written last."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.name != CACHE}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.mark.parametrize("name", SETS)
def test_verify_finds_nothing_wrong_with_a_frozen_set(name):
    assert "all good" in invoke(preprocess_cli, "verify", FROZEN / name)


# --- read and trained on ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_the_loader_gives_the_frozen_arrays(tmp_path, name):
    found, frozen = arrays_of(tmp_path, name), expected()["arrays"][name]
    for reading in READINGS:
        assert list(found[reading]) == list(frozen[reading]), reading
        for keys, arrays in frozen[reading].items():
            assert without_vision(found[reading][keys]) == without_vision(arrays), keys
    require_versions(VISION)  # pictures are decoded by them
    assert found == frozen


def without_vision(arrays: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in arrays.items() if "vision" not in name}


@pytest.mark.parametrize("name", [*SETS, "mix"])
def test_samples_come_in_the_frozen_order(tmp_path, name):
    assert orders_of(tmp_path, name) == expected()["orders"][name]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_from_a_frozen_checkpoint_has_the_frozen_losses(tmp_path, name):
    found, frozen = resume(tmp_path, name), expected()["resumed"][name]
    assert_near(found["losses"], frozen["losses"], tolerance=1e-5)
    assert_near(found["weights"], frozen["weights"], tolerance=1e-5)


def assert_near(found: Any, frozen: Any, *, tolerance: float, what: Sequence[str] = ()) -> None:
    """Compare numbers in nested containers."""
    if isinstance(frozen, dict):
        assert found.keys() == frozen.keys(), what
        for key, value in frozen.items():
            assert_near(found[key], value, tolerance=tolerance, what=[*what, key])
    else:
        assert found == pytest.approx(frozen, rel=tolerance, abs=tolerance), what
