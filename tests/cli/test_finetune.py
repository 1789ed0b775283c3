"""``lit-lora finetune`` as a user types it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_lora.cli import main
from lit_lora.train.objectives import next_token as objective
from tests.estimate.test_estimate import setup_of
from tests.finetune.tiny_task import contents, make_base, write_config, write_rows
from tests.train.tiny_run import checkpoints, metrics

Call = Callable[..., tuple[int, str, str]]
# The package also exports the function of that name, which hides the module.
PLAN = importlib.import_module("lit_lora.recipe.plan")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model, rows and a config."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], task: Path) -> Call:
    """Run the command on the task's config: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["finetune", "--config", str(task / "config.yaml"), *map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def table(out: str, title: str) -> dict[str, str]:
    """First and last cell of each row of a printed table."""
    lines = out.split(f"# {title}\n")[1].split("\n#")[0].splitlines()
    return {line.split("\t")[0]: line.split("\t")[-1] for line in lines if "\t" in line}


def test_a_method_whose_tokens_see_less_in_long_rows_computes_each_row_whole(task, call):
    code, out, _ = call("peft={name: longlora, group: 8}")
    assert (code, table(out, "Plan").get("shared prefix")) == (0, None)


def test_a_run_prints_its_plan_and_result_and_the_next_command(task, call):
    code, out, err = call()
    assert code == 0
    assert table(out, "What trains")["model.layers.*.mlp.gate_proj"] == "1,280"
    plan = table(out, "Plan")
    assert plan["trainable parameters"].startswith("7,424 of ")
    assert plan["training rows"].startswith("20: ")
    assert plan["shared prefix"] == "10 tokens, computed once per micro-batch"
    assert plan["validation rows"] == "4, every 3 steps"
    assert plan["steps"] == "8 of 4 rows each, 1.6 epochs"
    assert re.fullmatch(r"(\d+ s|less than a second) \(\d+ ms per step\), without validation", plan["estimated time"])
    assert plan["run folder"] == str(task / "run")
    result = table(out, "Result")
    assert float(result["Validation loss"]) < float(result["Validation loss before training"])
    assert out.endswith(f"next: lit-lora chat {task / 'run'}   or   lit-lora merge {task / 'run'}\n")
    assert "step 8 of 8: loss " in err
    assert "\r" not in err  # no progress bar in a pipe
    assert {path.name for path in (task / "run").iterdir()} >= {"adapter", "config.yaml", "loss.png", "metrics.jsonl"}
    result = json.loads((task / "run" / "result.json").read_text())
    assert result["trainable"] > 0
    assert result["written_bytes"] == (task / "run" / "adapter" / "adapter_model.safetensors").stat().st_size


def test_pain_28_a_run_writes_no_copy_of_the_model(task, call):
    make_base(task / "base", intermediate_size=4096)
    write_config(task, peft={"rank": 1, "target_modules": "q,v"})
    assert call()[0] == 0
    written = sum(path.stat().st_size for path in (task / "run").rglob("*.safetensors"))
    assert 0 < written < 0.1 * (task / "base" / "model.safetensors").stat().st_size


def test_a_dry_run_writes_nothing_and_prints_the_plan(task, call):
    call("--dry-run")  # fills the cache of rows
    before = contents(task)
    code, out, _ = call("--dry-run")
    assert code == 0
    assert table(out, "What trains")
    assert table(out, "Plan")["learning rate"] == "0.01, cosine, 0 warm-up steps"
    assert contents(task) == before


def test_overrides_change_single_keys(call, task):
    code, out, _ = call("--dry-run", "peft.rank=2", "train.epochs=2", "train.max_steps=null", "optimizer.lr=1e-4")
    assert code == 0
    assert "rank 2" in out
    assert table(out, "Plan")["steps"].startswith("10 of 4 rows")
    assert table(out, "Plan")["learning rate"].startswith("0.0001,")


def test_pain_28_a_folder_with_a_run_is_not_touched_without_being_told(task, call):
    assert call()[0] == 0
    before = contents(task / "run")
    code, out, err = call()
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {task / 'run'}: already contains a run\nhint: --resume")
    assert contents(task / "run") == before
    (task / "run" / "notes.txt").write_text("mine")
    assert call("--overwrite", "train.max_steps=2")[0] == 0
    assert checkpoints(task / "run") == [2]
    assert (task / "run" / "notes.txt").read_text() == "mine"


