"""Checkpoints from untrusted sources run no code, and need no more memory than their file."""

from __future__ import annotations

import os
import pickle  # noqa: TID251  (a hostile file)
import zipfile

import pytest
import torch
from helpers.models import MANY_STREAMS, is_equal, make_batch, make_config, make_model
from helpers.models import RECIPE as MODEL_RECIPE

from shared.config import make_section
from shared.errors import CheckpointError
from shared.media.tokenizer import train_tokenizer
from shared.recipe import Recipe
from train.checkpoints import FORMAT_VERSION
from train.config import as_train_config
from train.data.pixels import to_model_inputs
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes
from train.trained_model import load_trained_model

RECIPE = make_section(
    Recipe,
    {"video": {"size": 16}, "audio": {"dmel": {"channels": 8}}, "text": {"vocab_size": 264}},
)
CONFIG = as_train_config(
    {"model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 1, "vision_layers": 0}}
)
SHAPES = WindowShapes.from_recipe(RECIPE, CONFIG)
STATISTICS = {"proprio": {"count": 5, "mean": [0.5] * 20, "std": [2.0] * 20}}
CPU = torch.device("cpu")


class RunsCommand:
    """Runs a shell command if it is unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def good_state():
    torch.manual_seed(0)
    model = MultiModalCreature(CONFIG, SHAPES)
    model.set_statistics(STATISTICS)
    return {
        "format_version": FORMAT_VERSION,
        "step": 7,
        "saved_at": 0.0,
        "model": model.state_dict(),
        "config": CONFIG.model_dump(mode="json"),
        "shapes": SHAPES.as_json(),
        "extra": {
            "recipe": RECIPE.as_json(),
            "tokenizer": train_tokenizer([], vocab_size=264).json,
        },
    }


def save(path, **changes):
    torch.save({**good_state(), **changes}, path)
    return path


def expect_refusal(path, words):
    with pytest.raises(CheckpointError, match=words) as found:
        load_trained_model(path, device=CPU)
    assert str(path) in str(found.value)


def test_a_valid_checkpoint_yields_its_model_in_evaluation_mode(tmp_path):
    creature = load_trained_model(save(tmp_path / "k.pt"), device=CPU)
    expected = good_state()["model"]
    assert all(torch.equal(w, expected[n]) for n, w in creature.model.state_dict().items())
    assert (creature.step, creature.model.training) == (7, False)


def test_a_checkpoint_keeps_the_scales_of_its_sensors(tmp_path):
    creature = load_trained_model(save(tmp_path / "k.pt"), device=CPU)
    expected = [1.0] * 10 + [2.0] * 10  # angles have a scale of their own
    assert creature.model.target_std["animation"].tolist() == expected
    assert creature.baselines.objective.std["animation"].tolist() == expected


@pytest.mark.parametrize("world", ["many", "alone"])
def test_any_declared_streams_come_back_from_a_checkpoint(tmp_path, world):
    streams = MANY_STREAMS if world == "many" else {"arm": MANY_STREAMS["arm"]}
    weights = {name: 1 for name, spec in streams.items() if spec["kind"] != "video"}
    config = make_config(loss_weights=weights)
    recipe = Recipe.model_validate({**MODEL_RECIPE, "streams": streams})
    shapes = WindowShapes.from_recipe(recipe, config)
    model = make_model(config, shapes)
    model.set_statistics({"arm": {"count": 3, "mean": [0.5] * 6, "std": [2.0] * 6}})
    path = save(
        tmp_path / "k.pt",
        model=model.state_dict(),
        config=config.model_dump(mode="json"),
        shapes=shapes.as_json(),
        extra={**good_state()["extra"], "recipe": recipe.as_json()},
    )
    inputs = to_model_inputs(make_batch(shapes))
    with torch.no_grad():
        assert is_equal(load_trained_model(path, device=CPU).model(inputs), model(inputs))


@pytest.mark.parametrize("place", ["model", "config", "extra", "step"])
def test_a_checkpoint_that_would_run_a_command_is_not_opened(tmp_path, place):
    trap = RunsCommand(f"touch {tmp_path}/caught")
    expect_refusal(save(tmp_path / "k.pt", **{place: trap}), "can run code")
    assert not (tmp_path / "caught").exists()


@pytest.mark.parametrize("kind", ["pickle", "old torch"])
def test_a_bare_pickle_that_would_run_a_command_is_not_opened(tmp_path, kind):
    path, state = tmp_path / "k.pt", {"step": RunsCommand(f"touch {tmp_path}/caught")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    expect_refusal(path, "not a checkpoint")
    assert not (tmp_path / "caught").exists()


def test_a_compressed_file_is_not_opened(tmp_path):
    whole = save(tmp_path / "whole.pt", padding=torch.zeros(30_000_000))
    with (
        zipfile.ZipFile(whole) as old,
        zipfile.ZipFile(tmp_path / "k.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert (tmp_path / "k.pt").stat().st_size < 1_000_000
    expect_refusal(tmp_path / "k.pt", "fill the memory")


def expanded(tensor):
    """Return a small tensor that claims to be large."""
    return tensor.flatten()[:1].expand(100_000, 100_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: {n: expanded(w) for n, w in weights.items()},
        lambda weights: {n: w.to("meta") for n, w in weights.items()},
        lambda weights: {n: w.to_sparse() for n, w in weights.items()},
        lambda weights: {n: w.int() for n, w in weights.items()},
        lambda weights: {n: w.tolist() for n, w in weights.items()},
    ],
    ids=["larger than the file", "meta", "sparse", "integers", "lists"],
)
def test_weights_that_are_not_plain_tensors_are_refused(tmp_path, make):
    path = save(tmp_path / "k.pt", model=make(good_state()["model"]))
    expect_refusal(path, "not plain tensors, or larger than the file")


def with_model(**changes):
    config = good_state()["config"]
    return {"config": {**config, "model": {**config["model"], **changes}}}


def with_baselines(**parts):
    return {"extra": {**good_state()["extra"], "baselines": {"counts": {}, **parts}}}


def with_trigrams(keys, counts):
    return with_baselines(trigrams={"internal_text": [keys, counts]})


def vast(value):
    """Return one number that claims to be many; using it would fill any memory."""
    return torch.full((1,), value).expand(10**11)


def with_pairs(pairs):
    return with_baselines(level_pairs={"audio": pairs})


def with_stream(name, **changes):
    shapes = SHAPES.as_json()
    streams = {**shapes["streams"], name: {**shapes["streams"][name], **changes}}
    return {"shapes": {**shapes, "streams": streams}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (with_model(num_layers=10**9), "more layers than it has weights"),
        (with_model(vision_layers=10**9), "more layers than it has weights"),
        (with_model(hidden_dim=8 * 10**12), "does not make a model"),
        (with_model(hidden_dim=32), "size mismatch"),
        ({"config": [1, 2]}, "its config is a list"),
        ({"config": {"model": [1]}}, "does not make a model"),
        ({"step": "x"}, "its step is 'x'"),
        ({"format_version": None}, "its format_version is None"),
        ({"extra": [1]}, "its extra is a list"),
        ({"shapes": {**SHAPES.as_json(), "num_ticks": 10**9}}, "recipe: windows of another length"),
        (with_stream("audio", rate_hz=25.0), "reads and predicts audio .8 channels .* at 25 Hz"),
        (with_stream("touch", kind="taste"), "does not make a model"),
        ({"shapes": {"ticks": 1}}, "does not make a model"),
        ({"extra": {**good_state()["extra"], "recipe": {"video": {"size": "large"}}}}, "size"),
        ({"extra": {**good_state()["extra"], "tokenizer": "{}"}}, "not a tokenizer"),
        ({"extra": {**good_state()["extra"], "baselines": {"counts": 3}}}, "does not make"),
        (with_baselines(counts={"internal_text": [0.0] * 264}), "has no counts"),
        (with_baselines(counts={"internal_text": torch.full((264,), -1.0)}), "negative"),
        (with_pairs(torch.zeros(3)), r"audio's bigram has counts of shape \[3\]"),
        (with_pairs([1, 2]), "has no counts"),
        (with_pairs(torch.zeros(8, 16, 16).to_sparse()), "not numbers"),
        (with_pairs(vast(1.0).view(10**9, 10, 10)), "counts of shape"),
        (with_trigrams(vast(0), vast(1)), "not plain int64 tensors"),
        (with_trigrams(torch.ones(1), torch.ones(1)), "not plain int64 tensors"),
        (with_trigrams(torch.tensor([2, 1]), torch.tensor([1, 1])), "do not increase"),
        (with_trigrams(torch.tensor([264**3]), torch.tensor([1])), "within 264 tokens"),
        (with_trigrams(torch.tensor([1]), torch.tensor([0])), "do not fit its counts"),
        (with_trigrams(torch.tensor([1, 2]), torch.tensor([1])), "do not fit its counts"),
        (with_baselines(trigrams={"internal_text": 3}), "does not make a model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_that_does_not_make_a_model_is_refused(tmp_path, changes, words):
    expect_refusal(save(tmp_path / "k.pt", **changes), words)
