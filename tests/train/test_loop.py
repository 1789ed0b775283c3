"""The loop: which loss, over which rows, with which weights at the end."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lit_lora import peft
from lit_lora.data.batches import Batches, validation_batches
from lit_lora.errors import UsageError
from lit_lora.train.config import TrainConfig
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.progress import ProgressLines
from lit_lora.train.validation import validation_loss
from tests.train.tiny_run import (
    adapted,
    checkpoints,
    losses,
    make_rows,
    metrics,
    same,
    stored,
    tiny_model,
    train,
    unfrozen,
)

# A step of this optimizer subtracts the gradient itself.
BARE = {"optimizer": {"name": "sgd", "lr": 1.0}, "schedule": {"name": "constant", "warmup": 0}, "max_grad_norm": 1e9}


def plain_losses(model, rows) -> tuple[torch.Tensor, int]:
    """Sum of the token losses, and their count, one row at a time with whole logits."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, learn = torch.tensor(row.input_ids.tolist())[None], torch.tensor(row.loss_mask[1:])
        chosen = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")[learn]
        total, count = total + chosen.sum(), count + len(chosen)
    return total, count


@pytest.mark.parametrize(("budget", "portions"), [(10_000, 1), (60, 2), (1, 8)])
def test_pain_01_loss_and_gradients_do_not_depend_on_the_portions(tmp_path, budget, portions):
    rows, model = make_rows(8, seed=3), adapted(shaken=True)
    assert len(set(rows.token_counts.tolist())) > 4
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    total, count = plain_losses(model, rows)
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    batches = Batches(rows, batch_size=8, micro_batch_tokens=budget, seed=0)
    assert len(batches.step(0)) == portions
    train(model, tmp_path, batches=batches, max_steps=1, **BARE)
    assert losses(tmp_path)[0] == pytest.approx(total.item() / count, abs=1e-6)
    for name, value in peft.trainable_state(model).items():
        torch.testing.assert_close(before[name] - value, expected[name], atol=1e-6, rtol=1e-6)
        assert expected[name].abs().max() > 1e-4


def test_pain_01_the_last_partial_window_of_an_epoch_is_applied(tmp_path):
    rows = make_rows(11)
    train(adapted(), tmp_path, rows=rows, batch_size=8, epochs=1, save_every=1, keep_last=2)
    first, second = metrics(tmp_path)
    assert first["targets"] + second["targets"] == rows.target_counts.sum()
    assert not same(stored(tmp_path, 1), stored(tmp_path, 2))


def test_pain_01_validation_loss_is_weighted_by_tokens_whatever_the_portions():
    rows, model = make_rows(9, seed=4), adapted(shaken=True).eval()
    with torch.no_grad():
        total, count = plain_losses(model, rows)
    for budget in (1, 60, 10_000):
        loss = validation_loss(model, list(validation_batches(rows, budget)))
        assert loss == pytest.approx(total.item() / count, abs=1e-6)


def test_pain_02_a_batch_without_targets_counts_nothing(tmp_path):
    model = adapted(shaken=True)
    with_empty, without = make_rows(4, without_targets=(1, 3)), make_rows(4).subset(torch.tensor([0, 2]).numpy())
    train(model, tmp_path / "a", rows=with_empty, micro_batch_tokens=1, max_steps=1, **BARE)
    other = adapted(shaken=True)
    train(other, tmp_path / "b", rows=without, micro_batch_tokens=1, max_steps=1, **BARE)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-7)
    for name, value in peft.trainable_state(model).items():
        torch.testing.assert_close(value, peft.trainable_state(other)[name], atol=1e-6, rtol=1e-6)


def test_pain_02_a_step_without_targets_changes_nothing(tmp_path):
    model = adapted(shaken=True)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, tmp_path, rows=make_rows(4, without_targets=(0, 1, 2, 3)), max_steps=2)
    assert [(r["loss"], r["grad_norm"], r["targets"]) for r in metrics(tmp_path)] == [(0.0, 0.0, 0)] * 2
    assert same(before, peft.trainable_state(model))


