"""``lit-lora compare`` as a user types it: real processes on a tiny model."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_lora.cli import main
from lit_lora.compare import locked
from tests.finetune.tiny_task import make_base, write_rows

Call = Callable[..., tuple[int, str, str]]

COMPARISON = """\
base:
  model: {path: base, dtype: fp32}
  data: {path: rows.jsonl, validation: 4}
  train: {max_steps: 6, batch_size: 4, samples: 0}
runs:
- {name: lora, peft: {name: lora, rank: 2}, lr: [1e-3, 1e-2]}
out: out
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model, rows and a comparison, where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "compare.yaml").write_text(COMPARISON)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], task: Path) -> Call:
    """Run the command in this process, its runs in their own: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["compare", "--config", "compare.yaml", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def table(out: str, title: str) -> dict[str, dict[str, str]]:
    """A printed table: by the first cell of a line, its cells by the header."""
    lines = out.split(f"# {title}\n")[1].splitlines()
    rows = [line.split("\t") for line in lines[: next((i for i, line in enumerate(lines) if "\t" not in line), None)]]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_a_dry_run_lists_the_runs_and_trains_nothing(task: Path, call: Call) -> None:
    code, out, _ = call("--dry-run", "seeds=[0, 1, 2]")
    assert code == 0
    plan = table(out, "Runs")["lora"]
    assert (plan["method"], plan["learning rates"], plan["runs"]) == ("LoRA, rank 2, alpha 4", "0.001 0.01", "4")
    assert plan["estimated time"].endswith(" s")
    assert "4 runs, seeds 0 1 2, about" in out
    assert not (task / "out").exists()


def test_what_is_there_already_is_not_rehearsed_again(task: Path, call: Call) -> None:
    for run in ("lr0.001-seed0", "lr0.01-seed0", "lr0.01-seed1"):
        (task / "out" / "runs" / f"lora-{run}").mkdir(parents=True)
        (task / "out" / "runs" / f"lora-{run}" / "result.json").write_text("{}")
    _, out, _ = call("--dry-run", "seeds=[0, 1]")
    assert table(out, "Runs")["lora"]["estimated time"] == "done"
    _, out, _ = call("--dry-run", "seeds=[0, 1, 2]")
    assert table(out, "Runs")["lora"]["estimated time"].endswith(" s")


def test_a_method_that_does_not_fit_the_model_is_told_before_anything_runs(task: Path, call: Call) -> None:
    more = "- {name: wide, peft: {name: lora, rank: 99}}\n- {name: lost, peft: {name: lora, target_modules: [qproj]}}\n"
    (task / "compare.yaml").write_text(COMPARISON.replace("out: out\n", "") + more)
    code, _, err = call()
    assert code == 2
    assert [line.partition(":")[2].partition(":")[0] for line in err.splitlines()] == [" wide", " lost"]
    assert "expected at most" in err.splitlines()[0] or "rank 99" in err.splitlines()[0]
    assert not (task / "out").exists()


@pytest.mark.slow
def test_a_comparison_runs_measures_and_reports_and_a_second_start_finds_it_done(task: Path, call: Call) -> None:
    more = (
        "- {name: houlsby, peft: {name: houlsby, bottleneck: 4}}\n"
        "- {name: bad, peft: {name: lora}, optimizer: {name: sgd}, lr: [1e30]}\n"
        "seeds: [0, 1]\n"
        "evaluate: {data: rows.jsonl, limit: 6}\n"
    )
    (task / "compare.yaml").write_text(COMPARISON.replace("out: out\n", "") + more + "out: out\n")
    code, out, err = call()
    assert code == 0, err
    shown = table(out, "Comparison, by validation loss")
    assert list(shown)[2:] == ["bad", "base, untrained"]
    assert (shown["lora"]["lr"], shown["bad"]["lr"], shown["houlsby"]["merges"]) == ("0.01", "failed", "no")
    assert float(shown["lora"]["validation loss"].split()[0]) < float(shown["base, untrained"]["validation loss"])
    assert " ± " in shown["lora"]["held-out loss"]
    assert shown["base, untrained"]["exact match"] == "0.0%"
    assert "bad: failed at lr 1e+30: step " in err
    assert "not finite" in err
    assert "[6/6] " not in err, "a run whose only rate failed has no further seeds"

    runs = task / "out" / "runs"
    result = json.loads((runs / "lora-lr0.01-seed1" / "result.json").read_text())
    assert 1e8 < result["peak_memory_bytes"] < 2e9
    assert not (runs / "lora-lr0.01-seed1" / "checkpoints").exists()
    with (task / "out" / "comparison.csv").open() as file:
        records = {(r["name"], r["lr"], r["seed"]): r for r in csv.DictReader(file)}
    assert float(records["lora", "0.01", "1"]["validation_loss"]) == result["validation_loss"]
    assert records["lora", "0.001", "0"]["measured: loss"] == "", "only what was chosen is measured"
    logs = {path: path.stat().st_mtime_ns for path in runs.glob("*.log") if "bad" not in path.name}

    code, again, err = call()
    assert code == 0
    assert again.partition("# Comparison")[2] == out.partition("# Comparison")[2]
    assert {path: path.stat().st_mtime_ns for path in logs} == logs, "nothing of it ran again"
    assert err.count("(from an earlier run)") == 5
    times = {name: plan["estimated time"] for name, plan in table(again, "Runs").items()}
    assert (times["lora"], times["houlsby"]) == ("done", "done")

    code, _, err = call("base.train.max_steps=7")
    assert code == 2
    assert f"error: {Path('out/runs/lora-lr0.001-seed0')}: already contains a run with other settings" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_comparison_goes_on_where_it_was(task: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lit_lora", "compare", "--config", "compare.yaml"]
    command += ["base.train.max_steps=400", "base.train.save_every=10"]
    with (task / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        metrics = task / "out" / "runs" / "lora-lr0.001-seed0" / "metrics.jsonl"
        end = time.monotonic() + 600
        while not (metrics.is_file() and metrics.read_text().count("\n") > 30):
            assert time.monotonic() < end, (task / "first.log").read_text()
            assert first.poll() is None, (task / "first.log").read_text()
            time.sleep(0.02)
        first.send_signal(number)
        code = first.wait(300)
    run = metrics.parent
    if number == signal.SIGKILL:  # its run goes on alone, and keeps a second start out
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            assert "this comparison is already running in another process" in done.stderr
            while not (run / "result.json").is_file():
                assert time.monotonic() < end
                time.sleep(0.1)
    else:
        assert code == 128 + number
        assert not (run / "result.json").exists()
        assert "hint: run the same command again: it resumes" in (task / "first.log").read_text()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 400
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "tokens" in line]
    assert steps == list(range(1, 401))
    if number != signal.SIGKILL:
        assert "resumed after step" in run.with_name(f"{run.name}.log").read_text()


def test_a_folder_where_another_start_works_is_refused(task: Path, call: Call) -> None:
    with locked(task / "out"):
        code, _, err = call()
    assert code == 2
    assert "this comparison is already running" in err
    assert os.listdir(task / "out") == [".lock"]


def test_finetune_and_compare_send_each_other_their_files(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--config", "compare.yaml"])
    assert "hint: lit-lora compare --config compare.yaml" in capsys.readouterr().err
