"""Shards compared with sessions read directly, and with stock readers."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset as wds
import xarray
import zarr
from helpers import sets as tiny_sets
from helpers.oracles import psnr_db
from helpers.sets import make_config, open_windows, read_sample

from shared.errors import MachineError
from train.data.pixels import IMAGENET_STD, normalized_frames
from train.data.session_source import SessionSource
from train.data.shard_source import OpenShards, ShardSource

NUMBERS = ("audio", "touch", "proprio")
TEXTS = ("internal_text", "external_text")
VISION = ("vision_left", "vision_right")


def by_key(source):
    return {source.key(*location): location for location in tiny_sets.sample_locations(source)}


def open_pair(shards, sessions, recipe, config=None):
    """Open a set, and its sessions directly."""
    source = ShardSource(shards)
    direct = SessionSource(sessions, recipe=recipe or source.recipe, split="train")
    return open_windows(source, config), open_windows(direct, config)


@pytest.fixture(scope="module")
def raw_pair(tiny_sessions, raw_set):
    return open_pair(raw_set, tiny_sessions, None)


def test_shards_and_sessions_hold_the_same_keys(raw_pair):
    shards, sessions = raw_pair
    assert sorted(by_key(shards)) == sorted(by_key(sessions))
    assert len(by_key(shards)) >= 20


def test_sessions_train_the_tokenizer_that_the_shards_hold(raw_pair):
    shards, sessions = raw_pair
    assert shards.tokenizer.sha256 == sessions.tokenizer.sha256


@pytest.mark.parametrize("pixels", ["yuv420", "rgb"])
@pytest.mark.parametrize(
    "window", [{"duration_s": 1.0, "stride_s": 0.2}, {"duration_s": 0.4}, {"duration_s": 1.8}]
)
def test_raw_shards_equal_sessions_to_the_bit(tiny_sessions, raw_set, pixels, window):
    config = make_config(window=window)
    shards, sessions = open_pair(raw_set, tiny_sessions, None, config)
    locations = by_key(sessions)
    valid = dict.fromkeys((*VISION, *NUMBERS, *TEXTS), 0)
    for key, location in by_key(shards).items():
        ours, our_texts = read_sample(shards, location, pixels=pixels)
        theirs, their_texts = read_sample(sessions, locations[key], pixels=pixels)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=f"{key} {name}")
        for name, text in our_texts.items():
            for one, other in zip(text, their_texts[name], strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{key} {name}")
        for name in valid:
            valid[name] += ours[f"{name}_valid"].sum()
    assert all(valid.values()), valid


LEAST_PSNR_DB = {"h264": 34, "mjpeg": 34, "yuv420": np.inf}


@pytest.fixture(scope="module", params=list(LEAST_PSNR_DB))
def codec_pair(request, tiny_sessions, tmp_path_factory):
    recipe = tiny_sets.set_recipe(video={"codec": request.param})
    out = tiny_sets.build_set(tiny_sessions, tmp_path_factory.mktemp("set") / "shards", recipe)
    config = make_config(modalities=VISION, heads=("audio",))
    return open_pair(out, tiny_sessions, recipe, config)


@pytest.mark.parametrize("pixels", ["yuv420", "rgb"])
def test_pictures_of_shards_are_those_of_sessions_up_to_the_codecs_loss(codec_pair, pixels):
    shards, sessions = codec_pair
    locations = by_key(sessions)
    codec = shards.recipe.streams[VISION[0]].codec
    least_db = LEAST_PSNR_DB[codec] if pixels == "yuv420" else 30
    for key, location in by_key(shards).items():
        ours, theirs = (
            read_sample(s, p, pixels=pixels)[0]
            for s, p in ((shards, location), (sessions, locations[key]))
        )
        for eye in VISION:
            assert psnr_db(ours[eye], theirs[eye]) >= least_db, (key, eye)
            np.testing.assert_array_equal(ours[f"{eye}_valid"], theirs[f"{eye}_valid"])


def test_both_forms_of_pixels_are_the_same_to_the_model(codec_pair):
    """Up to rounding to 8 bits, which libjpeg does on the way as well."""
    shards, _ = codec_pair
    limit = 5 if shards.recipe.streams[VISION[0]].codec == "mjpeg" else 0.75
    num_compared = 0
    for location in tiny_sets.sample_locations(shards):
        planes, rgb = (read_sample(shards, location, pixels=form)[0] for form in ("yuv420", "rgb"))
        valid = planes[f"{VISION[0]}_valid"]
        of_planes, of_rgb = (
            normalized_frames(torch.from_numpy(form[VISION[0]][valid])[None], torch.float32)
            for form in (planes, rgb)
        )
        if valid.any():
            assert (of_planes - of_rgb).abs().max() * 255 * max(IMAGENET_STD) < limit
            num_compared += 1
    assert num_compared > 5


# --- parts of segments -----------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["h264", "mjpeg", "yuv420", "raw"])
@pytest.mark.parametrize("pixels", ["yuv420", "rgb"])
def test_a_part_of_a_segment_has_the_pictures_of_the_whole(tiny_sessions, tmp_path, codec, pixels):
    """Windows of 0.2 s are one frame of the two in a segment of 0.4 s, here of ten in 2 s."""
    recipe = tiny_sets.set_recipe(
        segment={"duration_s": 2.0}, video={"codec": codec, "rate_hz": 5.0}
    )
    shards = ShardSource(tiny_sets.build_set(tiny_sessions, tmp_path / "set", recipe))
    options = {"modalities": VISION[:1], "heads": ("audio",)}
    whole, parts = (
        open_windows(shards, make_config(window={"duration_s": s}, **options)) for s in (2.0, 0.4)
    )
    locations = by_key(parts)
    num_valid = 0
    for key, location in by_key(whole).items():
        session, tick = key.split("@")
        picture, _ = read_sample(whole, location, pixels=pixels)
        for part in range(5):
            found = locations[f"{session}@{int(tick) + 4 * part}"]
            own, _ = read_sample(parts, found, pixels=pixels)
            frames = slice(2 * part, 2 * part + 2)
            np.testing.assert_array_equal(own[VISION[0]], picture[VISION[0]][frames])
            num_valid += own[f"{VISION[0]}_valid"].sum()
    assert num_valid > 10


def test_a_tick_sees_the_newest_frame_of_a_faster_video(tiny_sessions, tmp_path):
    recipe = tiny_sets.set_recipe(
        video={"codec": "raw", "rate_hz": 30.0}, shard={"target_bytes": 1 << 20}
    )
    shards = ShardSource(tiny_sets.build_set(tiny_sessions, tmp_path / "set", recipe))
    options = {"modalities": VISION[:1], "heads": ("audio",)}
    source = open_windows(shards, make_config(window={"duration_s": 0.8}, **options))
    with tarfile.open(tmp_path / "set" / "train-000000.vision_left.tar") as tar:
        stored = np.concatenate([np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar][:2])
    assert source.key(0, 0) == "ann@0"
    own, _ = read_sample(source, (0, 0), pixels="rgb")
    np.testing.assert_array_equal(own["vision_left"], stored[::3])


# --- open files ------------------------------------------------------------------------------


def num_open(source):
    return sum(len(opened.files) for opened in source._open._shards.values())


@pytest.mark.parametrize("limit", [1, 16, 40])
def test_open_columns_stay_below_a_share_of_the_processs_limit(tiny_set, monkeypatch, limit):
    source = open_windows(ShardSource(tiny_set))
    locations = tiny_sets.sample_locations(source)
    expected = [read_sample(source, location)[0] for location in locations]
    source.close()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(OpenShards, "_alive", weakref.WeakSet([source._open]))
    for location, whole in zip(locations, expected, strict=True):
        own, _ = read_sample(source, location)
        for name, values in whole.items():
            np.testing.assert_array_equal(own[name], values)
        assert num_open(source) <= max(7, limit // 2)  # those of one shard, at least
    assert num_open(source) > 0


def test_all_sets_of_a_process_share_the_limit(tiny_set, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(OpenShards, "_alive", weakref.WeakSet())
    sources = [open_windows(ShardSource(tiny_set)) for _ in range(3)]
    for source in sources:
        for location in tiny_sets.sample_locations(source):
            read_sample(source, location)
    assert sum(map(num_open, sources)) <= 32


_FEW_DESCRIPTORS = """
import os, resource, sys
from helpers.sets import make_loader, take
from shared import storage
from shared.errors import MachineError
storage.LOCAL_RETRY = storage.RetryPolicy(attempts=2, first_wait_s=0.001)
loader = make_loader(sys.argv[1], max_bad_fraction=0.0)
limit = len(os.listdir("/proc/self/fd")) - 1 + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    print(len(take(loader, 8)), "batches")
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("num_spare", "expected"),
    [
        (0, r"the process may open \d+ files; .*fix: raise `ulimit -n`"),
        (5, "8 batches"),
        (9, "8 batches"),
    ],
)
def test_few_descriptors_are_lived_with_or_named_and_no_sample_is_corrupt(
    tiny_set, num_spare, expected
):
    env = {**os.environ, "PYTHONPATH": str(Path(tiny_sets.__file__).parents[1])}
    command = [sys.executable, "-c", _FEW_DESCRIPTORS, str(tiny_set), str(num_spare)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert re.search(expected, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_reads_that_fail_for_a_while_make_no_sample_corrupt(
    tiny_set, monkeypatch, quick_retries, number
):
    loader = tiny_sets.make_loader(tiny_set, max_bad_fraction=0.0)
    expected = tiny_sets.take(tiny_sets.make_loader(tiny_set), 2)
    calls, pread = itertools.count(), os.pread

    def fails_sometimes(*args):
        if next(calls) % 3 < 2:
            raise OSError(number, os.strerror(number))
        return pread(*args)

    monkeypatch.setattr(os, "pread", fails_sometimes)
    tiny_sets.assert_same(tiny_sets.take(loader, 2), expected)


def test_a_disk_that_keeps_failing_ends_the_run_with_its_name_and_no_corrupt_sample(
    tiny_set, monkeypatch, quick_retries
):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    loader = tiny_sets.make_loader(tiny_set, max_bad_fraction=1.0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(MachineError, match=r"train-\d+\.\S+: Input/output error.*fix: look for"):
        tiny_sets.take(loader, 1)


# --- stock readers ---------------------------------------------------------------------------

leaky_webdataset = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
"""It leaves the files that it has read to the garbage collector."""


@pytest.fixture(scope="module")
def segments(raw_set):
    """Open windows of one segment each, so that window w is row w of its shard."""
    return open_windows(ShardSource(raw_set), make_config(window={"duration_s": 0.4}))


def join_columns(*tars):
    """Samples of one shard, {key: {extension: bytes}}: nothing but webdataset."""
    samples = {}
    for tar in tars:
        for member in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            sample = samples.setdefault(member["__key__"], {})
            sample.update({k: v for k, v in member.items() if not k.startswith("__")})
    return samples


def rows_of(source):
    """(shard, row, index, member bytes as webdataset joins them) of every segment."""
    for shard, entry in enumerate(source._entries):
        stem = source.manifest.root / entry.name
        names = (*VISION, "audio", *TEXTS)
        samples = join_columns(*(f"{stem}.{name}.tar" for name in names))
        index = source.shard(shard).index
        for row in range(entry.num_samples):
            yield shard, row, index, samples.get(index.key(row), {})


@leaky_webdataset
def test_stock_webdataset_gives_the_pictures(segments):
    num_found = 0
    for shard, row, index, members in rows_of(segments):
        ours, _ = read_sample(segments, (shard, row), pixels="rgb")
        for stream in VISION:
            member = members.get(f"{stream}.npy")
            assert (member is not None) == index.is_present(row, stream), index.key(row)
            valid = ours[f"{stream}_valid"]
            assert valid.any() == (member is not None)
            if member is not None:
                np.testing.assert_array_equal(
                    np.load(io.BytesIO(member))[valid], ours[stream][valid]
                )
                num_found += 1
    assert num_found > 10


@leaky_webdataset
def test_stock_webdataset_gives_the_text(segments):
    num_tokens = 0
    for shard, row, index, members in rows_of(segments):
        _, texts = read_sample(segments, (shard, row))
        for name in TEXTS:
            member = members.get(f"{name}.json")
            assert (member is not None) == index.is_present(row, name) == texts[name].is_valid.any()
            if member is not None:
                values = json.loads(member)
                assert values["ids"] == texts[name].ids.tolist()
                assert values["event_s"] == texts[name].event_s.tolist()
                num_tokens += len(values["ids"])
    assert num_tokens > 20


@leaky_webdataset
def test_stock_soundfile_opens_the_sound(segments):
    for _, row, index, members in rows_of(segments):
        assert ("audio.wav" in members) == index.is_present(row, "audio"), index.key(row)
        if "audio.wav" in members:
            samples, rate_hz = soundfile.read(io.BytesIO(members["audio.wav"]))
            assert (len(samples), rate_hz) == (3200, 8000)


@pytest.mark.parametrize(
    ("column", "array", "field"),
    [
        ("proprio", "proprio", "proprio"),
        ("touch", "touch", "touch"),
        ("audio.dmel", "dmel", "audio"),
    ],
)
def test_stock_zarr_and_xarray_give_the_numbers(segments, raw_set, column, array, field):
    num_valid = 0
    for shard, entry in enumerate(segments._entries):
        store = zarr.storage.ZipStore(raw_set / f"{entry.name}.{column}.zarr.zip", mode="r")
        with store:
            by_zarr = np.asarray(zarr.open_group(store, mode="r")[array][...])
            with xarray.open_zarr(store, consolidated=False, mask_and_scale=False) as dataset:
                by_xarray = dataset[array].to_numpy()
                assert dataset[array].dims[0] == "segment"
        np.testing.assert_array_equal(by_zarr, by_xarray)
        for row in range(entry.num_samples):
            ours, _ = read_sample(segments, (shard, row))
            valid = ours[f"{field}_valid"]
            num_valid += valid.sum()
            np.testing.assert_array_equal(by_zarr[row][valid], ours[field][valid])
            if field != "audio":
                np.testing.assert_array_equal(~np.isnan(by_zarr[row]).any(axis=1), valid)
    assert num_valid > 100
