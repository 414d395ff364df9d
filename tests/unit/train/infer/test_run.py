"""``train infer``: predictions against the model itself, written files, metrics and messages."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
import zarr
from click.testing import CliRunner
from helpers.trained_models import (
    MODEL,
    RECIPE,
    TEXT_ONLY,
    TOKENIZER,
    make_checkpoint,
    make_session,
)

from shared.config import make_section
from shared.errors import CheckpointError, ConfigError, SessionError
from shared.recipe import Recipe
from train.__main__ import cli
from train.config import as_train_config
from train.data.pixels import to_model_inputs
from train.data.session_source import RealMultiModalDataset, real_data_collate_fn
from train.infer.predictions import PredictionWriter
from train.infer.run import infer, open_session, run_session, summarize_latencies
from train.infer.stream import Sampling, TickStream
from train.model.baselines import Baselines
from train.model.losses import compute_losses
from train.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")


def whole_windows(session, config):
    """All windows of a session as one training batch; its tokenizer is the checkpoint's."""
    tokenizer = session.parent / "tokenizer.json"
    tokenizer.write_text(TOKENIZER.json)
    dataset = RealMultiModalDataset(
        session, recipe=make_section(Recipe, RECIPE), config=config, tokenizer=tokenizer
    )
    return real_data_collate_fn([dataset[i] for i in range(len(dataset))])


def whole_window_losses(model, session):
    batch = whole_windows(session, model.config)
    with torch.no_grad():
        outputs = model(to_model_inputs(batch["inputs"]))
    losses = compute_losses(outputs, batch["targets"], batch["weight"], objective=model.objective)
    return {name: float(loss) for name, loss in losses.items()}


def whole_session_outputs(model, batch):
    """Outputs [windows, T, ...] of one pass over all windows in a row.

    Attention is written out, and limited to as many ticks as a window has.
    """
    num_ticks = model.shapes.num_ticks

    def attend(query, key, value, *, is_causal):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if is_causal:
            positions = torch.arange(query.shape[2])
            back = positions[:, None] - positions
            scores = scores.masked_fill((back < 0) | (back >= num_ticks), -torch.inf)
        return scores.softmax(-1) @ value

    in_a_row = {n: x.reshape(1, -1, *x.shape[2:]) for n, x in batch["inputs"].items()}
    with torch.no_grad(), mock.patch("train.model.blocks.F.scaled_dot_product_attention", attend):
        outputs = model(to_model_inputs(in_a_row))
    return {n: x.reshape(-1, num_ticks, *x.shape[2:]) for n, x in outputs.items()}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """One inference over two windows of all streams, and the same windows as a training batch."""
    folder = tmp_path_factory.mktemp("walk")
    session = make_session(folder / "s" / "walk", video=True)
    config = as_train_config({"model": MODEL})
    batch = whole_windows(session, config)
    model = make_checkpoint(folder / "k.pt")  # has the weights of the next one
    baselines = Baselines.fit([batch], objective=model.objective)
    model = make_checkpoint(folder / "k.pt", baselines=baselines.as_dict())
    metrics = infer(folder / "k.pt", session, folder / "out")
    return SimpleNamespace(
        session=session,
        out=folder / "out",
        model=model,
        batch=batch,
        baselines=baselines,
        metrics=metrics,
    )


def predicted_windows(session, folder, config=None):
    """Return the predictions of each window of a session, as the writer gets them."""
    make_checkpoint(folder / "k.pt", config)
    trained = load_trained_model(folder / "k.pt", device=torch.device("cpu"))
    stream = TickStream(trained, Sampling(), seed=0)
    with mock.patch.object(PredictionWriter, "add") as add:
        run_session(open_session(session, trained), trained, stream, out=folder / "out", seed=0)
    return [call.args[0] for call in add.call_args_list]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_streaming_one_window_gives_the_losses_of_training(tmp_path):
    model = make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "s" / "walk", duration_s=4.0, video=True)
    metrics = infer(tmp_path / "k.pt", session, tmp_path / "out")
    assert metrics["losses"] == pytest.approx(whole_window_losses(model, session), abs=1e-4)


def test_streaming_continues_over_the_borders_of_windows(walk):
    outputs = whole_session_outputs(walk.model, walk.batch)
    losses = compute_losses(
        outputs, walk.batch["targets"], walk.batch["weight"], objective=walk.model.objective
    )
    expected = {name: float(loss) for name, loss in losses.items()}
    assert walk.metrics["losses"] == pytest.approx(expected, abs=1e-4)