def test_a_run_is_not_removed_before_its_replacement_can_start(task, call):
    assert call()[0] == 0
    before = contents(task / "run")
    assert call("--overwrite", "data.path=missing.jsonl")[0] == 3
    assert call("--overwrite", f"model.path={task / 'missing'}")[0] == 3
    assert call("--overwrite", "peft.target_modules=[q_prjo]")[0] == 2
    assert contents(task / "run") == before


def test_a_run_that_could_not_start_takes_no_folder(task, call):
    assert call("data.path=missing.jsonl")[0] == 3
    assert not (task / "run").exists()
    assert call()[0] == 0


def test_pain_25_resuming_with_other_settings_names_them(task, call):
    assert call()[0] == 0
    before = contents(task / "run")
    code, _, err = call("--resume", "optimizer.lr=0.1", "peft.rank=4", "data.validation=3")
    assert code == 2
    assert err.startswith(f"error: {task / 'run/config.yaml'}: the run to resume has other settings: ")
    assert "data.validation, optimizer.lr, peft.rank\n" in err
    assert contents(task / "run") == before


def test_pain_25_resuming_a_finished_run_says_so_and_keeps_its_result(task, call):
    first = table(call()[1], "Result")
    before = contents(task / "run")
    code, out, err = call("--resume", "train.keep_last=3")
    assert code == 0
    assert "resumed after step 8 of 8: nothing is left to train" in err
    keys = ("Steps", "Best step", "Training loss", "Validation loss")
    assert [table(out, "Result")[key] for key in keys] == [first[key] for key in keys]
    after = contents(task / "run")
    same = ("adapter/adapter_model.safetensors", "metrics.jsonl")
    assert [after[name] for name in same] == [before[name] for name in same]


def test_pain_25_resuming_without_a_run_is_a_mistake(task, call):
    code, _, err = call("--resume")
    assert code == 2
    assert f"{task / 'run'}: no run to resume" in err
    assert not (task / "run").exists()


@pytest.mark.parametrize("name", ["state.json", "trainable.safetensors", "optimizer.safetensors"])
def test_pain_25_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(task, call, name):
    whole = table(call("train.save_every=3", "train.keep_last=2")[1], "Result")
    last = task / "run" / "checkpoints" / "step-00000008"
    (last / name).write_bytes(b"")
    code, _, err = call("--resume", "train.save_every=3", "train.keep_last=2")
    assert (code, err.count("error: ")) == (3, 1), err
    assert f"{last / name}: cannot be read" in err
    assert f"hint: remove {last}: " in err
    for folder in (last, task / "run" / "checkpoints"):  # then the one before it, then none
        shutil.rmtree(folder)
        code, out, err = call("--resume", "train.save_every=3", "train.keep_last=2")
        assert code == 0, err
        assert table(out, "Result")["Validation loss"] == whole["Validation loss"]