def test_pain_08_every_adapter_tensor_gets_a_gradient_and_moves_within_two_steps(tmp_path):
    model = adapted()
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, tmp_path, max_steps=2)
    after = peft.trainable_state(model)
    assert len(after) == 2 * 2 * 7
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    moments = [name for name in stored(tmp_path, 2) if name.startswith("exp_avg_sq/")]
    assert len(moments) == len(after)
    assert all(stored(tmp_path, 2)[name].max() > 0 for name in moments)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (3, 2), (7, 4), (8, 4)])
def test_pain_13_each_row_is_visited_once_an_epoch(tmp_path, count, batch_size):
    visits: Counter[int] = Counter()

    class Counting(Batches):
        def step(self, step):
            micro_batches = super().step(step)
            visits.update(row for batch in micro_batches for row in batch.rows)
            return micro_batches

    rows = make_rows(count)
    batches = Counting(rows, batch_size=batch_size, micro_batch_tokens=30, seed=0)
    train(adapted(), tmp_path, batches=batches, batch_size=batch_size, epochs=3)
    assert visits == dict.fromkeys(range(count), 3)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_pain_43_a_handful_of_rows_trains(tmp_path, count):
    result = train(adapted(), tmp_path, rows=make_rows(count), batch_size=8, epochs=5)
    assert result.steps == 5
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_validation_does_not_disturb_training(tmp_path):
    rows, settings = make_rows(8), {"max_steps": 8, "seed": 5}
    train(adapted(dropout=0.2), tmp_path / "without", rows=rows, **settings)
    train(adapted(dropout=0.2), tmp_path / "with", rows=rows, validation=make_rows(3, seed=9), eval_every=1, **settings)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    train(adapted(dropout=0.2), tmp_path / "seed", rows=rows, max_steps=8, seed=6)
    assert losses(tmp_path / "seed") != losses(tmp_path / "with")  # so dropout was on


def test_pain_28_retention_keeps_the_last_and_the_best(tmp_path):
    seen: list[list[int]] = []

    def look(step: int) -> None:
        if step:
            seen.append(checkpoints(tmp_path))

    result = train(
        adapted(),
        tmp_path,
        rows=make_rows(4),
        validation=make_rows(4, stride=11),
        sample=look,
        eval_every=1,
        max_steps=20,
        keep_last=2,
        optimizer={"lr": 3e-2},
    )
    by_step = {r["step"]: r["validation_loss"] for r in metrics(tmp_path) if r.get("validation_loss") and r["step"]}
    assert result.best_step == min(by_step, key=by_step.__getitem__) < 18  # training on other rows made it worse
    assert checkpoints(tmp_path) == [result.best_step, 19, 20]
    for step, kept in enumerate(seen, 1):
        best = min(range(1, step + 1), key=by_step.__getitem__)
        assert kept == sorted({best, *range(max(1, step - 1), step + 1)})


def test_pain_29_the_model_ends_with_the_best_weights(tmp_path):
    validation, model = make_rows(4, stride=11), adapted()
    settings = {"rows": make_rows(4), "validation": validation, "eval_every": 1, "max_steps": 20}
    result = train(model, tmp_path, optimizer={"lr": 3e-2}, **settings)
    assert result.best_step < result.steps == 20
    assert same(
        peft.trainable_state(model), {k: v for k, v in stored(tmp_path, result.best_step).items() if "/" not in k}
    )
    assert validation_loss(model, list(validation_batches(validation, 48))) == pytest.approx(result.validation_loss)
    assert not model.training


def test_pain_29_patience_stops_a_run_that_gets_no_better(tmp_path):
    settings = {"rows": make_rows(4), "validation": make_rows(4, stride=11), "eval_every": 1, "max_steps": 40}
    settings |= {"optimizer": {"lr": 3e-2}, "patience": 3}
    result = train(adapted(), tmp_path, **settings)
    assert result.steps == result.best_step + 3 < 40
    # and a resumed run has no more of it
    again = train(adapted(), tmp_path, resume=True, **settings)
    assert (again.steps, again.best_step, again.validation_loss) == (
        result.steps,
        result.best_step,
        result.validation_loss,
    )


