"""The run log: terminal, TensorBoard and the quarantine file."""

from __future__ import annotations

import io
import json
import re
import resource

import numpy as np
import pytest
import torch
from helpers.training import (
    EndlessLoader,
    corrupt_sample,
    make_batch,
    make_config,
    make_trainer,
    read_events,
    text_of,
    with_nan,
)
from rich.console import Console
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.summary.writer import event_file_writer

from shared.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    EngineError,
    TooManyCorruptSamplesError,
)
from train.loop.run_log import QUARANTINE_NAME, default_run_name

LOSSES = {
    "loss_total",
    "loss_internal_text",
    "loss_external_text",
    "loss_audio",
    "loss_animation",
}
NAMES = {
    *LOSSES,
    "samples_per_sec",
    "memory_allocated_mb",
    "data_wait_fraction",
    "lr",
    "grad_norm",
    "skipped_samples",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def values_of(folder, name):
    return [event.value for event in read_events(folder).Scalars(name)]


def test_tensorboard_has_every_metric_under_its_name(tmp_path):
    config = make_config(tmp_path, eval_interval=2)
    summary = make_trainer(config, val_loader=[make_batch(0)]).train()
    waits = {f"data_wait_ms_p{q}" for q in (50, 95, 99)}
    held_out = {f"val/{name}" for name in (*LOSSES, "skipped_samples")}
    expected = NAMES | held_out | waits
    found = read_events(summary.log_dir).Tags()["scalars"]
    tags = {name for name in found if not name.startswith("grad_norm/")}
    assert tags == expected | {"time_to_first_batch_s", "skipped_steps"}


def test_every_chart_of_tensorboards_custom_scalars_has_curves(tmp_path):
    config = make_config(tmp_path, eval_interval=2)
    events = read_events(make_trainer(config, val_loader=[make_batch(0)]).train().log_dir)
    (event,) = events.Tensors("custom_scalars__config__")
    charts = [
        chart
        for category in Layout.FromString(event.tensor_proto.string_val[0]).category
        for chart in category.chart
    ]
    tags = events.Tags()["scalars"]
    empty = [
        c.title for c in charts if not any(map(re.compile("|".join(c.multiline.tag)).search, tags))
    ]
    assert len(charts) > 10
    assert empty == []


def test_the_terminal_shows_the_same_names_and_numbers_as_tensorboard(tmp_path):
    screen = io.StringIO()
    summary = make_trainer(make_config(tmp_path), console=Console(file=screen)).train()
    header, *lines = screen.getvalue().splitlines()
    names = header.split()[1:]
    assert set(names) == NAMES
    numbers = [float(text) for text in lines[-1].split()[1:]]
    assert numbers == pytest.approx([values_of(summary.log_dir, n)[-1] for n in names], rel=2e-3)


def test_the_terminal_has_one_aligned_line_per_log(tmp_path):
    screen = io.StringIO()
    make_trainer(make_config(tmp_path), console=Console(file=screen)).train()
    header, *lines = screen.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["2/6", "4/6", "6/6"]
    assert {len(line) for line in lines} == {len(header)}


def test_held_out_losses_are_in_the_terminal_too(tmp_path):
    screen = io.StringIO()
    config = make_config(tmp_path, eval_interval=3)
    make_trainer(config, val_loader=[make_batch(0)], console=Console(file=screen)).train()
    lines = [line for line in screen.getvalue().splitlines() if "held out" in line]
    assert ["step 3:" in lines[0], "step 6:" in lines[1], len(lines)] == [True, True, 2]
    assert all(f"val/{name} " in line for line in lines for name in LOSSES)


def test_a_resumed_run_hides_the_curves_behind_its_checkpoint(tmp_path, monkeypatch):
    # Event files of one second are sorted by the process's count of writers, as text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    config = make_config(tmp_path, log_interval=1, save_interval=3)
    make_trainer(config).train()
    trainer = make_trainer(config)
    trainer.load_checkpoint(tmp_path / "checkpoints/model_step_3.pt")
    events = read_events(trainer.train().log_dir)
    assert [event.step for event in events.Scalars("loss_total")] == [1, 2, 3, 4, 5, 6]


def test_a_run_from_another_ones_checkpoint_leaves_its_curves_alone(tmp_path):
    first = make_trainer(make_config(tmp_path / "a")).train()
    before = values_of(first.log_dir, "loss_total")
    config = make_config(tmp_path / "b", max_steps=8, log_dir=str(tmp_path / "a" / "runs"))
    trainer = make_trainer(config, run_name=None)
    trainer.load_checkpoint(tmp_path / "a" / "checkpoints" / "model_final.pt")
    assert trainer.train().log_dir != first.log_dir
    assert values_of(first.log_dir, "loss_total") == before


def test_a_refused_position_opens_no_log(tmp_path):
    first = make_trainer(make_config(tmp_path)).train()
    before = sorted(first.log_dir.iterdir())
    trainer = make_trainer(make_config(tmp_path, max_steps=8), [make_batch(0)], run_name=None)
    with pytest.raises(CheckpointError, match="kind of loader"):
        trainer.load_checkpoint(first.checkpoint)
    assert sorted(first.log_dir.iterdir()) == before


def test_logged_losses_are_means_since_the_last_log(tmp_path):
    every = make_trainer(make_config(tmp_path / "a", log_interval=1)).train()
    third = make_trainer(make_config(tmp_path / "b", log_interval=3)).train()
    singles = values_of(every.log_dir, "loss_audio")
    means = np.reshape(singles, (2, 3)).mean(axis=1)
    assert values_of(third.log_dir, "loss_audio") == pytest.approx(means, rel=1e-6)
    assert every.first_losses["loss_audio"] == pytest.approx(np.mean(singles[:5]), rel=1e-6)
    assert third.last_losses["loss_audio"] == pytest.approx(means[-1], rel=1e-6)


def test_corrupt_samples_are_counted_and_quarantined(tmp_path):
    first, second, third = map(corrupt_sample, range(3))
    loader = EndlessLoader(skipped={1: [first], 4: [second, first, third]})
    config = make_config(tmp_path)
    config["data"]["max_bad_fraction"] = 1
    summary = make_trainer(config, loader).train()
    lines = (summary.log_dir / QUARANTINE_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "split": "train", **first},
        {"step": 4, "split": "train", **second},
        {"step": 4, "split": "train", **third},
    ]
    assert summary.skipped_samples == 3
    assert values_of(summary.log_dir, "skipped_samples") == [1, 1, 3]


