"""Sets with each codec of vision: built, changed from one to another, read by stock readers."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.oracles import (
    build,
    check_set,
    set_contents,
    set_keys,
    tar_members,
    tiny_recipe,
    write_tiny_session,
)

from shared.kinds.video import decode_pictures
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest

FORMAT_PAGE = Path(__file__).resolve().parents[4] / "docs" / "format.md"

CODECS = ("h264", "mjpeg", "yuv420", "raw")
EXTENSIONS = {"h264": "h264", "mjpeg": "mjpeg", "yuv420": "npy", "raw": "npy"}
VISION = {"vision_left", "vision_right"}


def recipe_of(codec: str):
    return tiny_recipe(video={"codec": codec})


@pytest.fixture(scope="module")
def sessions(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sessions")
    for name in ("ann", "cat"):
        write_tiny_session(root / name, 2.0, has_right=name == "cat")
    return root


@pytest.fixture(scope="module")
def sets(sessions, tmp_path_factory) -> dict[str, Path]:
    """A set of each codec."""
    found = {codec: tmp_path_factory.mktemp(codec) / "set" for codec in CODECS}
    for codec, out in found.items():
        build(sessions, out, recipe_of(codec))
    return found


def videos(out: Path) -> dict[str, bytes]:
    """Members of the left eye, by name."""
    tars = sorted(out.glob("*.vision_left.tar"))
    return {name: content for tar in tars for name, content in tar_members(tar).items()}


@pytest.mark.parametrize("codec", CODECS)
def test_members_have_the_codecs_name_and_the_manifest_says_what_they_hold(sets, codec):
    field = read_manifest(sets[codec]).fields["vision_left"]
    assert field["codec"] == EXTENSIONS[codec]
    assert field["shape"] == ([5, 48, 32] if codec == "yuv420" else [5, 32, 32, 3])
    assert list(videos(sets[codec])) == [
        f"{key}.vision_left.{EXTENSIONS[codec]}" for key in set_keys(sets[codec])
    ]
    check_set(sets[codec])


@pytest.mark.parametrize("codec", ["h264", "mjpeg"])
def test_ffmpeg_reads_the_members_of_a_set(sets, codec):
    for member in videos(sets[codec]).values():
        with av.open(io.BytesIO(member), format=codec) as container:
            stock = np.array([frame.to_ndarray() for frame in container.decode(video=0)])
        ours = decode_pictures(member, spec=recipe_of(codec).video, out=np.zeros_like(stock))
        np.testing.assert_array_equal(ours, stock)
        assert stock.shape == (5, 48, 32)


@pytest.mark.parametrize("codec", ["yuv420", "raw"])
def test_numpy_reads_the_members_of_a_set(sets, codec):
    for member in videos(sets[codec]).values():
        stock = np.load(io.BytesIO(member))
        ours = decode_pictures(member, spec=recipe_of(codec).video, out=np.zeros_like(stock))
        np.testing.assert_array_equal(ours, stock)


@pytest.mark.parametrize("codec", CODECS)
def test_the_specifications_reader_reads_the_pictures_of_any_codec(sets, monkeypatch, codec):
    monkeypatch.chdir(sets[codec])
    section = FORMAT_PAGE.read_text(encoding="utf-8").split("\n## Tar columns\n")[1]
    found: dict = {}
    exec(section.split("```python\n")[1].split("```")[0], found)
    members = tar_members(sets[codec] / "train-000000.vision_left.tar")
    assert list(found["pictures"]) == list(members)
    for name, pictures in found["pictures"].items():
        ours = np.zeros_like(pictures)
        decode_pictures(members[name], spec=recipe_of(codec).video, out=ours)
        np.testing.assert_array_equal(ours, pictures)


@pytest.mark.parametrize(("before", "after"), [("mjpeg", "h264"), ("h264", "yuv420")])
def test_another_codec_rewrites_only_vision(sessions, sets, tmp_path, before, after):
    out = tmp_path / "set"
    build(sessions, out, recipe_of(before))
    summary = build(sessions, out, recipe_of(after))
    assert {name for task in summary.plan.tasks for name in task.columns} == VISION
    assert all(
        set(task.kept) == set(columns_of(recipe_of(after))) - VISION for task in summary.plan.tasks
    )
    assert set_contents(out) == set_contents(sets[after])


@pytest.mark.parametrize(
    ("codec", "changed"), [("h264", VISION), ("mjpeg", set()), ("yuv420", set()), ("raw", set())]
)
def test_the_quantizer_matters_to_h264_alone(sessions, tmp_path, codec, changed):
    build(sessions, tmp_path / "set", recipe_of(codec))
    recipe = tiny_recipe(video={"codec": codec, "qp": 30})
    summary = build(sessions, tmp_path / "set", recipe)
    assert {name for task in summary.plan.tasks for name in task.columns} == changed


@pytest.mark.parametrize("codec", ["h264", "yuv420"])
def test_a_new_session_leaves_the_bytes_of_the_others(sessions, tmp_path, codec):
    """A shard that grows has the members that it had."""
    few = tmp_path / "sessions"
    write_tiny_session(few / "ann", 2.0)
    build(few, tmp_path / "set", recipe_of(codec))
    before = videos(tmp_path / "set")
    write_tiny_session(few / "cat", 2.0, has_right=True)
    build(few, tmp_path / "set", recipe_of(codec))
    assert videos(tmp_path / "set").items() >= before.items()
    assert set_keys(tmp_path / "set") == [f"{s}/00000{i}" for s in ("ann", "cat") for i in (0, 1)]
