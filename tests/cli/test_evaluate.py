from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import save_model
from lit_lora.cli import main
from lit_lora.files import sha256_file
from tests.evaluate.conftest import tiny_model
from tests.tiny import tiny_tokenizer

TICKET = '{"product": "laptop", "urgency": "high"}'


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    tiny_tokenizer(folder / "tokenizer")
    return save_model(tiny_model(), folder / "tiny", side_files=folder / "tokenizer", card="tiny\n")


@pytest.fixture(scope="session")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter that does something; not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", base, size=0.3)


def make_run(folder: Path, base: Path, size: float) -> Path:
    model = load_model(base)
    config = peft.methods()["lora"].model_validate({"rank": 2})
    peft.freeze(model)
    config.apply(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.trainable_state(model).values():
            parameter.add_(size * torch.randn_like(parameter))
    peft.save_adapter(model, config, folder / "adapter", base=base)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    return write(tmp_path / "tickets.jsonl", [{"prompt": f"my laptop {i}", "completion": TICKET} for i in range(5)])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *map(str, arguments), "--dtype", "fp32", "--device", "cpu"])
    return int(exit_.value.code or 0)


def test_base_shots_adapter_and_merged_stand_side_by_side(
    run: Path, base: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = write(tmp_path / "train.jsonl", [{"prompt": f"phone {i}", "completion": TICKET} for i in range(4)])
    merged = tmp_path / "merged"
    with pytest.raises(SystemExit) as exit_:
        main(["merge", str(run), "--out", str(merged), "--dtype", "fp32"])
    assert not exit_.value.code
    capsys.readouterr()

    out = tmp_path / "results.json"
    code = evaluate(run, merged, "--data", tickets, "--shots", 2, "--examples", examples, "--out", out)

    printed = capsys.readouterr().out
    assert code == 0
    saved = json.loads(out.read_text())
    models = {model["label"]: model for model in saved["models"]}
    assert list(models) == ["tiny", "tiny + 2 shots", "run/adapter", f"{tmp_path.name}/merged"]
    assert (saved["rows"], saved["tasks"]) == (5, ["loss", "exact_match", "json_fields"])
    losses = {label: model["scores"]["loss"]["value"] for label, model in models.items()}
    assert len(set(losses.values())) == 4
    assert losses["run/adapter"] == pytest.approx(losses[f"{tmp_path.name}/merged"], rel=1e-4)
    assert models["tiny"]["scores"]["field urgency"]["rows"] == 5
    assert len(models["tiny"]["answers"]) == 5
    digest = sha256_file(run / "adapter" / "adapter_model.safetensors")
    assert models["run/adapter"]["adapter_sha256"] == digest
    assert digest[:16] in printed
    assert f"next: lit-lora merge {run}" in printed
    assert re.search(rf"^\s+tiny\s+tiny \+ 2 shots\s+run/adapter\s+{tmp_path.name}/merged\s*$", printed, re.MULTILINE)


def test_pain_46_equal_scores_of_base_and_tuned_are_a_warning(
    base: Path, run: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = make_run(tmp_path / "idle", base, size=0.0)
    assert evaluate(idle, "--data", tickets) == 0
    assert "idle/adapter has exactly the scores of tiny" in capsys.readouterr().err
    assert evaluate(run, "--data", tickets) == 0
    assert "scores exactly as" not in capsys.readouterr().err


def test_an_adapter_can_be_named_apart_from_its_base(base: Path, run: Path, tickets: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert evaluate(base, "--adapter", run, "--data", tickets, "--out", one) == 0
    assert evaluate(run, "--data", tickets, "--out", two) == 0
    scores = [[model["scores"] for model in json.loads(path.read_text())["models"]] for path in (one, two)]
    assert scores[0] == scores[1]


def test_multiple_choice_rows_are_recognized(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(
        tmp_path / "mc.jsonl", [{"question": "sky?", "choices": ["red", "blue"], "answer": i % 2} for i in range(6)]
    )
    assert evaluate(base, "--data", rows, "--shots", 1, "--examples", rows) == 0
    printed = capsys.readouterr()
    assert re.search(r"^options\s+50.0% \[18.8–81.2\]", printed.out, re.MULTILINE)
    assert "chance 50.0%" in printed.err
    assert "scores exactly as" not in printed.err, "equal shares alone are no sign of equal models"


def test_plain_text_gets_its_loss(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)  # several contexts long
    out = tmp_path / "results.json"
    assert evaluate(base, "--data", text, "--out", out) == 0
    assert set(json.loads(out.read_text())["models"][0]["scores"]) == {"loss", "perplexity"}


def test_the_runs_own_files_and_columns_are_the_default(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "held.jsonl", [{"frage": "was?", "antwort": "nichts"}])
    train = write(tmp_path / "train.jsonl", [{"frage": "wer?", "antwort": "niemand"}])
    own = tmp_path / "run"
    shutil.copytree(run, own)
    section = {"path": str(train), "validation": str(rows), "columns": {"prompt": "frage", "completion": "antwort"}}
    (own / "config.yaml").write_text(json.dumps({"recipe": "lora", "data": section}))
    assert evaluate(own, "--task", "loss", "--shots", 1) == 0
    printed = capsys.readouterr()
    assert "1 rows, tasks: loss" in printed.err
    assert "tiny + 1 shots" in printed.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--task", "los"], 2, "--task los: unknown task (did you mean 'loss'?)"),
        (["--shots", "2"], 2, "--shots 2 needs rows to draw from"),
        (["--shots", "9", "--examples", "DATA"], 2, "there are only 5 examples"),
        (["--task", "options"], 3, "no column for options"),
        (["--columns", "prompt=nothing"], 3, "no column 'nothing'"),
        (["--out", "DATA"], 4, "already exists"),
    ],
)
def test_mistakes_are_one_clear_line(
    base: Path, tickets: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tickets) if argument == "DATA" else argument for argument in arguments]
    assert evaluate(base, "--data", tickets, *given) == code
    assert said in capsys.readouterr().err


def test_missing_data_and_missing_models_are_named(
    base: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(base) == 2
    assert "no rows to evaluate on" in capsys.readouterr().err
    assert evaluate(base, "--data", tmp_path / "none.jsonl") == 3
    assert evaluate(tmp_path / "none", "--data", tickets) == 3
    assert evaluate(base, base, "--adapter", "x", "--data", tickets) == 2


def trained_run(run: Path, base: Path, folder: Path, data: dict[str, Any], seed: int = 0) -> Path:
    """A copy of the run with a config, as if it had been trained on this data."""
    shutil.copytree(run, folder)
    config = {"recipe": "lora", "model": {"path": str(base)}, "data": data, "seed": seed}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def scores_of(out: Path) -> dict[str, Any]:
    return {model["label"]: model["scores"] for model in json.loads(out.read_text())["models"]}


@pytest.mark.parametrize("settings", [{}, {"deduplicate": True}, {"limit": 30}, {"bad_rows": "skip"}], ids=str)
def test_without_data_a_run_is_measured_on_exactly_the_rows_that_it_held_out(
    settings: dict[str, Any], run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_lora.data import DataConfig, prepare
    from lit_lora.evaluate.read import find_run, read_held_out
    from lit_lora.tokenizer import Tokenizer

    rows = [{"prompt": f"my laptop {i // 2}", "completion": TICKET} for i in range(40)]
    file = write(tmp_path / "rows.jsonl", rows)
    data = {"path": str(file), "validation": 0.25, "system": "Be brief.", **settings}
    trained = trained_run(run, base, tmp_path / "trained", data, seed=3)
    expected = prepare(DataConfig(**data), Tokenizer.load(base), cache=tmp_path / "cache", seed=3).validation
    assert expected is not None
    places = [int(row.source.rpartition(":")[2]) - 1 for row in expected]

    found = find_run([trained])
    assert found is not None
    _, dataset = read_held_out(found, {})
    assert [row.messages[1]["content"] for row in dataset.conversations] == [rows[place]["prompt"] for place in places]
    assert {row.messages[0]["content"] for row in dataset.conversations} == {"Be brief."}

    assert evaluate(trained, "--task", "loss") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "held out, read as in training" in err
    assert f"{len(places)} rows" in err


def test_a_run_that_held_out_nothing_asks_for_rows(
    run: Path, base: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trained_run(run, base, tmp_path / "trained", {"path": str(tickets)})
    assert evaluate(trained) != 0
    assert "held out no rows" in capsys.readouterr().err


def test_pieces_of_a_text_that_were_trained_on_are_not_measured(run: Path, base: Path, tmp_path: Path) -> None:
    from lit_lora.evaluate.read import find_run, read_held_out

    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    data = {"path": str(text), "validation": 2, "max_seq_length": 32}
    found = find_run([trained_run(run, base, tmp_path / "trained", data)])
    assert found is not None
    _, dataset = read_held_out(found, {})
    assert len(dataset.texts) == 2
    assert all(len(piece) < 200 and piece in text.read_text() for piece in dataset.texts)


def test_one_option_leaves_the_other_settings_as_trained(run: Path, base: Path, tmp_path: Path) -> None:
    labeled = [{"review": f"film {i}", "label": i % 2} for i in range(6)]
    other = [{"text": row["review"], "class": row["label"]} for row in labeled]
    data = {
        "path": str(write(tmp_path / "rows.jsonl", labeled)),
        "system": "Be brief.",
        "columns": {"prompt": "Good? {review}", "completion": "label"},
        "values": {"label": {"0": "no", "1": "yes"}},
    }
    trained = trained_run(run, base, tmp_path / "trained", data)
    assert evaluate(trained, "--data", data["path"], "--out", tmp_path / "as_trained.json") == 0
    renamed = write(tmp_path / "other.jsonl", other)
    columns = ("--columns", "prompt=Good? {text}", "--columns", "completion=class")
    assert evaluate(trained, "--data", renamed, *columns, "--out", tmp_path / "renamed.json") == 0
    assert evaluate(trained, "--data", data["path"], "--system", "", "--out", tmp_path / "bare.json") == 0

    as_trained, renamed_scores, bare = (
        scores_of(tmp_path / f"{name}.json") for name in ("as_trained", "renamed", "bare")
    )
    label = "trained/adapter"
    assert as_trained[label]["loss"] == renamed_scores[label]["loss"]
    assert as_trained[label]["loss"] != bare[label]["loss"]


@pytest.mark.parametrize("learn", ["answers", "last", "all"])
def test_the_loss_is_over_the_tokens_that_training_learns(learn: str, base: Path, tmp_path: Path) -> None:
    from lit_lora.data import DataConfig, prepare
    from lit_lora.data.findings import Findings
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.sample import Conversation
    from lit_lora.evaluate.shots import encode_after_shots
    from lit_lora.tokenizer import Tokenizer

    turns = [("user", "one"), ("assistant", "eleven"), ("user", "two"), ("assistant", "twelve"), ("user", "three")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages.append({"role": "assistant", "content": "thirteen"})
    messages[1]["weight"] = 0
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    config = DataConfig.model_validate({"path": str(file), "learn": learn})
    tokenizer = Tokenizer.load(base)
    [row] = prepare(config, tokenizer, cache=tmp_path / "cache", seed=0).train
    [(sample, _)] = read_samples(config, [file], Findings())
    assert isinstance(sample, Conversation)

    encoded = encode_after_shots(tokenizer, sample, learn=learn)
    assert (list(encoded.ids), list(encoded.loss_mask)) == (row.input_ids.tolist(), row.loss_mask.tolist())

    shot = Conversation([{"role": "user", "content": "none"}, {"role": "assistant", "content": "zero"}])
    after_shot = encode_after_shots(tokenizer, sample, [shot], learn="answers")
    answers = encode_after_shots(tokenizer, sample, learn="answers")
    learned = [token for token, target in zip(after_shot.ids, after_shot.loss_mask, strict=True) if target]
    assert learned == [token for token, target in zip(answers.ids, answers.loss_mask, strict=True) if target]


def test_losses_over_different_tokens_are_not_compared_in_silence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    shutil.copytree(base, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "word " * 40, "completion": "yes"}]
    data = write(tmp_path / "rows.jsonl", rows)
    assert evaluate(base, short, "--data", data, "--task", "loss") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 rows are longer than the model's context of 64 tokens and are left out of the loss" in err
    assert "cannot be compared" in err

    assert evaluate(base, "--data", data, "--task", "loss") == 0
    assert "left out" not in capsys.readouterr().err


def test_rows_beyond_the_limit_are_not_asked_for_and_none_left_is_an_error(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n{broken\n")
    assert evaluate(base, "--data", data, "--task", "loss", "--limit", 1) == 0
    assert evaluate(base, "--data", data, "--task", "loss") != 0
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert evaluate(base, "--data", data, "--task", "loss", "--bad-rows", "skip") == 0
    assert "rows.jsonl:2: left out" in " ".join(capsys.readouterr().err.split())

    data.write_text(json.dumps({"prompt": {"a": 1}, "completion": "b"}) + "\n")
    assert evaluate(base, "--data", data, "--task", "loss", "--bad-rows", "skip") != 0
    err = capsys.readouterr().err
    assert "no row is left to evaluate on" in " ".join(err.split())