def test_pain_25_resuming_on_other_rows_is_refused(task, call):
    assert call()[0] == 0
    write_rows(task / "rows.jsonl", [{"prompt": f"{n}?", "completion": "x"} for n in range(24)])
    code, _, err = call("--resume")
    assert code == 3
    assert "the training rows are not those that the run started with" in err


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked")
@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_pain_28_a_folder_that_another_process_trains_in_is_left_alone(task, call, option):
    assert call()[0] == 0
    before = contents(task / "run")
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    (task / "run").rename(task / "mine")  # this process keeps the folder that it trained in
    shutil.copytree(task / "mine", task / "run")
    command = [sys.executable, "-c", hold, str(task / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        code, _, err = call(option)
        assert (code, err.count("error: ")) == (2, 1), err
        assert f"{task / 'run'}: another process is training in it" in err
        assert contents(task / "run") == before
        other.kill()
    assert call(option)[0] == 0


INTERRUPTED = """
import os, signal, sys, threading
from lit_lora.train import run_log

record = run_log.RunLog.record

def record_and_stop(self, step, **values):
    record(self, step, **values)
    if step == 5 and "loss" in values:
        os.kill(os.getpid(), int(sys.argv[1]))

run_log.RunLog.record = record_and_stop
from lit_lora.cli import main
main(sys.argv[2:])
"""

KILLED = """
import os, signal, sys

fsync, calls = os.fsync, []

def fsync_or_die(handle):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)

os.fsync = fsync_or_die
from lit_lora.cli import main
main(sys.argv[2:])
"""


def in_process(task: Path, script: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", script, str(number), "finetune", "--config", str(task / "config.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=task)


def same_run(a: Path, b: Path) -> None:
    """Same metrics, same checkpoints, same adapter."""
    assert metrics(a) == metrics(b)
    assert contents(a / "checkpoints") == contents(b / "checkpoints")
    weights = "adapter/adapter_model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()


def test_a_run_on_several_data_sets_resumes_bit_for_bit(task, call):
    write_rows(task / "more.jsonl", [{"prompt": f"count {n}", "completion": str(n)} for n in range(9)])
    entries = [f"{{path: {task}/rows.jsonl, weight: 1}}", f"{{path: {task}/more.jsonl, weight: 2, system: Count.}}"]
    options = (f"data=[{', '.join(entries)}]", "train.eval_every=null", "train.save_every=3", "train.keep_last=3")
    code, out, _ = call(*options)
    assert code == 0
    # An epoch of 33 rows draws 22 from nine; the run is 8 of its 9 steps.
    assert table(out, "Plan")["data.mix[1]"].startswith(f"{task}/more.jsonl: read 2.17 times, ")
    weights = task / "run" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for step in (6, 8):
        shutil.rmtree(task / "run" / "checkpoints" / f"step-{step:08d}")
    code, _, err = call(*options, "--resume")
    assert code == 0
    assert "resumed after step 3 of 8" in err
    assert weights.read_bytes() == whole

    code, _, err = call(options[0].replace("weight: 2", "weight: 3"), *options[1:], "--resume")
    assert code == 2
    assert "other settings: data.mix" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_pain_27_a_stopped_command_leaves_a_checkpoint_and_resumes(task, call, number):
    write_config(task, peft={"dropout": 0.2})
    done = in_process(task, INTERRUPTED, number)
    assert done.returncode == 128 + number
    assert "error: stopped after step 5 of 8, checkpoint saved\nhint: the same command with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(task / "run")[-1] == 5
    assert call("--resume")[0] == 0
    assert call(f"out={task / 'whole'}")[0] == 0
    same_run(task / "run", task / "whole")


@pytest.mark.parametrize("number", [17, 20])
def test_pain_23_a_command_killed_while_saving_resumes_bit_for_bit(task, call, number):
    write_config(task, peft={"dropout": 0.2}, train={"save_every": 1, "keep_last": 2})
    done = in_process(task, KILLED, number)
    assert done.returncode == -signal.SIGKILL
    assert list((task / "run" / "checkpoints").glob(".tmp-step-*"))  # it was in the middle of a save
    last = checkpoints_of_a_killed_run(task / "run")[-1]
    code, _, err = call("--resume")
    assert code == 0
    assert f"resumed after step {last} of 8: {8 - last} steps remain" in err
    assert call(f"out={task / 'whole'}")[0] == 0
    same_run(task / "run", task / "whole")


def checkpoints_of_a_killed_run(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_pain_12_nan_is_left_out_with_its_rows_and_stops_with_exit_code_5(task, call):
    make_base(task / "poisoned", poison=True)

    def train(*completions: str) -> tuple[int, str]:
        rows = [{"prompt": f"question {n}?", "completion": text} for n, text in enumerate(completions)]
        write_rows(task / "rows.jsonl", rows)
        settings = {"batch_size": 2, "micro_batch_tokens": 1, "save_every": 1, "epochs": 1, "max_steps": None}
        write_config(task, model={"path": str(task / "poisoned")}, data={"validation": None}, train=settings)
        code, _, err = call("--overwrite")
        assert "Traceback" not in err
        return code, err

    code, err = train(*["yes"] * 7, "zoo", *["yes"] * 4)
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("warning: skipped step ")]
    assert line.endswith("the step's rows: rows.jsonl:8")
    assert "gradient of model.layers." in line
    records = metrics(task / "run")
    (step,) = [record["step"] for record in records if record["loss"] is None]
    assert line.startswith(f"warning: skipped step {step}: ")
    assert all(record["loss"] > 0 for record in records if record["step"] != step)

    code, err = train(*["zoo"] * 12)
    assert code == 5
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: step 3: ")
    assert err.count("warning: skipped step ") == 2
    assert [(record["loss"], record["grad_norm"]) for record in metrics(task / "run")] == [(None, None)] * 3
    assert checkpoints(task / "run") == [2]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "model: {path: base}\ndata: {path: rows.jsonl}\noptimizer: {learning_rat: 1e-4}\npefft: {rank: 4}\n",
            [
                "c.yaml:3: unknown key 'optimizer.learning_rat', known: name, lr, weight_decay, betas, eps",
                "c.yaml:4: unknown key 'pefft' (did you mean 'peft'?)",
            ],
        ),
        (
            "model: {path: base}\ndata: {path: rows.jsonl}\npeft:\n  rank: eight\n  rnak: 8\ntrain:\n  epochs: 0\n",
            [
                "c.yaml:4: peft.rank: input should be a valid integer",
                "c.yaml:5: unknown key 'peft.rnak' (did you mean 'rank'?)",
                "c.yaml:7: train.epochs: input should be greater than 0, got 0",
            ],
        ),
        (
            "recipe: lora\nmodel: {path: base}\nseed: 1\nseed: 2\ntrain: {max_step: 3}\n",
            [
                "c.yaml:4: 'seed' is given twice (first on line 3)",
                "c.yaml:5: unknown key 'train.max_step' (did you mean 'max_steps'?)",
                "c.yaml:1: 'data' is missing",
            ],
        ),
        ("recipe: lor\nmodel: {path: base}\n", ["c.yaml: unknown recipe 'lor' (did you mean 'lora'?)"]),
        ("model: [\n", ["c.yaml:2: not valid YAML"]),
    ],
)
def test_pain_41_every_mistake_in_the_yaml_is_said_at_once_with_its_line(tmp_path, capsys, monkeypatch, text, problems):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(SystemExit) as done:
        main(["finetune", "--config", "c.yaml"])
    captured = capsys.readouterr()
    assert (done.value.code, captured.out) == (2, "")
    errors = [line.removeprefix("error: ") for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(problems), captured.err
    for problem in problems:
        assert any(error.startswith(problem) for error in errors), (problem, errors)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".1e-3", '"1e-4"'])