def test_streaming_text_gives_the_losses_of_densely_packed_windows(tmp_path):
    model = make_checkpoint(tmp_path / "k.pt", TEXT_ONLY)
    session = make_session(tmp_path / "s" / "walk")
    metrics = infer(tmp_path / "k.pt", session, tmp_path / "out")
    assert metrics["losses"] == pytest.approx(whole_window_losses(model, session), abs=1e-4)


def test_stock_readers_open_what_is_written(tmp_path):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "walk", duration_s=6.5)
    infer(tmp_path / "k.pt", session, tmp_path / "out")
    samples, rate_hz = soundfile.read(tmp_path / "out" / "audio.wav")
    assert (rate_hz, len(samples)) == (8000, 6.5 * 8000)
    assert soundfile.info(tmp_path / "out" / "audio.wav").subtype == "PCM_16"
    assert (samples[:800] == 0).all()
    assert np.abs(samples[800:]).max() > 0
    poses = zarr.open_group(tmp_path / "out" / "animation.zarr", mode="r")
    assert poses["proprio"].shape == (195, 20)
    np.testing.assert_allclose(poses["timestamp"][:], np.arange(195) / 30)
    np.testing.assert_array_equal(poses["valid"][:], np.arange(195) >= 3)
    np.testing.assert_array_equal(np.isfinite(poses["proprio"][:]).all(1), poses["valid"][:])
    assert np.abs(poses["proprio"][3:, :10]).max() <= np.pi
    for name in ("internal_text", "external_text"):
        events = read_lines(tmp_path / "out" / f"{name}.jsonl")
        assert all(0.1 <= e["timestamp"] < 6.5 for e in events), name
        assert all(set(e) == {"timestamp", "text", "tokens"} for e in events), name
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_ticks"], metrics["session"]) == (7, 65, "walk")


def test_written_values_are_predictions_for_the_next_tick(walk):
    outputs = whole_session_outputs(walk.model, walk.batch)
    expected = outputs["animation"].reshape(-1, 20).numpy()[:-3]  # the last tick is beyond the end
    poses = zarr.open_group(walk.out / "animation.zarr", mode="r")["proprio"][3:]
    np.testing.assert_allclose(np.cos(poses[:, :10]), np.cos(expected[:, :10]), atol=1e-4)
    np.testing.assert_allclose(poses[:, 10:], expected[:, 10:], atol=1e-4)
    tokens = outputs["external_text"].argmax(-1).flatten().tolist()[:-1]
    written = {}
    for event in read_lines(walk.out / "external_text.jsonl"):
        first = round(event["timestamp"] * 10) - 1
        written |= {first + i: token for i, token in enumerate(event["tokens"])}
    assert written == {tick: token for tick, token in enumerate(tokens) if token != 0}


def test_the_same_seed_draws_the_same_files_and_another_seed_draws_others(tmp_path):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "walk", duration_s=1.0)
    written = []
    for seed in (1, 1, 2):
        out = tmp_path / f"out{len(written)}"
        infer(tmp_path / "k.pt", session, out, temperature=1.0, top_k=20, top_p=0.9, seed=seed)
        names = ("audio.wav", "internal_text.jsonl", "external_text.jsonl")
        written.append([(out / name).read_bytes() for name in names])
    assert written[0] == written[1]
    assert all(one != other for one, other in zip(written[0], written[2], strict=True))


def test_an_absent_stream_has_a_reason_instead_of_a_loss(tmp_path):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "walk", duration_s=1.0, sound=False, text=False)
    metrics = infer(tmp_path / "k.pt", session, tmp_path / "out")
    absent = ("loss_audio", "loss_internal_text", "loss_external_text", "loss_total")
    assert [metrics["losses"][name] for name in absent] == [None] * 4
    assert metrics["losses"]["loss_animation"] > 0
    assert set(metrics["reasons"]) == set(absent)
    assert "audio.wav" in metrics["reasons"]["loss_audio"]
    assert metrics["streams"]["seen"] == ["proprio", "touch"]


