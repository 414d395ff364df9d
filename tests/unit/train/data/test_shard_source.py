"""Shards compared with sessions read directly, and with stock readers."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
import webdataset as wds
import xarray
import zarr
from helpers import sets as tiny_sets
from helpers.oracles import psnr_db
from helpers.sets import read_sample

from shared.recipe import Stream
from train.data.pixels import IMAGENET_STD, normalized_frames
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource

NUMBERS = ("audio", "touch", "proprio")
VISION = ("vision_left", "vision_right")


def by_key(source):
    return {source.key(*location): location for location in tiny_sets.sample_locations(source)}


@pytest.fixture(scope="module")
def raw_pair(tiny_sessions, raw_set):
    shards = ShardSource(raw_set)
    return shards, SessionSource(tiny_sessions, recipe=shards.recipe, split="train")


def test_shards_and_sessions_hold_the_same_keys(raw_pair):
    shards, sessions = raw_pair
    assert sorted(by_key(shards)) == sorted(by_key(sessions))
    assert len(by_key(shards)) > 20


def test_sessions_train_the_tokenizer_that_the_shards_hold(raw_pair):
    shards, sessions = raw_pair
    assert shards.tokenizer.sha256 == sessions.tokenizer.sha256


@pytest.mark.parametrize(
    ("field", "pixels"),
    [*itertools.product(VISION, ["yuv420", "rgb"]), *((field, "rgb") for field in NUMBERS)],
)
def test_raw_shards_equal_sessions_to_the_bit(raw_pair, field, pixels):
    shards, sessions = raw_pair
    locations = by_key(sessions)
    num_valid = 0
    for key, location in by_key(shards).items():
        ours, _ = read_sample(shards, location, [field], with_text=False, pixels=pixels)
        theirs, _ = read_sample(sessions, locations[key], [field], with_text=False, pixels=pixels)
        np.testing.assert_array_equal(ours[field], theirs[field], err_msg=key)
        np.testing.assert_array_equal(ours[f"{field}_valid"], theirs[f"{field}_valid"], key)
        num_valid += ours[f"{field}_valid"].sum()
    assert num_valid > 0


def test_text_and_times_of_shards_equal_the_sessions(raw_pair):
    shards, sessions = raw_pair
    locations = by_key(sessions)
    for key, location in by_key(shards).items():
        assert shards.start_s(*location) == sessions.start_s(*locations[key])
        assert shards.present(*location) == sessions.present(*locations[key])
        text = read_sample(shards, location, [])[1]
        assert text == read_sample(sessions, locations[key], [])[1]


LEAST_PSNR_DB = {"mjpeg": 30, "h264": 30, "yuv420": np.inf}
"""Of planes against the sessions' own; what is left is the codec's loss."""


@pytest.fixture(scope="module", params=LEAST_PSNR_DB)
def codec_pair(request, tiny_sessions, tmp_path_factory):
    """Shards of a codec, and the sessions that they were made of."""
    recipe = tiny_sets.set_recipe(vision={"codec": request.param})
    out = tiny_sets.build_set(tiny_sessions, tmp_path_factory.mktemp("set") / "shards", recipe)
    shards = ShardSource(out)
    return shards, SessionSource(tiny_sessions, recipe=recipe, split="train")


@pytest.mark.parametrize("pixels", ["yuv420", "rgb"])
def test_pictures_of_shards_are_those_of_sessions_up_to_the_codecs_loss(codec_pair, pixels):
    shards, sessions = codec_pair
    locations = by_key(sessions)
    least_db = LEAST_PSNR_DB[shards.recipe.vision.codec] if pixels == "yuv420" else 30
    for key, location in by_key(shards).items():
        ours, theirs = (
            read_sample(s, p, VISION, with_text=False, pixels=pixels)[0]
            for s, p in ((shards, location), (sessions, locations[key]))
        )
        for eye in VISION:
            assert psnr_db(ours[eye], theirs[eye]) >= least_db, (key, eye)
            np.testing.assert_array_equal(ours[f"{eye}_valid"], theirs[f"{eye}_valid"])


def test_both_forms_of_pixels_are_the_same_to_the_model(codec_pair):
    """Up to rounding to 8 bits, which libjpeg does on the way as well."""
    shards, _ = codec_pair
    limit = 5 if shards.recipe.vision.codec == "mjpeg" else 0.75
    for location in tiny_sets.sample_locations(shards):
        of_planes, of_rgb = (
            normalized_frames(
                torch.from_numpy(
                    read_sample(shards, location, VISION[:1], with_text=False, pixels=form)[0][
                        VISION[0]
                    ]
                )[None],
                torch.float32,
            )
            for form in ("yuv420", "rgb")
        )
        if VISION[0] in shards.present(*location):
            assert (of_planes - of_rgb).abs().max() * 255 * max(IMAGENET_STD) < limit


def test_a_stream_that_a_sample_lacks_is_written_as_zero_and_invalid(raw_pair):
    shards, _ = raw_pair
    for location in tiny_sets.sample_locations(shards):
        sample, text = read_sample(shards, location)
        present = shards.present(*location)
        for stream in (*VISION, *NUMBERS):
            if stream not in present:
                assert not sample[stream].any()
                assert not sample[f"{stream}_valid"].any()
        assert (text is None) == (not {"internal_text", "external_text"} & set(present))


# --- stock readers ---------------------------------------------------------------------------

leaky_webdataset = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
"""It leaves the files that it has read to the garbage collector."""


def join_columns(*tars):
    """Samples of one shard, {key: {extension: bytes}}: nothing but webdataset."""
    samples = {}
    for tar in tars:
        for member in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            sample = samples.setdefault(member["__key__"], {})
            sample.update({k: v for k, v in member.items() if not k.startswith("__")})
    return samples


def rows_of(source):
    """(shard, row, key, member bytes as webdataset joins them) of every sample."""
    for shard, entry in enumerate(source._entries):
        stem = source.manifest.root / entry.name
        names = (*VISION, "audio", "text")
        samples = join_columns(*(f"{stem}.{name}.tar" for name in names))
        for row in range(entry.num_samples):
            key = source.key(shard, row)
            yield shard, row, key, samples.get(key, {})


@leaky_webdataset
def test_stock_webdataset_gives_the_pictures(raw_set):
    source = ShardSource(raw_set)
    num_found = 0
    for shard, row, key, members in rows_of(source):
        ours, _ = read_sample(source, (shard, row), VISION, with_text=False, pixels="rgb")
        for stream in VISION:
            member = members.get(f"{stream}.npy")
            assert (member is not None) == (stream in source.present(shard, row)), key
            if member is not None:
                np.testing.assert_array_equal(np.load(io.BytesIO(member)), ours[stream])
                num_found += 1
    assert num_found > 10


@leaky_webdataset
def test_stock_webdataset_gives_the_text(raw_set):
    source = ShardSource(raw_set)
    for shard, row, key, members in rows_of(source):
        _, text = read_sample(source, (shard, row), [])
        assert (text is None) == ("text.json" not in members), key
        if text is not None:
            values = json.loads(members["text.json"])
            assert tuple(values["internal"]["ids"]) == text.internal.ids
            assert tuple(values["external"]["time_s"]) == text.external.time_s
            assert [e["text"] for e in values["events"]] == [e.text for e in text.events]


@leaky_webdataset
def test_stock_soundfile_opens_the_sound(raw_set):
    source = ShardSource(raw_set)
    for shard, row, key, members in rows_of(source):
        assert ("audio.wav" in members) == (Stream.AUDIO in source.present(shard, row)), key
        if "audio.wav" in members:
            samples, rate_hz = soundfile.read(io.BytesIO(members["audio.wav"]))
            assert (len(samples), rate_hz) == (8000, 8000)


@pytest.mark.parametrize(
    ("column", "array", "field"),
    [
        ("proprio", "proprio", "proprio"),
        ("proprio", "touch", "touch"),
        ("dmel", "dmel", "audio"),
    ],
)
def test_stock_zarr_and_xarray_give_the_numbers(raw_set, column, array, field):
    source = ShardSource(raw_set)
    for shard, entry in enumerate(source._entries):
        store = zarr.storage.ZipStore(raw_set / f"{entry.name}.{column}.zarr.zip", mode="r")
        with store:
            by_zarr = np.asarray(zarr.open_group(store, mode="r")[array][...])
            with xarray.open_zarr(store, consolidated=False, mask_and_scale=False) as dataset:
                by_xarray = dataset[array].to_numpy()
                assert dataset[array].dims[0] == "sample"
        np.testing.assert_array_equal(by_zarr, by_xarray)
        for row in range(entry.num_samples):
            ours, _ = read_sample(source, (shard, row), [field], with_text=False)
            valid = ours[f"{field}_valid"]
            np.testing.assert_array_equal(by_zarr[row][valid], ours[field][valid])
            if field != "audio":
                np.testing.assert_array_equal(~np.isnan(by_zarr[row]).any(axis=1), valid)