def test_the_loss_before_training_is_recorded_but_is_not_a_best(tmp_path):
    validation = make_rows(3, seed=9)
    expected = validation_loss(adapted(), list(validation_batches(validation, 48)))
    result = train(adapted(), tmp_path, validation=validation, max_steps=2, optimizer={"lr": 1e-6})
    assert metrics(tmp_path)[0] == {"step": 0, "validation_loss": expected}
    assert result.untrained_validation_loss == expected
    assert result.best_step in (1, 2)


def test_the_gradient_is_scaled_down_to_the_largest_norm(tmp_path):
    def moved(folder, max_grad_norm: float) -> float:
        model = adapted(shaken=True)
        before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
        train(model, tmp_path / folder, max_steps=1, **{**BARE, "max_grad_norm": max_grad_norm})
        moves = [value - before[name] for name, value in peft.trainable_state(model).items()]
        return float(torch.cat([move.flatten() for move in moves]).norm())

    full = metrics(tmp_path / "full")[0]["grad_norm"] if moved("full", 1e9) else 0.0
    assert moved("same", 1e9) == pytest.approx(full, rel=1e-4)
    assert moved("less", full / 10) == pytest.approx(full / 10, rel=1e-3)
    assert metrics(tmp_path / "less")[0]["grad_norm"] == pytest.approx(full)  # the norm before is what is recorded


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "sgd", "lr": 0.5, "momentum": 0.9}])
@pytest.mark.parametrize("make", [adapted, unfrozen])
def test_training_lowers_the_loss(tmp_path, optimizer, make):
    train(make(), tmp_path, max_steps=30, optimizer=optimizer)
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


def test_length_is_given_in_epochs_or_steps():
    assert TrainConfig().total_steps(10) == 10
    assert TrainConfig(epochs=2).total_steps(10) == 20
    assert TrainConfig(epochs=0.25).total_steps(10) == 3
    assert TrainConfig(epochs=0.001).total_steps(10) == 1
    assert TrainConfig(max_steps=7).total_steps(10) == 7
    assert TrainConfig().eval_interval(100, 25) == 10
    assert TrainConfig(eval_every=3).eval_interval(100, 25) == 3
    assert TrainConfig().eval_interval(3, 3) == 1
    with pytest.raises(ValueError, match="not both"):
        TrainConfig(epochs=1, max_steps=3)


@pytest.mark.parametrize(
    ("settings", "evaluated", "saved"),
    [
        ({}, 10, 10),
        ({"eval_every": "epoch"}, 25, 25),
        ({"save_every": "epoch"}, 10, 25),
        ({"eval_every": "epoch", "save_every": 7}, 25, 7),
    ],
)
def test_intervals_are_given_in_steps_or_epochs(settings, evaluated, saved):
    config = TrainConfig(**settings)
    assert config.eval_interval(100, 25) == evaluated
    assert config.save_interval(100, 25) == saved


@pytest.mark.parametrize("value", ["epochs", 0, 1.5, True, "5 epochs"])
def test_another_interval_is_one_problem(value):
    with pytest.raises(ValueError, match=r"1 validation error(.|\n)*expected a number of steps, or epoch, got"):
        TrainConfig(eval_every=value)


def test_every_epoch_ends_with_a_validation_and_a_checkpoint(tmp_path):
    settings = {"epochs": 3, "batch_size": 4, "eval_every": "epoch", "save_every": "epoch", "keep_last": 9}
    train(adapted(), tmp_path, rows=make_rows(10), validation=make_rows(3, seed=5), **settings)
    assert [record["step"] for record in metrics(tmp_path) if "validation_loss" in record] == [0, 3, 6, 9]
    assert checkpoints(tmp_path) == [3, 6, 9]


def test_gradients_are_not_clipped_without_a_norm_to_clip_to(tmp_path):
    sgd = {"optimizer": {"name": "sgd", "lr": 1e-3}, "schedule": {"name": "constant", "warmup": 0}, "max_steps": 3}
    for name, norm in [("none", None), ("huge", 1e9), ("tiny", 1e-6)]:
        train(adapted(shaken=True), tmp_path / name, max_grad_norm=norm, **sgd)
    assert same(stored(tmp_path / "none", 3), stored(tmp_path / "huge", 3))
    assert not same(stored(tmp_path / "none", 3), stored(tmp_path / "tiny", 3))


