"""Shards against sessions read directly, and against readers that are not ours."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_sets
import torch
import webdataset as wds
import xarray
import zarr
from open_files import open_files, opens_noted, reads_counted
from oracles import open_indexes, psnr_db
from tiny_loaders import take

from shared import index
from shared.codec import encode_pictures
from shared.columns import ColumnFile
from shared.errors import CorruptError, ShardError
from shared.layout import member_limits
from shared.recipe import Stream
from train.data import reader
from train.data.dataset import SessionSource
from train.data.inputs import IMAGENET_STD, normalized_frames
from train.data.loader import Loader
from train.data.reader import ShardSource

NUMBERS = ("audio", "touch", "proprio")
VISION = ("vision_left", "vision_right")


def read_sample(source, place, streams=(*VISION, *NUMBERS), *, with_text=True, pixels="yuv420"):
    """A sample's arrays as the loader has them, and its text."""
    size = source.recipe.vision.size
    picture = {"yuv420": (size * 3 // 2, size), "rgb": (size, size, 3)}[pixels]
    shapes = {
        **dict.fromkeys(VISION, ((source.recipe.count(5), *picture), np.uint8)),
        "audio": ((source.recipe.count(50), source.recipe.mel.channels), np.uint8),
        "touch": ((source.recipe.count(30), 5), np.float32),
        "proprio": ((source.recipe.count(30), 20), np.float32),
    }
    out = {}
    for stream in streams:
        shape, dtype = shapes[stream]
        out[stream] = np.full(shape, 0xA5, dtype)  # what was there before must not matter
        out[f"{stream}_valid"] = np.ones(shape[0], bool)
    text = source.read_into(*place, out, with_text=with_text)
    return out, text


def by_key(source):
    return {source.key(*place): place for place in tiny_sets.places_of(source)}


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
    places = by_key(sessions)
    num_valid = 0
    for key, place in by_key(shards).items():
        ours, _ = read_sample(shards, place, [field], with_text=False, pixels=pixels)
        theirs, _ = read_sample(sessions, places[key], [field], with_text=False, pixels=pixels)
        np.testing.assert_array_equal(ours[field], theirs[field], err_msg=key)
        np.testing.assert_array_equal(ours[f"{field}_valid"], theirs[f"{field}_valid"], key)
        num_valid += ours[f"{field}_valid"].sum()
    assert num_valid > 0


def test_text_and_times_of_shards_equal_the_sessions(raw_pair):
    shards, sessions = raw_pair
    places = by_key(sessions)
    for key, place in by_key(shards).items():
        assert shards.start_s(*place) == sessions.start_s(*places[key])
        assert shards.present(*place) == sessions.present(*places[key])
        text = read_sample(shards, place, [])[1]
        assert text == read_sample(sessions, places[key], [])[1]


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
    places = by_key(sessions)
    least_db = LEAST_PSNR_DB[shards.recipe.vision.codec] if pixels == "yuv420" else 30
    for key, place in by_key(shards).items():
        ours, theirs = (
            read_sample(s, p, VISION, with_text=False, pixels=pixels)[0]
            for s, p in ((shards, place), (sessions, places[key]))
        )
        for eye in VISION:
            assert psnr_db(ours[eye], theirs[eye]) >= least_db, (key, eye)
            np.testing.assert_array_equal(ours[f"{eye}_valid"], theirs[f"{eye}_valid"])


def test_both_forms_of_pixels_are_the_same_to_the_model(codec_pair):
    """Up to rounding to 8 bits, which libjpeg does on the way as well."""
    shards, _ = codec_pair
    limit = 5 if shards.recipe.vision.codec == "mjpeg" else 0.75
    for place in tiny_sets.places_of(shards):
        of_planes, of_rgb = (
            normalized_frames(
                torch.from_numpy(
                    read_sample(shards, place, VISION[:1], with_text=False, pixels=form)[0][
                        VISION[0]
                    ]
                )[None],
                torch.float32,
            )
            for form in ("yuv420", "rgb")
        )
        if VISION[0] in shards.present(*place):
            assert (of_planes - of_rgb).abs().max() * 255 * max(IMAGENET_STD) < limit


def test_a_stream_that_a_sample_lacks_is_written_as_zero_and_invalid(raw_pair):
    shards, _ = raw_pair
    for place in tiny_sets.places_of(shards):
        sample, text = read_sample(shards, place)
        present = shards.present(*place)
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


# --- files -----------------------------------------------------------------------------------


def test_a_read_opens_only_the_columns_that_are_wanted(tiny_set, monkeypatch):
    opened = []
    init = ColumnFile.__init__

    def note(self, path):
        opened.append(path.name.partition(".")[2])
        init(self, path)

    monkeypatch.setattr(ColumnFile, "__init__", note)
    source = ShardSource(tiny_set)
    read_sample(source, (0, 0), ["audio"], with_text=False)
    assert opened == ["dmel.zarr.zip"]
    read_sample(source, (0, 0), [], with_text=True)
    assert opened == ["dmel.zarr.zip", "text.tar"]


def test_text_only_training_reads_the_text_and_nothing_else(tiny_set):
    source = ShardSource(tiny_set)
    indexes = [source.shard(shard).index for shard in range(len(source.shard_sizes))]
    text_bytes = sum(int(index.members("text").length.sum()) for index in indexes)
    config = tiny_sets.make_config(tiny_set, heads=tiny_sets.TEXT_HEADS, batch_size=5)
    assert source.shard_sizes.sum() % 5 == 0
    with opens_noted() as opened, reads_counted() as read:
        loader = Loader(ShardSource(tiny_set), config)
        assert len(take(loader, loader.batches_per_epoch)) > 3
    own = {Path(path).name for path in opened if Path(path).parent == tiny_set}
    columns = {name for name in own if name.startswith("train-") and not name.endswith(".index")}
    assert columns == {index.facts["columns"]["text"]["file"] for index in indexes}
    assert {name for name in own if name.startswith("val-")} == set()
    column_bytes = sum(n for path, n in read.items() if Path(path).name in columns)
    assert text_bytes <= column_bytes <= 1.1 * text_bytes


def test_few_shards_stay_open_and_what_was_closed_reads_again(tiny_set, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    source, plenty = ShardSource(tiny_set), ShardSource(tiny_set)
    places = tiny_sets.places_of(source)
    before = open_files(tiny_set)
    for place in (*places, *places[::5]):
        ours, text = read_sample(source, place)
        assert 0 < (open_files(tiny_set) - before).total() <= 2 * 6
        monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 64)
        theirs, same_text = read_sample(plenty, place)
        plenty.close()
        monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
        assert text == same_text
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


def test_shards_that_are_read_in_turn_are_hashed_once(tiny_set, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    num_hashed = []
    original = index.hashlib.sha256
    monkeypatch.setattr(index.hashlib, "sha256", lambda c: num_hashed.append(0) or original(c))
    source = ShardSource(tiny_set)
    num_shards = len(source.shard_sizes)
    before, num_before = open_files(tiny_set), len(num_hashed)
    source.will_read(range(num_shards), ["audio", "touch"])
    for _ in range(3):
        for shard in range(num_shards):
            read_sample(source, (shard, 0), ["audio"], with_text=False)
            assert (open_files(tiny_set) - before).total() <= 2
    assert len(num_hashed) - num_before == num_shards > 4


@pytest.mark.parametrize("codec", ["raw", "yuv420", "mjpeg", "h264"])
def test_no_member_is_longer_than_its_limit(tiny_sessions, tmp_path, codec):
    """Where the recipe decides the length, the limit is it."""
    recipe = tiny_sets.set_recipe(vision={"codec": codec, "quality": 100, "qp": 1})
    out = tiny_sets.build_set(tiny_sessions, tmp_path / "shards", recipe)
    longest = Counter()
    for _, each in open_indexes(out):
        for table in member_limits(recipe):
            length = int(each.members(table).length.max(initial=0))
            longest[table] = max(longest[table], length)
    for table, limit in member_limits(recipe).items():
        is_exact = not table.startswith("vision") and table != "text"
        assert longest[table] == limit if is_exact else 0 < longest[table] <= limit


@pytest.mark.parametrize("size", [16, 32, 224])
def test_noise_at_the_best_quality_is_far_below_the_limit(size):
    noise = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), np.uint8)
    for codec in ("raw", "yuv420", "mjpeg", "h264"):
        vision = {"codec": codec, "quality": 100, "qp": 1, "size": size, "rate_hz": 5}
        recipe = tiny_sets.set_recipe(vision=vision)
        limit = member_limits(recipe)["vision_left"]
        assert len(encode_pictures(noise, recipe=recipe.vision)) < limit / 2


def test_close_closes_and_a_dropped_source_leaves_nothing_open(tiny_set):
    before = open_files(tiny_set)
    source = ShardSource(tiny_set)
    expected, _ = read_sample(source, (0, 0))
    assert open_files(tiny_set) - before
    source.close()
    assert not open_files(tiny_set) - before
    again, _ = read_sample(source, (0, 0))
    np.testing.assert_array_equal(expected["audio"], again["audio"])
    del source
    assert not open_files(tiny_set) - before


def test_a_source_goes_to_another_process_with_its_files_open(tiny_set):
    source = ShardSource(tiny_set)
    expected, _ = read_sample(source, (1, 1))
    other = ForkingPickler.loads(ForkingPickler.dumps(source))
    found, _ = read_sample(other, (1, 1))
    np.testing.assert_array_equal(found["audio"], expected["audio"])


def test_a_process_forked_while_files_are_open_disturbs_nobody(tiny_set):
    source = ShardSource(tiny_set)
    places = tiny_sets.places_of(source)
    expected = [read_sample(source, place)[0]["audio"] for place in places]
    child = os.fork()
    if child == 0:  # reads the same descriptors at the same time, then ends without clean-up
        same = all(
            np.array_equal(read_sample(source, p)[0]["audio"], e)
            for p, e in zip(places, expected, strict=True)
        )
        os._exit(0 if same else 1)
    for place, values in zip(places, expected, strict=True):
        np.testing.assert_array_equal(read_sample(source, place)[0]["audio"], values)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("suffix", ["index", "dmel.zarr.zip"])
def test_a_missing_file_is_a_corrupt_sample(tiny_set, tmp_path, suffix):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    (shards / f"train-000000.{suffix}").unlink()
    with pytest.raises(CorruptError, match=rf"train-000000\.{suffix}"):
        read_sample(ShardSource(shards), (0, 0))


def test_an_index_with_other_rows_than_the_manifest_says_is_refused(tiny_set, tmp_path):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    tiny_sets.edit_manifest(shards, lambda v: v["shards"][0].update(num_samples=5))
    with pytest.raises(CorruptError, match="has 4 rows, manifest says 5; mend the set"):
        ShardSource(shards).key(0, 0)


def test_a_missing_set_says_how_to_make_it(tmp_path):
    with pytest.raises(ShardError, match="python -m preprocess shards --out"):
        ShardSource(tmp_path / "nothing")
