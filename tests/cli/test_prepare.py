"""``lit-lora prepare`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_lora.cli import main
from tests.tiny import tiny_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run in an empty folder that has ``model/`` and ``rows.jsonl``; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer(tmp_path / "model")
    rows = [{"prompt": f"Question {n}?", "completion": f"yes {n}"} for n in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["prepare", *arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_the_report_and_the_next_command_are_printed(run: Run) -> None:
    code, out, _ = run("rows.jsonl", "--model", "model", "--validation", "0.1", "--show", "1")
    assert code == 0
    assert "training: 18 rows" in out
    assert "validation: 2 rows" in out
    assert "⟦yes " in out
    assert out.splitlines()[-1] == "next: lit-lora init rows.jsonl --model model --validation 0.1"
    assert "tokens from the cache" in run("rows.jsonl", "--model", "model", "--validation", "3")[1]


def test_bare_class_numbers_are_a_warning_that_values_end(run: Run) -> None:
    Path("tweets.csv").write_text("tweet,label\nfine,1\nawful,0\n")
    arguments = ["tweets.csv", "--model", "model", "--columns", "prompt=tweet", "--columns", "completion=label"]
    code, _, error = run(*arguments)
    assert code == 0
    assert "2 rows whose answer is a bare number (column label)" in error
    code, out, error = run(*arguments, "--values", "label=0:no,1:yes", "--show", "1")
    assert (code, error) == (0, "")
    assert "⟦yes" in out
    assert "--values label=0:no,1:yes" in out.splitlines()[-1]
    for option, message in [
        ("label", "expected YOUR_COLUMN="),
        ("label=0", "expected VALUE:WORD"),
        ("label=0:a,0:b", "given twice"),
    ]:
        code, _, error = run(*arguments, "--values", option)
        assert code == 2
        assert message in error


def test_flags_reach_the_reader(run: Run) -> None:
    Path("odd.csv").write_text("q,a\nfirst,1\nsecond,2\n")
    code, out, _ = run(
        *("odd.csv", "--model", "model", "--columns", "prompt=Say {q}!", "--columns", "completion=a"),
        *("--system", "Be brief.", "--show", "1", "--learn", "all", "--max-seq-length", "90", "--limit", "1"),
    )
    assert code == 0
    assert "⟦<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay first!" in out
    assert "training: 1 rows" in out


def test_another_template_is_shown_and_passed_on(run: Run) -> None:
    code, out, _ = run("rows.jsonl", "--model", "model", "--template", "alpaca", "--show", "1")
    assert code == 0
    assert "### Response:\n⟦yes 0<|im_end|>⟧" in out
    assert out.splitlines()[-1] == "next: lit-lora init rows.jsonl --model model --template alpaca"
    code, _, err = run("rows.jsonl", "--model", "model", "--template", "llama-3")
    assert code == 3
    assert "<|eot_id|> ends an answer, which is not a token of model" in err


def test_rows_are_written_as_plain_files(run: Run) -> None:
    code, out, _ = run("rows.jsonl", "--model", "model", "--validation", "5", "--out", "plain")
    assert code == 0
    assert len(Path("plain/train.jsonl").read_text().splitlines()) == 15
    first = json.loads(Path("plain/validation.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert out.splitlines()[-1] == "next: lit-lora init plain --model model"
    assert run("rows.jsonl", "--model", "model", "--out", "plain")[0] == 4


def test_a_dry_run_keeps_nothing(run: Run) -> None:
    code, out, _ = run("rows.jsonl", "--model", "model", "--out", "plain", "--dry-run")
    assert (code, Path("plain").exists(), Path("cache").exists()) == (0, False, False)
    assert "training: 20 rows" in out


def test_the_next_command_repeats_what_was_told_of_the_data(run: Run) -> None:
    told = ["--format", "prompt_completion", "--system", "Be brief.", "--columns", "prompt=Q: {prompt}"]
    _, out, _ = run("rows.jsonl", "--model", "model", *told)
    assert out.splitlines()[-1] == f"next: lit-lora init rows.jsonl --model model {shlex.join(told)}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.jsonl", "--model", "model"], 3, "nowhere.jsonl: no such file"),
        (["rows.jsonl", "--model", "nowhere"], 3, "no tokenizer.json"),
        (["rows.jsonl"], 2, "Missing option '--model'"),
        (["rows.jsonl", "--model", "model", "--format", "alpacca"], 2, "did you mean 'alpaca'"),
        (["rows.jsonl", "--model", "model", "--columns", "prompt"], 2, "expected FORMAT_COLUMN=YOUR_COLUMN"),
        (["rows.jsonl", "--model", "model", "--validation", "1.5"], 2, "between 0 and 1"),
        (["rows.jsonl", "--model", "model", "--max-seq-length", "5"], 3, "20 of 20 rows are longer"),
    ],
)
def test_pain_44_mistakes_are_one_clear_line(run: Run, arguments: list[str], code: int, message: str) -> None:
    found, _, err = run(*arguments)
    assert found == code
    assert message in err
    assert not Path("plain").exists()


def test_pain_44_a_cache_that_cannot_be_made_says_how_to_move_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_LORA_CACHE", "rows.jsonl/cache")
    code, _, err = run("rows.jsonl", "--model", "model")
    assert (code, err.count("error: ")) == (4, 1), err
    assert "part of this path is a file, expected a folder" in err
    assert err.endswith("hint: set LIT_LORA_CACHE=FOLDER to move the cache\n")


def test_pain_45_without_a_network_two_lines_say_which_file_to_get(run: Run) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    code = "from lit_lora.cli import main; main(['prepare', 'alpaca', '--model', 'model'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 2)
    assert "download alpaca_data.json from" in done.stderr
    assert not Path("cache/hub").exists() or not any(Path("cache/hub").iterdir())


def test_preparing_a_local_file_imports_neither_torch_nor_datasets(run: Run) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = ['rows.jsonl', '--model', 'model']\n"
        "try: runpy.run_module('lit_lora.scripts.prepare', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_most_rows_dropped_for_their_length_are_a_warning_with_the_remedy(run: Run) -> None:
    rows = [{"prompt": "word " * 50, "completion": "yes"}] * 9 + [{"prompt": "a", "completion": "b"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run("rows.jsonl", "--model", "model", "--max-seq-length", "32")
    message = " ".join(err.split())
    assert code == 0
    assert "warning: rows.jsonl: 9 of 10 rows are longer than data.max_seq_length 32 and are dropped" in message
    length = re.search(r"data.max_seq_length=(\d+) keeps all", message)
    assert length is not None
    _, out, err = run("rows.jsonl", "--model", "model", "--max-seq-length", length[1])
    assert "training: 10 rows" in out
    assert "dropped" not in err


def test_a_text_is_reported_in_documents_and_pieces(run: Run) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "word " * 60}) + "\n" for _ in range(3)))
    _, out, _ = run("rows.jsonl", "--model", "model", "--max-seq-length", "32")
    pieces = re.search(r"rows.jsonl: 3 documents in (\d+) pieces, format text", out)
    assert pieces is not None
    assert f"training: {pieces[1]} pieces" in out
