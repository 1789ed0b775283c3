"""Numbers that go wrong: said at once, with the place, and nothing lost."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lit_lora import peft
from lit_lora.data.batches import Batches
from lit_lora.errors import NumericalError, OutOfMemoryError
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


class Poisoned(Batches):
    """Poisons the model's embedding of a token when the rows of a step are asked for."""

    def step(self, step):
        if step == self.poison_at:
            with torch.no_grad():
                self.model.model.embed_tokens.weight[self.token] = self.value
        return super().step(step)


def poisoned(model, value: float, *, step: int = 4, token: int = 44) -> Poisoned:
    batches = Poisoned(make_rows(8), batch_size=4, micro_batch_tokens=1, seed=0)
    batches.model, batches.value, batches.poison_at, batches.token = model, value, step, token
    return batches


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_pain_12_the_third_step_in_a_row_that_is_not_finite_stops_the_run(tmp_path, value, capsys):
    model = adapted(shaken=True)
    batches = poisoned(model, value)
    # a tied head spreads the poison over every row: take it apart
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    # every batch has a row with the poisoned token, and others
    guilty = [[int(r) for r in batches.row_indices(s) if 44 in batches.rows[int(r)].input_ids] for s in (4, 5, 6)]
    assert all(0 < len(rows) < 4 for rows in guilty)
    with pytest.raises(NumericalError) as caught:
        train(model, tmp_path, batches=batches, max_steps=10, save_every=2)
    assert caught.value.exit_code == 5
    assert "the checkpoint of step 6 is kept" in caught.value.hint
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: skipped ")]
    messages = [*(line.removeprefix("warning: skipped ") for line in lines), str(caught.value)]
    assert len(messages) == 3
    for step, (message, rows) in enumerate(zip(messages, guilty, strict=True), 5):
        start = f"step {step}: loss nan and gradient norm nan are not finite, first in the gradient of model.l"
        assert message.startswith(start)
        assert sorted(message.rpartition("rows: ")[2].split(", ")) == sorted(f"memory:{row + 1}" for row in rows)
    assert checkpoints(tmp_path) == [6]
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(tmp_path)[4:]] == [
        (step, None, None) for step in (5, 6, 7)
    ]
    assert all(math.isfinite(loss) for loss in losses(tmp_path)[:4])
    assert all(tensor.isfinite().all() for tensor in stored(tmp_path, 6).values())


def test_pain_12_a_step_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    model = adapted(shaken=True)
    parameter = dict(model.named_parameters())["model.layers.1.mlp.up_proj.lora_B"]
    calls = []

    def explode(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) in (3, 4, 6) else gradient  # never three in a row

    parameter.register_hook(explode)
    train(model, tmp_path, max_steps=8, batch_size=2, micro_batch_tokens=10_000, save_every=1, keep_last=9)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: skipped step ")]
    assert len(warned) == 3
    assert all("gradient of model.layers.1.mlp.up_proj.lora_B; the step's rows: memory:" in line for line in warned)
    records = metrics(tmp_path)
    assert [record["step"] for record in records if record["grad_norm"] is None] == [3, 4, 6]
    assert all(math.isfinite(record["loss"]) for record in records)
    for step in range(2, 9):
        assert same(stored(tmp_path, step), stored(tmp_path, step - 1)) == (step in (3, 4, 6))


def test_pain_12_a_run_too_short_for_three_such_steps_stops_as_well(tmp_path):
    model = adapted(shaken=True)
    with pytest.raises(NumericalError, match="step 1: loss nan") as caught:
        train(model, tmp_path, batches=poisoned(model, math.nan, step=0), max_steps=1)
    assert caught.value.hint
    assert "there is no checkpoint yet" in caught.value.hint


def test_a_loss_beside_a_gradient_that_is_not_finite_is_the_mean_that_other_lines_have(tmp_path):
    model = adapted(shaken=True)
    parameter = dict(model.named_parameters())["model.layers.1.mlp.up_proj.lora_B"]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NumericalError) as caught:
        train(model, tmp_path, max_steps=1)
    loss = losses(tmp_path)[0]
    assert str(caught.value).startswith(f"step 1: loss {loss:.4f} and gradient norm nan are not finite")
    assert loss < 10


def test_pain_12_a_validation_loss_that_is_not_finite_stops_and_is_never_the_best(tmp_path):
    model = adapted(shaken=True)

    def poison(step: int) -> None:
        if step == 2:
            model.model.norm.weight.data.fill_(math.nan)

    rows = make_rows(4, without_targets=(0, 1, 2, 3))  # so that only the validation sees it
    with pytest.raises(NumericalError, match="step 4: the validation loss nan"):
        train(model, tmp_path, rows=rows, validation=make_rows(3), sample=poison, eval_every=2, max_steps=8)
    assert metrics(tmp_path)[-1] == {"step": 4, "validation_loss": None}
    assert checkpoints(tmp_path) == [2]