def test_corrupt_samples_are_named_in_tensorboard(tmp_path):
    loader = EndlessLoader(skipped={1: [corrupt_sample(3)]})
    summary = make_trainer(make_config(tmp_path), loader).train()
    text = text_of(summary.log_dir, "skipped_samples")
    assert all(str(value) in text for value in corrupt_sample(3).values())


def test_corrupt_held_out_samples_are_counted_and_quarantined_at_each_evaluation(tmp_path):
    skipped = [[], [corrupt_sample(0)], [corrupt_sample(1), corrupt_sample(2)]]
    held_out = [{**make_batch(i), "skipped": each} for i, each in enumerate(skipped)]
    config = make_config(tmp_path, eval_interval=4)
    config["data"]["max_bad_fraction"] = 1
    summary = make_trainer(config, val_loader=held_out).train()
    lines = (summary.log_dir / QUARANTINE_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "split": "val", **corrupt_sample(n)} for step in (4, 6) for n in range(3)
    ]
    assert values_of(summary.log_dir, "val/skipped_samples") == [3, 3]
    assert (summary.skipped_val_samples, summary.skipped_samples) == (3, 0)


def test_too_many_corrupt_held_out_samples_stop_the_run(tmp_path):
    held_out = [
        {**make_batch(0), "skipped": [*map(corrupt_sample, range(3))]}
    ]  # more than 1 % of 200
    with pytest.raises(TooManyCorruptSamplesError, match=r"3 of 2 stored segments.*crc differs"):
        make_trainer(make_config(tmp_path), val_loader=held_out).evaluate()


def test_the_count_of_corrupt_samples_survives_a_resume(tmp_path):
    loader = EndlessLoader(skipped={1: [corrupt_sample(3)]})
    first = make_trainer(make_config(tmp_path), loader).train()
    trainer = make_trainer(make_config(tmp_path, max_steps=8))
    trainer.load_checkpoint(first.checkpoint)
    assert trainer.train().skipped_samples == 1


def test_a_log_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"set training\.log_dir"):
        make_trainer(make_config(tmp_path)).train()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_continue_once_a_full_disk_has_space_again(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = {3: 64, 6: soft}

    def fill_and_free(index):
        if index in limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[index], hard))

    config = make_config(tmp_path, max_steps=9, log_interval=1)
    summary = make_trainer(config, EndlessLoader(on_batch=fill_and_free)).train()
    steps = {event.step for event in read_events(summary.log_dir).Scalars("loss_total")}
    assert {1, 2, 3} <= steps
    assert {8, 9} <= steps


def test_a_run_name_is_a_safe_folder_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "lab 3/ä.example.org")
    name = default_run_name()
    assert name.endswith("-lab-3")
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in name)


def test_the_error_that_stopped_a_run_is_in_tensorboard(tmp_path):
    batches = [with_nan(make_batch(index)) for index in range(12)]
    trainer = make_trainer(make_config(tmp_path, max_steps=30), batches)
    with pytest.raises(DivergedError):
        trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    text = text_of(folder, "health")
    assert "stopped" in text
    assert "steps in a row" in text


def test_an_out_of_memory_error_is_in_tensorboard_with_its_fix(tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    trainer = make_trainer(make_config(tmp_path))
    monkeypatch.setattr(trainer, "_predict", run_out)
    with pytest.raises(EngineError):
        trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    assert "Reduce data.batch_size and raise training.accumulation_steps" in text_of(
        folder, "health"
    )