def test_pain_40_learning_rates_are_numbers_however_written(task, call, text):
    config = task / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.01", f"lr: {text}"))
    code, out, _ = call("--dry-run")
    assert code == 0
    assert table(out, "Plan")["learning rate"].startswith("0.0001,")


def test_pain_40_a_text_in_the_place_of_a_number_is_told_with_its_line(task, call):
    config = task / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.01", 'lr: "fast"'))
    code, _, err = call("--dry-run")
    assert code == 2
    line = config.read_text().splitlines().index('  lr: "fast"') + 1
    assert f"config.yaml:{line}: optimizer.lr: input should be a valid number" in err
    assert 'got "fast"' in err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("model.path=nowhere", 3, "error: nowhere"),
        ("data.path=nowhere.jsonl", 3, "error: nowhere.jsonl"),
        ("peft.target_modules=[q_porj]", 2, "'q_porj' matches no module (did you mean 'q_proj'?)"),
        ("model.device=cuda:7", 2, "device 'cuda:7' is not available"),
        ("train.max_stpes=3", 2, "unknown key 'train.max_stpes' (did you mean 'max_steps'?)"),
        ("schedule.name=cosin", 2, "error: 'schedule.name=cosin': schedule.name: "),
        ("peft.name=lroa", 2, "error: 'peft.name=lroa': peft.name: unknown name 'lroa' (did you mean 'lora'?)"),
        ("peft.name=prefix", 2, "error: 'peft.name=prefix': peft.name: 'prefix' is not for this recipe"),
        ("optimizer.name=adamww", 2, "error: 'optimizer.name=adamww': optimizer.name: unknown name 'adamww'"),
        ("data.max_seq_length=3", 3, "no rows to train on"),
        ("data.validation=99", 3, "validation: 99 holds out 99 rows, but there are only 24"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(task, call, override, code, message):
    got, out, err = call(override)
    assert got == code
    assert message in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not (task / "run").exists()


def test_an_override_that_contradicts_its_section_is_named_beside_the_line(task, call):
    write_config(task, train={"max_steps": 3})
    code, _, err = call("seed=1", "train.epochs=2")
    assert code == 2
    assert re.search(r"config.yaml:\d+ with 'train.epochs=2': train: give epochs or max_steps, not both", err)


def test_another_method_over_options_of_the_file_says_how_to_replace_the_section(task, call):
    write_config(task, peft={"rank": 1})
    code, _, err = call("peft.name=ia3")
    assert code == 2
    assert "config.yaml" in err
    assert "unknown key 'peft.rank'" in err
    assert err.endswith("; 'peft={name: ia3}' replaces the whole section\n")
    assert call("peft={name: ia3}", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("out=", 2, "'out=': expected a value, such as out=null for none"),
        ("train=5", 2, "'train=5': train: expected a section, such as {key: value}, got 5"),
        ("out=[a]", 2, "'out=[a]': out: expected a path, got [\"a\"]"),
        ("out=rows.jsonl", 4, "rows.jsonl: is a file, expected a folder for the run"),
        ("out=rows.jsonl/run", 4, "part of this path is a file, expected a folder"),
        (f"out={'x' * 300}", 4, "xxx: file name too long"),
        ("model.path=rows.jsonl", 3, "hint: this is a file, expected a checkpoint folder; lit-lora convert makes one"),
        ("model.path=other", 3, "hint: this is a run or an adapter; lit-lora merge makes a checkpoint from it"),
    ],
)
def test_pain_44_a_wrong_path_or_section_is_one_clear_line(task, call, monkeypatch, override, code, message):
    monkeypatch.chdir(task)
    (task / "other" / "adapter").mkdir(parents=True)
    before = {path.name for path in task.iterdir()}
    found, _, err = call(override)
    assert (found, err.count("error: ")) == (code, 1), err
    assert message in err
    assert {path.name for path in task.iterdir()} - before <= {"cache"}
    assert (task / "rows.jsonl").is_file()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is unreadable for root")
