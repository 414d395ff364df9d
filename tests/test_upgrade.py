"""Upgrade sets of format 2 that the code of before wrote; nothing is decoded, nothing is lost.

The old sets in tests/frozen/v2 are read here by stock tarfile, zipfile and struct; see the README
there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from helpers.oracles import tar_members

from preprocess.__main__ import cli
from preprocess.build import upgrade as upgrade_module
from preprocess.build.upgrade import convert_recipe, upgrade_set
from preprocess.sets.verify import verify_set
from shared.errors import CheckpointError, CorruptError, FormatVersionError
from shared.media import video as video_module
from shared.shardset.index import open_index
from shared.shardset.manifest import read_manifest
from train import load_checkpoint

SESSIONS = Path(__file__).parent / "frozen" / "sessions"
FROZEN = Path(__file__).parent / "frozen" / "v2"
SETS = ("touching", "overlapping", "strided")


@pytest.fixture(params=SETS)
def name(request) -> str:
    return request.param


@pytest.fixture
def old(name, tmp_path) -> Path:
    """A copy of a frozen set."""
    return Path(shutil.copytree(FROZEN / name, tmp_path / "set"))


def old_recipe(name: str) -> dict[str, Any]:
    return json.loads((FROZEN / name / "manifest.json").read_text())["recipe"]


def old_rows(name: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Read each row of a frozen set that starts at a multiple of the duration, by stock readers."""
    window = old_recipe(name)["window"]
    stride_s = window["stride_s"] or window["duration_s"]
    rows = {}
    for path in sorted((FROZEN / name).glob("*.index")):
        content = path.read_bytes()
        magic, version, length = struct.unpack_from("<8sII", content)
        assert (magic, version) == (b"VRCINDEX", 2)
        header = json.loads(content[16 : 16 + length])
        start = -(-(16 + length) // 64) * 64

        def array(
            key: str, header: Any = header, content: bytes = content, start: int = start
        ) -> np.ndarray:
            dtype, shape, offset = header["arrays"][key]
            count = int(np.prod(shape))
            return np.frombuffer(content, f"<{dtype}", count, start + offset).reshape(shape)

        stem = path.name.removesuffix(".index")
        tars = {
            column: tar_members(FROZEN / name / f"{stem}.{column}.tar")
            for column in ("vision_left", "vision_right", "audio", "text")
        }
        numbers = {
            key: zipped_array(FROZEN / name / f"{stem}.{column}.zarr.zip", key)
            for column, key in (("proprio", "proprio"), ("proprio", "touch"), ("dmel", "dmel"))
        }
        for row, (session, number) in enumerate(
            zip(array("session"), array("window"), strict=True)
        ):
            segment = number * stride_s / window["duration_s"]
            if abs(segment - round(segment)) > 1e-6:
                continue
            key = f"{header['sessions'][session]}/{number:06d}"
            rows[header["sessions"][session], round(segment)] = {
                "present": int(array("present")[row]),
                "coverage": array("coverage")[row],
                "error_s": array("vision_left.error_s")[row],
                **{c: members_of(members, key) for c, members in tars.items()},
                **{n: values[row] for n, values in numbers.items()},
            }
    assert rows
    return rows


def members_of(members: dict[str, bytes], key: str) -> bytes | None:
    return next((content for name, content in members.items() if name.startswith(f"{key}.")), None)


def zipped_array(path: Path, name: str) -> np.ndarray:
    """Read an uncompressed Zarr array of one row per chunk."""
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read(f"{name}/zarr.json"))
        shape, dtype = meta["shape"], meta["data_type"]
        inner = "/".join("0" for _ in shape[1:])
        rows = [
            np.frombuffer(archive.read(f"{name}/c/{row}/{inner}"), dtype).reshape(shape[1:])
            for row in range(shape[0])
        ]
    return np.array(rows)


