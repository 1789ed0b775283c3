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
from lit_lora.train.run_log import RunLog, loss_figure, plot_losses, read_metrics
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
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 60)] + [{"step": 10, "validation_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width > 600
    for colour in ((0x9E, 0xCA, 0xE1), (0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01)):
        assert (np.abs(pixels.astype(int) - colour).sum(axis=1) < 30).sum() > 20


def figure_of(losses, *, validation=(), **options):
    """The figure of a run with these losses per step, validated from step 0 on every ten steps."""
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    records += [{"step": 10 * number, "validation_loss": loss} for number, loss in enumerate(validation)]
    return loss_figure(records, title="Run mine", unit="row", **options)


def labels(axes):
    """The labels at the axis of losses, as far as they are in sight."""
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    return [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize(
    ("losses", "validation", "scale"),
    [
        ([3 * 0.98**step for step in range(250)], [3.0, 0.02], "log"),
        ([1.9 - step / 500 for step in range(100)], [1.9, 1.7], "linear"),
        ([2.1, 1.4, 0.9], [], "linear"),
        ([3.0, 0.2, 0.02], [], "log"),
        ([2.0], [2.0, 1.9, 0.1], "log"),
        ([3 * 0.95**step for step in range(100)] + [0.0] * 100, [3.0, 0.1, 0.0], "symlog"),
        ([3 * 0.95**step for step in range(100)] + [1e-9], [], "symlog"),
        ([2.0, 1.0, 0.0], [], "linear"),
        ([0.0] * 50, [0.0], "linear"),
        ([2.0, 0.1, -1.0], [], "linear"),
    ],
)
def test_losses_that_fall_by_ten_times_have_a_logarithmic_axis(losses, validation, scale):
    (axes,) = figure_of(losses, validation=validation).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    for loss in [*losses, *validation]:
        assert low <= loss <= high


def test_a_logarithmic_axis_has_plain_numbers_and_a_place_for_zero():
    falling = [3 * 0.95**step for step in range(60)]
    (axes,) = figure_of(falling).axes
    assert labels(axes) == ["0.2", "0.5", "1", "2"]
    (axes,) = figure_of([*falling, 0.0, 0.0, 0.0]).axes
    assert labels(axes)[:2] == ["0", "0.05"]


def test_an_axis_of_small_changes_does_not_begin_at_zero():
    (axes,) = figure_of([1.9, 1.8, 1.7]).axes
    assert axes.get_ylim()[0] > 1.6
    (axes,) = figure_of([1.9, 0.8, 0.7]).axes
    assert axes.get_ylim()[0] == 0


def test_smoothing_grows_with_the_run_and_begins_where_it_does():
    noisy = [2.0 + (-1) ** step for step in range(400)]
    short, long = figure_of(noisy[:20]).axes[0], figure_of(noisy).axes[0]
    assert [line.get_label() for line in short.get_lines()] == ["training, each step"]
    each_step, smoothed = long.get_lines()
    assert list(each_step.get_ydata()) == noisy
    assert smoothed.get_ydata()[0] == noisy[0]
    assert np.ptp(smoothed.get_ydata()[10:]) < 0.2


def test_the_plot_names_its_run_and_marks_the_best_step():
    figure = figure_of([2.0, 1.0], validation=[2.0, 1.5], best_step=10)
    assert figure.axes[0].get_title() == "Run mine"
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "best weights, step 10"


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