@pytest.mark.parametrize("name", ["rows.jsonl", "base/model.safetensors", "base/config.json", "base/tokenizer.json"])
def test_pain_44_an_unreadable_file_is_one_clear_line(task, call, name):
    (task / name).chmod(0)
    code, _, err = call()
    assert (code, err.count("error: ")) == (4, 1), err
    assert f"{task / name}: permission denied" in err


def test_pain_44_a_broken_row_is_named_by_its_line(task, call):
    lines = (task / "rows.jsonl").read_text().splitlines()
    (task / "rows.jsonl").write_text("\n".join([*lines[:5], '{"prompt": "half', *lines[5:]]))
    code, out, err = call()
    assert (code, out) == (3, "")
    assert f"error: {task / 'rows.jsonl'}:6: " in err


def test_pain_42_a_warmup_longer_than_the_run_is_cut_with_a_warning(call, task):
    code, _, err = call("schedule.warmup=100")
    assert code == 0
    assert "warning: schedule.warmup: 100 steps are more than half of all 8, so the warm-up is cut to 4" in err
    assert max(record["lr"] for record in metrics(task / "run") if "lr" in record) == 0.01


def test_pain_49_tokens_of_the_environment_are_written_nowhere(task, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETSECRET")
    monkeypatch.setenv("WANDB_API_KEY", "SECRETSECRET")
    code, out, err = call()
    assert code == 0
    assert "SECRET" not in out + err
    assert not any(b"SECRETSECRET" in data for data in contents(task).values())


def test_pain_45_a_run_on_local_files_opens_no_connection(call, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert call()[0] == 0


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a disk of its own, of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=100k tmpfs {folder} 2>/dev/null"):
        pytest.skip("no right to mount a disk")
    yield folder
    os.system(f"umount {folder}")


def test_pain_28_too_small_a_disk_is_said_before_training(call, small_disk):
    code, _, err = call(f"out={small_disk / 'run'}")
    assert code == 4
    assert "this run needs 297.0 KB, the disk has " in err
    assert list(small_disk.iterdir()) == []


def test_the_metrics_file_can_be_read_line_by_line(task, call):
    assert call()[0] == 0
    for line in (task / "run" / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)


def test_a_run_that_will_not_fit_is_warned_of_with_what_would(call, monkeypatch):
    monkeypatch.setattr(PLAN, "free_memory_bytes", lambda _: 1_000)
    code, _, err = call("--dry-run")
    assert code == 0  # a warning: the estimate may be wrong
    assert "this run needs about" in err
    assert "1.0 KB are free: even " in err
    assert "activation_checkpointing=full" in err
    assert "use a smaller model" in err
    monkeypatch.undo()
    assert "this run needs" not in call("--dry-run")[2]


@pytest.mark.parametrize(
    ("device", "free", "tokens", "said"),
    [("cuda", 1e12, 1024, True), ("cuda", 1e6, 1024, False), ("cuda", 1e12, 8192, False), ("cpu", 1e12, 1024, False)],
)
def test_a_gpu_that_gets_little_to_do_at_once_is_told(monkeypatch, capsys, device, free, tokens, said):
    monkeypatch.setattr(PLAN, "free_memory_bytes", lambda _: free)
    setup = setup_of(tokens=500, train={"micro_batch_tokens": tokens})
    PLAN.note_larger_micro_batches(replace(setup, device=torch.device(device)))
    assert ("train.micro_batch_tokens=8192 fits in memory and is faster" in capsys.readouterr().err) == said


def test_a_failed_allocation_is_one_line_with_the_settings_that_need_less(call, monkeypatch):
    monkeypatch.setattr(objective.NextToken, "backward", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    code, _, err = call()
    assert code != 0
    assert "out of memory; there is no checkpoint yet" in err
    assert "needs" in err
    assert "by lit-lora estimate" in err
    assert "Traceback" not in err