def test_pain_11_small_updates_of_bfloat16_weights_are_not_lost(tmp_path):
    model = unfrozen(torch.bfloat16)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    schedule = {"name": "constant", "warmup": 0}
    train(model, tmp_path, max_steps=50, optimizer={"lr": 1e-5}, schedule=schedule)
    masters = stored(tmp_path, 50)
    for name, value in before.items():
        assert masters[name].dtype == torch.float32
        assert not torch.equal(masters[name], value.float()), name
        if value.ndim == 2:
            # one update is less than half the distance to the next number, for most weights; fifty are not
            assert float((value.abs() > 2**-6).float().mean()) > 0.9
            moved = float((model.get_parameter(name) != value).float().mean())
            assert moved > 0.1, name
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_pain_11_adapter_of_a_bfloat16_base_moves_with_a_small_learning_rate(tmp_path):
    model = adapted(torch.bfloat16)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, tmp_path, max_steps=50, optimizer={"lr": 1e-5})
    assert {value.dtype for value in stored(tmp_path, 50).values()} == {torch.float32}
    assert [name for name, value in peft.trainable_state(model).items() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("make", [adapted, unfrozen], ids=["lora", "full"])
def test_pain_11_a_float16_run_learns_like_a_float32_one(tmp_path, make):
    train(make(torch.float16), tmp_path / "fp16", max_steps=20, optimizer={"lr": 3e-3})
    train(make(torch.float32), tmp_path / "fp32", max_steps=20, optimizer={"lr": 3e-3})
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / "fp16")[-1] < 0.95 * losses(tmp_path / "fp16")[0]


def state_of(folder, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def with_scale(folder, step: int, **values: float) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}" / "state.json"
    path.write_text(json.dumps(state_of(folder, step) | values))


def test_pain_11_the_loss_scale_falls_when_gradients_overflow(tmp_path):
    train(adapted(torch.float16), tmp_path, max_steps=30, save_every=2, keep_last=99)
    for step in checkpoints(tmp_path)[1:]:
        (tmp_path / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"later-{step}")
    with_scale(tmp_path, 2, loss_scale=2.0**26)
    model = adapted(torch.float16)
    train(model, tmp_path, max_steps=30, save_every=2, keep_last=99, resume=True)
    skipped = [record["step"] for record in metrics(tmp_path) if record["grad_norm"] is None]
    assert skipped == list(range(3, 3 + len(skipped)))
    assert len(skipped) > 3
    assert state_of(tmp_path, 30)["loss_scale"] == 2.0 ** (26 - len(skipped))
    assert losses(tmp_path)[-1] < losses(tmp_path)[2]
    assert all(value.isfinite().all() for value in peft.trainable_state(model).values())


def test_the_loss_scale_grows_after_many_good_steps_and_changes_nothing_else(tmp_path):
    train(adapted(torch.float16), tmp_path, max_steps=8, save_every=2, keep_last=99)
    expected = losses(tmp_path)
    assert state_of(tmp_path, 8)["loss_scale"] == 2.0**14
    for step in (4, 6, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"later-{step}")
    with_scale(tmp_path, 2, good_steps=197)
    train(adapted(torch.float16), tmp_path, max_steps=8, save_every=2, keep_last=99, resume=True)
    assert state_of(tmp_path, 8)["loss_scale"] == 2.0**15
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-3)


def test_a_float16_run_whose_scale_cannot_help_stops(tmp_path):
    model = adapted(torch.float16, shaken=True)
    model.get_parameter("model.layers.1.mlp.up_proj.lora_B").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NumericalError, match="step 15: "):  # 14 halvings of 2**14
        train(model, tmp_path, max_steps=30)


class Greedy(torch.nn.Module):
    """A model that wants more memory than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 61)

    def hidden_states(self, input_ids, *, lengths, shared_prefix):
        return torch.empty(1, 1 << 50, 4)


def test_a_lack_of_memory_is_said_with_what_to_lower(tmp_path):
    with pytest.raises(OutOfMemoryError) as caught:
        train(Greedy(), tmp_path, max_steps=1, micro_batch_tokens=77)  # type: ignore[arg-type]
    assert caught.value.exit_code == 6
    assert caught.value.hint
    assert "train.micro_batch_tokens is 77" in caught.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    class Broken(Greedy):
        def hidden_states(self, input_ids, *, lengths, shared_prefix):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(Broken(), tmp_path, max_steps=1)  # type: ignore[arg-type]


def test_a_run_without_a_step_draws_no_plot(tmp_path):
    model = tiny_model().requires_grad_(True)
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError):
        train(model, tmp_path, max_steps=3)
    assert not (tmp_path / "loss.png").exists()
    assert metrics(tmp_path)[0]["loss"] is None