def new_rows(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Read each row of an upgraded set by stock readers and the index."""
    rows = {}
    for entry in read_manifest(folder).shards:
        index = open_index(folder / entry.index_file, sha256=entry.index_sha256)
        files = {column: folder / header["file"] for column, header in index.columns.items()}
        tars = {c: tar_members(file) for c, file in files.items() if file.suffix == ".tar"}
        arrays = {
            c: zipped_array(file, c.rpartition(".")[2])
            for c, file in files.items()
            if file.suffix == ".zip"
        }
        for row in range(index.num_samples):
            session, _, segment = index.key(row).rpartition("/")
            rows[session, int(segment)] = {
                "present": set(index.present_streams(row)),
                "error_s": index.arrays["vision_left.error_s"][row],
                # A file that is kept has the names of the windows that its members were.
                **{c: members_of(members, index.key(row)) for c, members in tars.items()},
                **{c: values[row] for c, values in arrays.items()},
            }
    return rows


def test_every_value_is_in_the_upgraded_set(name, old):
    upgrade_set(old)
    before, after = old_rows(name), new_rows(old)
    assert after.keys() == before.keys()
    streams = ("vision_left", "vision_right", "audio", "touch", "proprio")
    for key, row in before.items():
        assert after[key]["present"] >= {
            s for i, s in enumerate(streams) if row["present"] >> i & 1
        }
        np.testing.assert_array_equal(after[key]["error_s"], row["error_s"])
        for column in ("vision_left", "vision_right", "audio"):
            assert after[key][column] == row[column]
        for column, array in (("touch", "touch"), ("proprio", "proprio"), ("audio.dmel", "dmel")):
            np.testing.assert_array_equal(after[key][column], row[array], err_msg=f"{key}")


def test_every_token_is_in_the_upgraded_set_with_a_time_of_its_own(name, old):
    upgrade_set(old)
    before, after = old_rows(name), new_rows(old)
    for stream in ("internal", "external"):
        expected: dict[str, list[tuple[float, int]]] = {}
        for (session, _), row in sorted(before.items()):
            tokens = json.loads(row["text"])[stream] if row["text"] else {"ids": [], "time_s": []}
            pairs = zip(tokens["time_s"], tokens["ids"], strict=True)
            expected.setdefault(session, []).extend(pairs)
        found: dict[str, list[tuple[float, int]]] = {session: [] for session in expected}
        for (session, _), row in sorted(after.items()):
            member = row[f"{stream}_text"]
            values = json.loads(member) if member else {"ids": [], "time_s": [], "event_s": []}
            found[session] += zip(values["event_s"], values["ids"], strict=True)
            assert all(a < b for a, b in zip(values["time_s"], values["time_s"][1:], strict=False))
        if name == "touching":  # of the others, tokens may belong to segments that are not there
            assert found == expected
        else:
            for session, tokens in expected.items():
                assert set(found[session]) <= set(tokens)
                assert found[session][:1] == tokens[:1]  # it has its event's time and segment


def test_an_upgraded_set_is_whole_and_has_nothing_of_the_old_one(old):
    before = {path.name for path in old.iterdir()}
    summary = upgrade_set(old)
    assert not verify_set(old).problems
    manifest = read_manifest(old)
    assert summary.num_segments == sum(entry.num_samples for entry in manifest.shards)
    files = {path.name for path in old.iterdir()}
    assert not [f for f in before & files if f.endswith((".index", ".zarr.zip", ".text.tar"))]
    assert upgrade_set(old) is None  # a second time there is nothing to do


def test_videos_of_windows_that_touch_stay_the_same_files(tmp_path):
    old = Path(shutil.copytree(FROZEN / "touching", tmp_path / "set"))
    before = {path.name: path.stat().st_ino for path in old.glob("*.vision_*.tar")}
    summary = upgrade_set(old)
    assert {path.name: path.stat().st_ino for path in old.glob("*.vision_*.tar")} == before
    assert summary.kept_files == len(before)


def test_a_build_onto_an_upgraded_set_decodes_no_picture(tmp_path, monkeypatch):
    old = Path(shutil.copytree(FROZEN / "touching", tmp_path / "set"))
    write_recipe(tmp_path / "recipe.yaml", "touching")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a picture is decoded")

    monkeypatch.setattr("shared.kinds.video.read_frames", refuse)
    assert video_module.read_frames is not refuse
    output = shards(tmp_path / "recipe.yaml", old)
    assert not re.search(r"[1-9]\d* (rows )?made", output), output
    assert "is up to date" in shards(tmp_path / "recipe.yaml", old)
    fresh = tmp_path / "fresh"
    monkeypatch.undo()
    shards(tmp_path / "recipe.yaml", fresh)
    shards(tmp_path / "recipe.yaml", old, "--compact")
    assert column_bytes(old) == column_bytes(fresh)
    keys = ("recipe", "statistics", "counts", "fields", "tokenizer")
    one, other = (json.loads((f / "manifest.json").read_text()) for f in (old, fresh))
    assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


def write_recipe(path: Path, name: str) -> None:
    path.write_text(yaml.safe_dump(convert_recipe(old_recipe(name)).as_json()))


def shards(recipe: Path, out: Path, *options: str) -> str:
    words = ["--recipe", recipe, "--sessions", SESSIONS, "--out", out, "--workers", 0]
    arguments = ["shards", *map(str, words), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def column_bytes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each column file, by its name without the generation."""
    return {
        re.sub(r"\.g\d+\.", ".", path.name): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".tar", ".zip")
    }


def test_the_command_says_what_it_did_and_opens_no_decoder(tmp_path, monkeypatch):
    old = shutil.copytree(FROZEN / "strided", tmp_path / "set")
    monkeypatch.delattr("shared.media.yuv._open_decoder")
    monkeypatch.delattr("shared.kinds.video.read_frames")
    result = CliRunner().invoke(cli, ["upgrade", str(old)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "4 segments in 3 shards" in result.output
    assert "10 members copied, 14 rewritten" in result.output
    again = CliRunner().invoke(cli, ["upgrade", str(old)], catch_exceptions=False)
    assert "is up to date" in again.output


def test_upgrading_no_set_is_one_clear_line(tmp_path):
    result = CliRunner().invoke(cli, ["upgrade", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "no such shard set" in result.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("end", [".index", "manifest.json"])
def test_a_corrupt_set_is_not_upgraded_and_not_changed(tmp_path, end):
    old = Path(shutil.copytree(FROZEN / "touching", tmp_path / "set"))
    path = next(p for p in sorted(old.iterdir()) if p.name.endswith(end))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    with pytest.raises(CorruptError):
        upgrade_set(old)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_a_corrupt_member_stops_the_upgrade_before_anything_changes(tmp_path):
    old = Path(shutil.copytree(FROZEN / "touching", tmp_path / "set"))
    path = old / "train-000000.audio.tar"
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[0].offset_data
    content = bytearray(path.read_bytes())
    content[offset + 50] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="checksum"):
        upgrade_set(old)
    assert upgrade_module.is_format_2((old / "manifest.json").read_bytes())


def test_readers_refuse_an_old_set_with_the_command_that_upgrades_it(tmp_path):
    old = shutil.copytree(FROZEN / "touching", tmp_path / "set")
    with pytest.raises(FormatVersionError, match=r"python -m preprocess upgrade .*set"):
        read_manifest(old)


def test_checkpoints_of_before_are_refused_with_one_line():
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(FROZEN / "train_step_4.pt")
    assert "\n" not in str(error.value)
    assert "fix:" in str(error.value)
