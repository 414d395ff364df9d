"""Files of predictions: events across windows, files of older models, a full disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.trained_models import RECIPE, TOKENIZER

from shared.config import make_section
from shared.errors import EngineError
from shared.media.tokenizer import train_tokenizer
from shared.recipe import Recipe
from train.config import Head
from train.data.batch import WindowShapes
from train.infer.predictions import PredictionWriter, WindowPrediction


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("follows", "texts"), [(True, ["reach"]), (False, ["re", "ach"])])
def test_a_text_continues_over_a_border_only_if_no_tick_is_left_out(tmp_path, follows, texts):
    recipe = make_section(Recipe, RECIPE)
    head = Head.INTERNAL_TEXT
    with PredictionWriter(
        tmp_path,
        heads=[head],
        num_ticks=80,
        recipe=recipe,
        shapes=WindowShapes.from_recipe(recipe),
        tokenizer=train_tokenizer([], vocab_size=264),
    ) as writer:
        for first, text in ((38, "re"), (40, "ach")):
            tokens = np.array(train_tokenizer([], vocab_size=264).encode(text)[1:])
            writer.add(
                WindowPrediction(
                    first_tick=first,
                    follows=follows,
                    times_s=np.arange(first, first + len(tokens)) / 10,
                    tokens={head: tokens},
                    levels=None,
                    poses=None,
                )
            )
    assert [e["text"] for e in read_lines(tmp_path / "internal_text.jsonl")] == texts


def open_writer(out, heads):
    recipe = make_section(Recipe, RECIPE)
    return PredictionWriter(
        out,
        heads=heads,
        num_ticks=80,
        recipe=recipe,
        shapes=WindowShapes.from_recipe(recipe),
        tokenizer=TOKENIZER,
    )


def test_predictions_of_an_older_model_are_deleted_and_other_files_stay(tmp_path):
    with open_writer(tmp_path, tuple(Head)):
        pass
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "video.zarr").mkdir()
    with open_writer(tmp_path, (Head.INTERNAL_TEXT,)):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"internal_text.jsonl", "notes.txt", "video.zarr"}


def test_a_disk_that_takes_no_sound_is_a_clear_error(tmp_path, file_limit):
    def write():
        with open_writer(tmp_path, (Head.AUDIO,)):
            file_limit(4096)  # 8 s of silence are 128 kB

    with pytest.raises(EngineError, match=r"audio\.wav: the sound can't be written .* MiB"):
        write()
    file_limit(None)
