"""A run that was stopped and resumed equals one that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_lora import peft
from lit_lora.data.batches import Batches
from lit_lora.errors import DiskError, InputError, Interrupted
from tests.train.tiny_run import adapted, checkpoints, losses, make_rows, metrics, same, stored, train, unfrozen

CASES = {
    "lora with dropout": (lambda: adapted(dropout=0.2), {}),
    "accumulation": (lambda: adapted(dropout=0.2), {"batch_size": 6, "micro_batch_tokens": 20}),
    "bf16 base": (lambda: adapted(torch.bfloat16), {}),
    "full in bf16": (lambda: unfrozen(torch.bfloat16), {"optimizer": {"lr": 1e-3, "weight_decay": 0.1}}),
    "fp16": (lambda: adapted(torch.float16, dropout=0.2), {}),
    "8-bit moments": (lambda: unfrozen(wide=5), {"optimizer": {"name": "adamw8bit", "lr": 1e-3}}),
    "sgd with momentum": (adapted, {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}),
}


class Stopping(Batches):
    """Sends this process a signal when the rows of a step are asked for."""

    stop_at: int
    number = signal.SIGTERM

    def step(self, step):
        if step == self.stop_at:
            signal.raise_signal(self.number)
        return super().step(step)


def stopping(step: int, number: int = signal.SIGTERM, **settings: object) -> Stopping:
    sizes = {"batch_size": 4, "micro_batch_tokens": 48, **settings}
    sizes = {key: sizes[key] for key in ("batch_size", "micro_batch_tokens")}
    batches = Stopping(make_rows(11), seed=0, **sizes)  # type: ignore[arg-type]
    batches.stop_at, batches.number = step, number
    return batches


@pytest.mark.parametrize("case", CASES)
def test_pain_23_a_resumed_run_equals_an_uninterrupted_one(tmp_path, case):
    make, settings = CASES[case]
    settings = {"max_steps": 10, "eval_every": 4, "validation": make_rows(3, seed=9), **settings}
    whole = make()
    result = train(whole, tmp_path / "whole", rows=make_rows(11), **settings)
    with pytest.raises(Interrupted):  # in the middle of an epoch, and not where a checkpoint is due
        train(make(), tmp_path / "parts", batches=stopping(4, **settings), **settings)
    assert checkpoints(tmp_path / "parts")[-1] == 5
    resumed = make()
    again = train(resumed, tmp_path / "parts", rows=make_rows(11), resume=True, **settings)
    assert same(peft.trainable_state(resumed), peft.trainable_state(whole))
    assert same(stored(tmp_path / "parts", 10), stored(tmp_path / "whole", 10))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    states = [(tmp_path / name / "checkpoints/step-00000010/state.json").read_text() for name in ("parts", "whole")]
    assert states[0] == states[1]
    assert (again.steps, again.best_step, again.loss, again.tokens) == (
        10,
        result.best_step,
        result.loss,
        result.tokens,
    )
    assert again.untrained_validation_loss == result.untrained_validation_loss is not None


def test_pain_24_rows_after_a_resume_are_those_of_the_uninterrupted_order(tmp_path):
    visits: list[list[int]] = []

    class Noting(Batches):
        def step(self, step):
            micro_batches = super().step(step)
            visits.append(sorted(row for batch in micro_batches for row in batch.rows))
            return micro_batches

    def batches() -> Noting:
        return Noting(make_rows(11), batch_size=4, micro_batch_tokens=48, seed=0)

    train(adapted(), tmp_path / "whole", batches=batches(), max_steps=9)
    whole, visits = visits, []
    with pytest.raises(Interrupted):
        train(adapted(), tmp_path / "parts", batches=stopping(3), max_steps=9)
    train(adapted(), tmp_path / "parts", batches=batches(), resume=True, max_steps=9)
    assert visits == whole[4:]  # no step is replayed


def test_pain_26_a_save_that_was_killed_leaves_the_checkpoint_before_it(tmp_path):
    train(adapted(), tmp_path / "whole", max_steps=8, save_every=2, keep_last=9)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for step in (6, 8):  # what a kill leaves: a temporary folder, half of its files, one of them cut
        half = (killed / "checkpoints" / f"step-{step:08d}").rename(killed / "checkpoints" / f".tmp-step-{step:08d}-x")
        (half / "state.json").unlink()
        (half / "optimizer.safetensors").write_bytes((half / "optimizer.safetensors").read_bytes()[:100])
    train(adapted(), killed, max_steps=8, save_every=2, keep_last=9, resume=True)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6, 8)]
    assert same(stored(killed, 8), stored(tmp_path / "whole", 8))
    assert metrics(killed) == metrics(tmp_path / "whole")


def test_a_checkpoint_that_was_moved_aside_when_the_process_was_killed_is_resumed_from(tmp_path, capsys):
    train(adapted(), tmp_path, max_steps=4, save_every=2, keep_last=9)
    newest = tmp_path / "checkpoints" / "step-00000004"
    newest.rename(newest.with_name(".old-step-00000004"))
    train(adapted(), tmp_path, max_steps=6, save_every=2, keep_last=9, resume=True)
    assert sorted(path.name for path in newest.parent.iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert "resumed after step 4 of 6" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_pain_27_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        train(adapted(), tmp_path, batches=stopping(1, number), max_steps=10)
    assert caught.value.exit_code == 128 + number
    assert caught.value.hint
    assert "--resume" in caught.value.hint
    assert checkpoints(tmp_path) == [2]
    assert len(losses(tmp_path)) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_pain_25_a_finished_run_resumes_to_its_result(tmp_path, capsys):
    settings = {"max_steps": 4, "validation": make_rows(3, seed=9)}
    model = adapted()
    result = train(model, tmp_path, **settings)
    before = metrics(tmp_path)
    capsys.readouterr()
    other = adapted()
    again = train(other, tmp_path, resume=True, **settings)
    assert "nothing is left to train" in capsys.readouterr().err
    assert metrics(tmp_path) == before
    assert same(peft.trainable_state(other), peft.trainable_state(model))
    assert (again.loss, again.tokens, again.validation_loss) == (result.loss, result.tokens, result.validation_loss)


def test_pain_25_changed_rows_are_not_resumed(tmp_path):
    train(adapted(), tmp_path, rows=make_rows(8), max_steps=2)
    with pytest.raises(InputError, match="rows are not those"):
        train(adapted(), tmp_path, rows=make_rows(8, seed=1), resume=True, max_steps=4)


def test_changed_validation_rows_are_not_resumed(tmp_path):
    first = make_rows(4, seed=9)
    train(adapted(), tmp_path, validation=first, max_steps=2)
    for other in (make_rows(4, seed=8), first.subset(np.array([1, 0, 2, 3])), None):
        with pytest.raises(InputError, match="the validation rows are not those that the run started with"):
            train(adapted(), tmp_path, validation=other, resume=True, max_steps=4)
    train(adapted(), tmp_path, validation=first, resume=True, max_steps=4)


def test_a_checkpoint_that_does_not_name_its_validation_rows_is_resumed(tmp_path):
    train(adapted(), tmp_path, validation=make_rows(4, seed=9), max_steps=2)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    del state["validation_rows"]
    path.write_text(json.dumps(state))
    assert train(adapted(), tmp_path, validation=make_rows(4, seed=9), resume=True, max_steps=4).steps == 4


def test_another_model_or_method_is_not_resumed(tmp_path):
    train(adapted(), tmp_path, max_steps=2)
    with pytest.raises(InputError, match="trains 28 tensors, this run trains 8"):
        train(adapted(target_modules="q,v"), tmp_path, resume=True, max_steps=4)
    with pytest.raises(InputError, match="has another shape"):
        train(adapted(rank=2), tmp_path, resume=True, max_steps=4)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_broken_checkpoint_is_named(tmp_path, name):
    train(adapted(), tmp_path, max_steps=2)
    path = tmp_path / "checkpoints" / "step-00000002" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=str(path)):
        train(adapted(), tmp_path, resume=True, max_steps=4)


def test_pain_48_checkpoints_hold_safetensors_and_json_only(tmp_path):
    train(adapted(), tmp_path, max_steps=2)
    names = {path.name for path in (tmp_path / "checkpoints" / "step-00000002").iterdir()}
    assert names == {"trainable.safetensors", "optimizer.safetensors", "state.json"}
    json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())


def limit_file_size(size: int):
    """Let the system refuse to write files beyond ``size`` bytes; returns how to take that back."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_pain_26_a_disk_that_takes_no_more_keeps_the_older_checkpoint(tmp_path):
    undo = [lambda: None]

    def fill(step: int) -> None:
        if step == 2:
            undo[0] = limit_file_size(4096)

    settings = {"max_steps": 6, "eval_every": 2, "validation": make_rows(3, seed=9)}
    whole = adapted()
    train(whole, tmp_path / "whole", **settings)
    try:
        with pytest.raises(DiskError, match="step-00000004") as caught:
            train(adapted(), tmp_path / "full", sample=fill, **settings)
    finally:
        undo[0]()
    assert caught.value.exit_code == 4
    assert os.listdir(tmp_path / "full" / "checkpoints") == ["step-00000002"]
    train(adapted(), tmp_path / "full", resume=True, **settings)
    assert same(stored(tmp_path / "full", 6), stored(tmp_path / "whole", 6))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a disk of its own, of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {folder} 2>/dev/null"):
        pytest.skip("no right to mount a disk")
    yield folder
    os.system(f"umount {folder}")


def test_pain_26_a_full_disk_keeps_the_older_checkpoint(small_disk, tmp_path):
    settings = {"max_steps": 6, "save_every": 1, "keep_last": 9}
    with pytest.raises(DiskError, match="no space left"):
        train(adapted(), small_disk, **settings)
    kept = checkpoints(small_disk)
    assert kept == list(range(1, len(kept) + 1))
    assert 1 <= len(kept) < 6
    train(adapted(), tmp_path / "whole", **settings)
    assert same(stored(small_disk, kept[-1]), stored(tmp_path / "whole", kept[-1]))
