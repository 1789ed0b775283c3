from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_lora.errors import DiskError
from lit_lora.train.run_log import RunLog, plot_losses, read_metrics
from tests.train.tiny_run import adapted, make_rows, train


def test_a_run_records_each_step_and_validation_as_a_json_line(tmp_path):
    rows = make_rows(8)
    train(adapted(), tmp_path, rows=rows, validation=make_rows(3, seed=9), max_steps=4, eval_every=2, batch_size=8)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [(record["step"], "loss" in record) for record in records]
    assert steps == [(0, False), (1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]
    assert records[1].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "targets", "tokens_per_second"}
    assert records[1]["tokens"] == rows.token_counts.sum()
    assert records[1]["targets"] == rows.target_counts.sum()


def test_pain_12_values_that_are_not_finite_are_null(tmp_path):
    metrics = RunLog(tmp_path, tensorboard=False)
    metrics.record(1, loss=math.nan, grad_norm=math.inf, lr=0.1)
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.1}\n'


def test_records_after_the_checkpoint_are_dropped_and_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    metrics = RunLog(tmp_path, first_step=2, tensorboard=False)
    metrics.record(3, loss=0.5)
    metrics.close()
    assert [record["loss"] for record in read_metrics(path)] == [3, 2, 0.5]
    RunLog(tmp_path, tensorboard=False).close()
    assert path.read_text() == ""


def test_the_plot_is_an_image_with_curves(tmp_path):
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 30)] + [{"step": 10, "validation_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width > 600
    for colour in ((0x9E, 0xCA, 0xE1), (0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01)):
        assert (np.abs(pixels.astype(int) - colour).sum(axis=1) < 30).sum() > 20


def test_nothing_is_plotted_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_plot_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "loss.png").mkdir()
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'loss.png'}: the plot could not be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_said_plainly(tmp_path):
    metrics = RunLog(tmp_path, tensorboard=False)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, metrics._file.fileno())
    os.close(full)
    with pytest.raises(DiskError, match="no space left"):
        metrics.record(1, loss=1.0)
    with pytest.raises(DiskError, match="no space left"):
        metrics.close()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = RunLog(tmp_path)
    for step in (1, 2):
        metrics.record(step, loss=3.0 / step)
    metrics.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
