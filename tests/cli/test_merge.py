"""``lit-lora merge`` as a user types it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lit_lora.cli import main
from lit_lora.files import lock_folder
from tests.peft.tiny import make_adapter, make_model, save_base


@pytest.fixture
def run(tmp_path):
    base = save_base(make_model(dtype=torch.bfloat16), tmp_path / "base")
    make_adapter(base, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {base}\n")
    return tmp_path / "run"


def call(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_a_run_is_merged_into_its_folder_and_the_next_command_is_shown(run, capsys):
    code, out, err = call(capsys, "merge", run)
    assert code == 0
    assert "14 tensors updated: rounding error" in out
    assert "2 blocks agree with base + adapter" in out
    assert out.endswith(f"wrote {run / 'merged'}\nnext: lit-lora chat {run / 'merged'}\n")
    assert "14 of 29 tensors change" in err
    assert (run / "merged" / "model.safetensors").is_file()
    code, _, err = call(capsys, "merge", run)
    assert code == 4
    assert err.count("error:") == 1
    assert "already exists" in err


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked")
def test_what_a_killed_merge_left_behind_goes_with_the_next_one(run, capsys):
    dead, alive = (run / f".tmp-merged-{name}" for name in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    handle = lock_folder(alive)  # as a process that is writing does
    assert call(capsys, "merge", run)[0] == 0
    assert sorted(path.name for path in run.glob(".*")) == [alive.name]
    os.close(handle)
    shutil.rmtree(run / "merged")
    assert call(capsys, "merge", run)[0] == 0
    assert not list(run.glob(".*"))


def test_a_dry_run_writes_nothing_and_shows_what_each_dtype_keeps(run, capsys):
    before = sorted(run.rglob("*"))
    code, out, _ = call(capsys, "merge", run, "--dry-run")
    assert code == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in out.splitlines() if "\t" in line}
    assert rows.keys() == {"dtype", "fp32", "fp16", "bf16"}
    assert rows["fp32"][2:] == ["0.00%", "0.00%", "100.0%"]
    for column in (2, 3):
        assert float(rows["fp16"][column].rstrip("%")) < float(rows["bf16"][column].rstrip("%"))
    assert "nothing was written" in out
    assert sorted(run.rglob("*")) == before


def test_a_dry_run_tells_a_dtype_that_the_values_overflow(tmp_path, capsys):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    base = save_base(model, tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", target_modules="q,v")
    code, out, _ = call(capsys, "merge", tmp_path / "adapter", "--dry-run")
    assert code == 0
    assert [line.split("\t")[2] for line in out.splitlines() if line.startswith("fp16")] == ["out of range"]


def test_pain_16_a_lossy_merge_exits_5_and_names_the_remedies(run, capsys, tmp_path):
    make_adapter(tmp_path / "base", tmp_path / "weak", size=0.001)
    code, out, err = call(capsys, "merge", tmp_path / "weak", "--out", tmp_path / "merged")
    assert (code, out) == (5, "")
    assert "of the adapter's effect" in err
    assert "--dtype fp16" in err
    assert "--allow-lossy" in err
    assert not (tmp_path / "merged").exists()
    code, _, _ = call(capsys, "merge", tmp_path / "weak", "--out", tmp_path / "merged", "--allow-lossy")
    assert code == 0
    code, _, _ = call(capsys, "merge", tmp_path / "weak", "--out", tmp_path / "exact", "--dtype", "fp32")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/nowhere"], 3, "nowhere: no such folder"),
        (["{tmp}/base"], 3, "no adapter_config.json in it"),
        (["{run}", "--base", "{tmp}/nowhere"], 3, "no such file, expected a checkpoint folder"),
        (["{run}", "--base", "{tmp}/other"], 3, "trained on another base model"),
        (["{run}", "--subtract", "{tmp}/nowhere"], 3, "nowhere: no such folder"),
        (["{run}", "--subtract", "{run}"], 2, "cannot be added and subtracted in the same merge"),
        (["{run}", "--dtype", "int8"], 2, "Invalid value for '--dtype'"),
        ([], 2, "Missing argument"),
    ],
)
def test_mistakes_are_one_clear_line(run, capsys, tmp_path, arguments, code, message):
    save_base(make_model(dtype=torch.bfloat16, seed=9), tmp_path / "other")
    given = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    got, _, err = call(capsys, "merge", *given)
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert not (run / "merged").exists()


def test_switching_tasks_by_subtracting_one_and_adding_another(run, capsys, tmp_path):
    second = make_adapter(tmp_path / "base", tmp_path / "second", seed=6)
    assert call(capsys, "merge", run, "--dtype", "fp32")[0] == 0
    arguments = ["--base", run / "merged", "--subtract", run, "--out", tmp_path / "switched"]
    code, out, _ = call(capsys, "merge", second, *arguments)
    assert code == 0
    assert (tmp_path / "switched" / "config.json").is_file()
    assert "14 tensors updated" in out


def test_a_full_disk_leaves_nothing_behind(run, capsys, monkeypatch):
    from lit_lora.checkpoint.save import CheckpointWriter

    add, seen = CheckpointWriter.add, []

    def full(self, name, tensor):
        seen.append(name)
        if len(seen) == 5:
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", full)
    code, _, err = call(capsys, "merge", run)
    assert code == 4
    assert "no space left on the disk" in err
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "config.yaml"]


@pytest.mark.slow
def test_pain_16_the_published_adapter_merges_into_smollm2_and_generates_the_same(real_data, tmp_path, capsys):
    from lit_lora.checkpoint.load import load_model
    from lit_lora.peft import load_adapter

    given = Path(os.environ.get("LIT_LORA_TEST_WEIGHTS", ""))
    base = next((folder for folder in (given, *given.parent.glob("*"), *given.glob("*")) if is_smollm2(folder)), None)
    if base is None:
        pytest.skip("LIT_LORA_TEST_WEIGHTS has no converted SmolLM2 folder in or beside it")
    adapter = real_data / "adapters" / "smollm-135m-medical-flashcards-checkpoint-1645"
    code, out, _ = call(capsys, "merge", adapter, "--base", base, "--out", tmp_path / "merged")
    assert code == 0
    assert "60 tensors updated" in out
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, adapter)
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    ids = torch.randint(0, 49152, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(ids).log_softmax(-1), merged(ids).log_softmax(-1)
    assert (wanted.exp() * (wanted - got)).sum(-1).max() < 1e-2
    assert (wanted.argmax(-1) == got.argmax(-1)).float().mean() > 0.95


def is_smollm2(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