def test_a_run_in_a_log_file_prints_twenty_lines(tmp_path, capsys):
    train(adapted(), tmp_path, rows=make_rows(4), max_steps=60)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == list(range(3, 61, 3))
    for line, loss in zip(lines, losses(tmp_path)[2::3], strict=True):
        assert re.fullmatch(rf"step \d+ of 60: loss {loss:.3f}, \d+ tok/s, \d\d:\d\d left", line)


def test_a_long_step_is_followed_by_a_line_when_a_minute_has_passed(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("lit_lora.train.progress.time.monotonic", lambda: clock[0])
    lines = ProgressLines(1000, first_step=0)
    for step in range(1, 13):
        clock[0] += 10
        lines.after(step, "loss 1.000", already_reported=step == 2)
    # The validation of step 2 printed a line, so the next one is due a minute later.
    assert capsys.readouterr().err.splitlines() == ["step 9 of 1000: loss 1.000, 2:45:10 left"]


def test_a_run_on_a_terminal_has_a_bar_instead_of_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(adapted(), tmp_path, rows=make_rows(4), max_steps=10)
    assert "step 5 of 10" not in capsys.readouterr().err


def test_figures_of_a_run_are_those_of_its_steps(tmp_path):
    rows = make_rows(8)
    result = train(adapted(), tmp_path, rows=rows, epochs=2, batch_size=4)
    assert result.steps == result.best_step == 4
    assert result.tokens == 2 * rows.token_counts.sum()
    assert result.loss == losses(tmp_path)[-1]
    assert result.validation_loss is result.untrained_validation_loss is None
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory_bytes > 1e6


def test_a_model_in_which_nothing_trains_is_refused(tmp_path):
    model = tiny_model()
    peft.freeze(model)
    with pytest.raises(UsageError, match="trains nothing"):
        train(model, tmp_path, max_steps=1)


def test_a_folder_with_checkpoints_is_not_trained_into(tmp_path):
    train(adapted(), tmp_path, max_steps=2)
    with pytest.raises(UsageError, match="another run"):
        train(adapted(), tmp_path, max_steps=2)
    assert checkpoints(tmp_path) == [2]


def test_one_model_can_be_trained_twice(tmp_path):
    model = unfrozen(torch.bfloat16)
    for name in ("first", "second"):
        train(model, tmp_path / name, max_steps=2)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]


class Counted(NextToken):
    """Next-token prediction whose validation also measures what a test says."""

    metrics = ("accuracy",)

    def __init__(self, accuracies):
        super().__init__()
        self.accuracies = iter(accuracies)

    def validate(self, model, batches):
        return {**super().validate(model, batches), "accuracy": next(self.accuracies)}


def test_the_best_weights_are_those_of_the_figure_that_was_asked_for(tmp_path):
    rows, held_out = make_rows(), make_rows(3, seed=9)
    settings = {"max_steps": 4, "eval_every": 1, "validation": held_out, "best_metric": "accuracy"}
    result = train(adapted(), tmp_path, rows=rows, objective=Counted([0.9, 0.5, 0.7, 0.7, 0.6]), **settings)
    by_step = {r["step"]: r for r in metrics(tmp_path) if r.get("validation_loss")}
    equal = min((2, 3), key=lambda step: by_step[step]["validation_loss"])  # the lower loss decides
    assert (result.best_step, result.metrics) == (equal, {"accuracy": 0.7})
    assert [by_step[step]["validation_accuracy"] for step in range(5)] == [0.9, 0.5, 0.7, 0.7, 0.6]
    assert checkpoints(tmp_path) == sorted({equal, 4})


def test_a_figure_that_is_not_measured_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"best_metric: 'f1' is not measured in this run, expected: loss$"):
        train(adapted(), tmp_path / "run", validation=make_rows(3), best_metric="f1")
    assert not (tmp_path / "run").exists()