def test_an_untrained_head_writes_nothing(tmp_path):
    make_checkpoint(tmp_path / "k.pt", TEXT_ONLY)
    session = make_session(tmp_path / "walk")
    metrics = infer(tmp_path / "k.pt", session, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    texts = ["external_text.jsonl", "internal_text.jsonl"]
    assert written == [*texts[:1], "index.html", *texts[1:], "metrics.json"]
    assert set(metrics["losses"]) == {"loss_total", "loss_internal_text", "loss_external_text"}


def test_baselines_of_the_checkpoint_are_scored_beside_the_model(walk):
    expected = walk.baselines.mean_losses([walk.batch])
    assert walk.metrics["baselines"] == pytest.approx(expected, rel=1e-5)
    rows = {f"{row['head']}/{row['baseline']}" for row in walk.metrics["comparison"]}
    assert rows == set(expected)


def test_latencies_are_percentiles_in_milliseconds(walk):
    latency = walk.metrics["tick_latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert latency["tick"] == 100


def test_latencies_are_summarized_as_numpy_does_without_the_first():
    later = np.random.default_rng(0).exponential(60.0, size=500)
    summary = summarize_latencies([1e4, *later], tick_ms=100.0)
    expected = {f"p{share}": np.quantile(later, share / 100) for share in (50, 95, 99)}
    assert summary == pytest.approx(
        {**expected, "first": 1e4, "tick": 100.0, "share_in_time": np.mean(later <= 100)}
    )


def test_progress_is_reported_after_each_window(tmp_path):
    make_checkpoint(tmp_path / "k.pt", TEXT_ONLY)
    session = make_session(tmp_path / "walk", duration_s=5.0)
    calls = []
    infer(tmp_path / "k.pt", session, tmp_path / "out", progress=lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("missing", ["recipe", "tokenizer"])
def test_a_checkpoint_without_recipe_or_tokenizer_is_refused(tmp_path, missing):
    make_checkpoint(tmp_path / "k.pt", **{missing: None})
    session = make_session(tmp_path / "walk", duration_s=1.0)
    with pytest.raises(CheckpointError, match=f"lacks its {missing}.*checkpoint_extra"):
        infer(tmp_path / "k.pt", session, tmp_path / "out")


@pytest.mark.parametrize("where", ["itself", "another", "sound"])
def test_predictions_never_overwrite_a_recording(tmp_path, where):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "itself")
    make_session(tmp_path / "another")
    (tmp_path / "sound").mkdir()
    shutil.copy(session / "audio.wav", tmp_path / "sound")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"could overwrite its .*; .* --out"):
        infer(tmp_path / "k.pt", session, tmp_path / where)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_predictions_can_overwrite_earlier_predictions(tmp_path):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "session")
    metrics = [infer(tmp_path / "k.pt", session, tmp_path / "out") for _ in range(2)]
    assert metrics[0]["losses"] == metrics[1]["losses"]


def test_a_folder_that_is_no_session_is_refused(tmp_path):
    make_checkpoint(tmp_path / "k.pt")
    with pytest.raises(SessionError, match="is not a session; fix: give a folder"):
        infer(tmp_path / "k.pt", tmp_path / "missing", tmp_path / "out")


def test_densely_packed_windows_do_not_follow_each_other(tmp_path):
    windows = predicted_windows(make_session(tmp_path / "walk"), tmp_path, TEXT_ONLY)
    assert [window.follows for window in windows] == [False, False]


def test_windows_of_ticks_follow_each_other(tmp_path):
    windows = predicted_windows(make_session(tmp_path / "walk", sound=False), tmp_path)
    assert [window.follows for window in windows] == [False, True]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_a_short_summary_or_all_figures(tmp_path, as_json):
    make_checkpoint(tmp_path / "k.pt")
    session = make_session(tmp_path / "walk", duration_s=1.0)
    paths = ["--checkpoint", str(tmp_path / "k.pt"), "--input", str(session)]
    options = ["--out", str(tmp_path / "out"), *(["--json"] if as_json else [])]
    printed = CliRunner().invoke(cli, ["infer", *paths, *options]).output
    metrics = json.loads((tmp_path / "out/walk/metrics.json").read_text())
    if as_json:
        assert json.loads(printed[printed.index("{") :]) == metrics
        return
    lines = printed.splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) <= 100
    assert str(tmp_path / "out/walk/index.html") in printed.replace("\n", "")
    for name, loss in metrics["losses"].items():
        (row,) = [line for line in lines if f" {name.removeprefix('loss_')} " in line]
        assert (" - " if loss is None else f" {loss:.4f} ") in row


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--seed", "4294967296"], ["--top-p", "0"]])
def test_the_command_refuses_a_number_out_of_range(tmp_path, options):
    paths = ["--checkpoint", str(tmp_path / "k.pt"), "--input", str(tmp_path)]
    result = CliRunner().invoke(cli, ["infer", *paths, *options])
    assert result.exit_code == 2
    assert "is not in the range" in result.output
