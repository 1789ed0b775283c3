"""The recipe ``classify`` as a user meets it: runs, predictions, resuming, what is written, what is refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lit_lora.classify import open_classifier
from lit_lora.cli import main
from lit_lora.data.padded import PaddedBatches
from tests.classify.tiny import ENCODERS, FAMILIES, MORE_FAMILIES, save_base, write_config, write_rows
from tests.finetune.tiny_task import contents, make_base
from tests.train.tiny_run import metrics

Call = Callable[..., tuple[int, str, str]]

# What the words mean must be learned: they are random.
WITH_WORDS = {"name": "lora", "rank": 8, "modules_to_save": ["word_embeddings"]}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command: exit code, stdout, stderr."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def task(folder: Path, family: str, *, rows: int = 48, **sections: object) -> Path:
    """A base, rows, and the config of a run that learns them."""
    if not (folder / "base").exists():
        save_base(family, folder / "base")
    write_rows(folder / "rows.jsonl", rows)
    words = {"values": {"label": {"0": "negative", "1": "positive"}}}
    data = {**words, **sections.pop("data", {})}  # type: ignore[dict-item]
    sections.setdefault("peft", {"name": "lora", "rank": 4})
    return write_config(folder, data=data, **sections)


def trained(call: Call, folder: Path, family: str, **sections: object) -> Path:
    code, _, err = call("finetune", "--config", task(folder, family, **sections))
    assert code == 0, err
    return folder / "run"


def predictions(call: Call, folder: Path, *options: object, rows: Path | None = None) -> list[dict]:
    out = folder.parent / f"predictions-{len(list(folder.parent.glob('predictions-*')))}.jsonl"
    code, _, err = call("classify", folder, "--file", rows or folder.parent / "rows.jsonl", "--out", out, *options)
    assert code == 0, err
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_learns_and_its_saved_adapter_predicts_what_the_run_measured(call, tmp_path, family):
    before = (save_base(family, tmp_path / "base"), contents(tmp_path / "base"))[1]
    train = {"max_steps": 80, "eval_every": 20, "batch_size": 16, "best_metric": "accuracy"}
    data = {"validation": str(write_rows(tmp_path / "held.jsonl", 40, seed=1))}
    run = trained(call, tmp_path, family, rows=144, data=data, peft=WITH_WORDS, train=train, optimizer={"lr": 1e-2})
    assert contents(tmp_path / "base") == before
    records = [record for record in metrics(run) if "validation_loss" in record]
    best = max(records[1:], key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
    assert best["validation_accuracy"] > 0.9
    assert {"validation_f1", "validation_matthews"} < best.keys()
    assert "Validation accuracy" in (run / "adapter" / "README.md").read_text()
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (written["task_type"], "classifier" in written["modules_to_save"]) == ("SEQ_CLS", True)
    note = json.loads((run / "adapter" / "lit_lora.json").read_text())
    assert note["task"] == {"kind": "classification", "labels": ["negative", "positive"]}
    found = predictions(call, run, rows=tmp_path / "held.jsonl")
    assert sum(row["label"] == row["prediction"] for row in found) == round(40 * best["validation_accuracy"])
    assert found == predictions(call, run / "adapter", "--dtype", "fp32", rows=tmp_path / "held.jsonl")
    code, out, _ = call("classify", run, "the film was truly brilliant")
    assert (code, out.splitlines()[0]) == (0, "positive")


def test_an_encoder_decoder_learns_to_write_the_label(call, tmp_path):
    more = {"max_steps": 150, "eval_every": 30, "best_metric": "exact_match"}
    data = {"columns": {"text": "film : {sentence}"}}
    run = trained(call, tmp_path, "t5", peft={"name": "lora", "rank": 8}, train=more, data=data)
    records = [record for record in metrics(run) if "validation_exact_match" in record]
    best = max(record["validation_exact_match"] for record in records)
    assert best > 0.8 > records[0]["validation_exact_match"]
    found = predictions(call, run)
    right = sum(row["prediction"] == row["label"] for row in found)
    code, out, _ = call("classify", run, "--file", tmp_path / "rows.jsonl")
    assert code == 0
    # what greedy decoding writes is right exactly where every token is the likeliest
    assert f"exact match\t{right / len(found):.1%} [" in out
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("bart", "distilbert") else [pytest.mark.slow]) for name in MORE_FAMILIES],
)
def test_other_types_of_transformers_train_and_predict(call, tmp_path, family):
    run = trained(call, tmp_path, family)
    found = predictions(call, run)
    assert found == predictions(call, run / "adapter", "--dtype", "fp32", rows=tmp_path / "rows.jsonl")
    code, out, _ = call("classify", run, found[0]["text"])
    assert (code, out.splitlines()[0].strip()) == (0, found[0]["prediction"])


def test_an_encoder_decoder_without_a_first_token_is_refused(call, tmp_path):
    save_base("mbart", tmp_path / "base", decoder_start_token_id=None)
    code, _, err = call("finetune", "--config", task(tmp_path, "mbart"))
    assert code == 3
    assert "config.json has no decoder_start_token_id" in err


def test_a_target_longer_than_the_positions_is_refused(call, tmp_path):
    save_base("bart", tmp_path / "base", max_position_embeddings=12)
    words = {"label": {"0": "the film was bad and the plot was dull and boring and awful", "1": "truly brilliant"}}
    code, _, err = call("finetune", "--config", task(tmp_path, "bart", data={"values": words}))
    assert code == 3
    assert "a target of 14 tokens, more than the model's positions, 12" in err


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(call, tmp_path, family, method, monkeypatch):
    noisy = {} if family == "t5" else {"hidden_dropout_prob": 0.1}
    save_base(family, tmp_path / "base", **noisy)
    peft = {"name": "lora", "rank": 4, "dropout": 0.1} if method == "lora" else {"name": "full"}
    whole = trained(call, tmp_path, family, peft=peft)
    step = PaddedBatches.step

    def stopping(self: PaddedBatches, number: int):
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    config = task(tmp_path, family, peft=peft, out=str(tmp_path / "parts"))
    monkeypatch.setattr(PaddedBatches, "step", stopping)
    assert call("finetune", "--config", config)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(PaddedBatches, "step", step)
    code, _, err = call("finetune", "--config", config, "--resume")
    assert code == 0, err
    assert metrics(tmp_path / "parts") == metrics(whole)
    for name in ("trainable", "optimizer"):
        first, again = (r / f"checkpoints/step-00000009/{name}.safetensors" for r in (whole, tmp_path / "parts"))
        assert first.read_bytes() == again.read_bytes()
    result = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (whole / result).read_bytes() == (tmp_path / "parts" / result).read_bytes()


def test_full_finetuning_writes_a_model_that_transformers_opens_with_its_labels(call, tmp_path):
    run = trained(call, tmp_path, "bert", peft={"name": "full"}, optimizer={"lr": 3e-3}, train={"max_steps": 30})
    found = predictions(call, run / "model", "--dtype", "fp32", rows=tmp_path / "rows.jsonl")
    assert found == predictions(call, run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    with torch.no_grad():
        for row in found[:8]:
            given = tokenizer(row["text"], return_tensors="pt")
            logits = model(given["input_ids"], given["attention_mask"]).logits[0]
            assert model.config.id2label[int(logits.argmax())] == row["prediction"]
            assert float(logits.softmax(0).max()) == pytest.approx(row["probability"], abs=1e-5)


def test_the_head_alone_trains_where_nothing_else_is_named(call, tmp_path):
    run = trained(call, tmp_path, "bert", peft={"name": "full", "train": []})
    before = transformers.AutoModel.from_pretrained(tmp_path / "base").state_dict()
    after = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").bert.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_numbers_are_learned_where_asked(call, tmp_path):
    rows = tmp_path / "scores.tsv"
    save_base("bert", tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 144)
    given = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows.write_text("sentence\tscore\n" + "".join(f"{r['sentence']}\t{r['label'] * 2 - 0.5}\n" for r in given))
    data = {"path": str(rows), "task": "regression", "values": {}}
    train = {"max_steps": 100, "eval_every": 25, "batch_size": 16, "best_metric": "pearson"}
    run = trained(call, tmp_path, "bert", data=data, peft=WITH_WORDS, train=train, optimizer={"lr": 1e-2})
    assert max(r.get("validation_pearson", 0) for r in metrics(run)) > 0.8
    found = predictions(call, run, rows=rows)
    assert all(abs(row["prediction"] - float(row["label"])) < 1.5 for row in found)


def test_pairs_have_token_types_of_their_own(call, tmp_path):
    save_base("bert", tmp_path / "base")
    same = ["fine", "bad", "dull", "great"]
    rows = [
        {"premise": f"the {a}", "hypothesis": f"a {b}", "label": "yes" if a == b else "no"} for a in same for b in same
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    run = trained(
        call, tmp_path, "bert", data={"path": str(path), "values": {}}, peft={"name": "full"}, optimizer={"lr": 3e-3}
    )
    opened = open_classifier(run / "model", dtype="fp32")
    ids, types = opened.shape.encode(["the fine"], ["a fine"], None)[0]
    assert types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(ids) == 7
    code, out, _ = call("classify", run, "the fine", "--pair", "a fine")
    assert code == 0
    assert out.splitlines()[0] in ("yes", "no")


@pytest.mark.parametrize(("too_long", "said"), [("truncate", "are cut"), ("drop", "are dropped")])
def test_longer_rows_are_counted(call, tmp_path, too_long, said):
    config = task(tmp_path, "bert", data={"max_seq_length": 7, "too_long": too_long})
    code, out, err = call("finetune", "--config", config, "--dry-run")
    assert code == 0, err
    assert f"rows have more than 7 tokens and {said}" in err
    assert "longest row 7" in out
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_trains_on_what(call, tmp_path):
    code, out, err = call("finetune", "--config", task(tmp_path, "roberta"), "--dry-run")
    assert code == 0, err
    for line in ("classifier.dense.trained\t1\t16×16\t272", "task\tclassification, 2 labels: negative, positive"):
        assert line in out
    assert "training rows\t36: " in out
    assert "padding\t" in out


BAD = {
    "wrong column": (["data.columns={text: sentense}"], 3, "no column 'sentense' (did you mean 'sentence'?)"),
    "unknown label": (
        ["data.validation={}/other.jsonl", "data.values={}"],
        3,
        "label '7' is not one of the 2 training labels: 0, 1",
    ),
    "target that matches nothing": (["peft.target_modules=[q_proj]"], 2, "'q_proj' matches no module"),
    "a start from rows": (["peft.init=eva"], 2, "peft.init: eva and lora-ga need a decoder"),
    "a longer context": (["peft={name: longlora}"], 2, "longlora needs one of lit-lora's own decoders"),
    "too long": (["data.max_seq_length=6", "data.too_long=error"], 3, "more than the 6 allowed"),
    "more positions than there are": (["data.max_seq_length=64"], 2, "has positions for 32 tokens"),
    "a text of an encoder": (["data.task=seq2seq"], 2, "is an encoder: it cannot write texts"),
    "a figure of another task": (["train.best_metric=pearson"], 2, "'pearson' is not measured in this run"),
    "a method without a head": (
        ["peft={name: prompt}"],
        2,
        "trains only its own modules, but classifier must",
    ),
    "a decoder": (["model.path={}/decoder"], 3, "a decoder (llama), but recipe classify is for encoders"),
    "a hosted decoder": (["model.path={}/gpt2"], 3, "a decoder (gpt2), but recipe classify is for encoders"),
    "no head": (["model.path={}/vision"], 3, "has no classification head for model_type 'vit'"),
    "unknown model": (["model.path={}/odd"], 3, "model_type 'odd' is not known to transformers"),
    "nothing": (["model.path={}/nothing"], 3, "no such folder, expected a checkpoint folder"),
    "no weights": (["model.path={}/bare"], 3, "its weights cannot be read"),
    "incomplete weights": (["model.path={}/part"], 3, "weights are missing or of another shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(call, tmp_path, case):
    config = task(tmp_path, "bert", peft={"name": "lora"})
    (tmp_path / "other.jsonl").write_text('{"sentence": "fine", "label": 7}\n')
    make_base(tmp_path / "decoder")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, settings in {"odd": {"model_type": "odd"}, "vision": {"model_type": "vit"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    for name in ("bare", "part"):
        save_base("bert", tmp_path / name)
    (tmp_path / "bare" / "model.safetensors").unlink()
    shape = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 3}))
    overrides, expected, message = BAD[case]
    code, out, err = call(
        "finetune", "--config", config, *(o.replace("{}", str(tmp_path), 1) if "/" in o else o for o in overrides)
    )
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == expected, err
    assert len(errors) >= 1
    assert any(message in line for line in errors), err
    assert "Traceback" not in err + out
    assert not (tmp_path / "run").exists()


def test_what_a_folder_lacks_for_predictions_is_one_line(call, tmp_path):
    run = trained(call, tmp_path, "bert")
    save_base("bert", tmp_path / "other", seed=5)
    code, _, err = call("classify", tmp_path / "other", "--adapter", run, "fine film")
    assert (code, "trained on another base model" in err) == (3, True)
    code, _, err = call("classify", tmp_path / "base", "fine film")
    assert (code, "has no trained head (classifier" in err) == (3, True)
    (tmp_path / "new.jsonl").write_text('{"sentence": "fine film", "label": "great"}\n')
    code, _, err = call("classify", run, "--file", tmp_path / "new.jsonl", "--columns", "text=sentence")
    assert (code, "no word for the value 'great'; data.values has words for: 0, 1" in err) == (3, True)
    (tmp_path / "words.jsonl").write_text('{"sentence": "fine film", "label": "positive"}\n')
    assert call("classify", run, "--file", tmp_path / "words.jsonl", "--columns", "text=sentence")[0] == 0
    assert call("classify", run)[0] == 2
    code, _, err = call("evaluate", run, "--data", tmp_path / "rows.jsonl")
    assert (code, "lit-lora classify" in err) == (2, True)


def test_rows_without_labels_get_answers_and_no_figures(call, tmp_path):
    run = trained(call, tmp_path, "bert")
    (tmp_path / "new.jsonl").write_text('{"sentence": "fine film"}\n{"sentence": "dull film and plot"}\n')
    code, out, err = call("classify", run, "--file", tmp_path / "new.jsonl")
    assert code == 0, err
    assert len(out.splitlines()) == 2
    assert set(out.splitlines()) <= {"negative", "positive"}


def test_the_saved_config_makes_the_same_run_again(call, tmp_path):
    run = trained(call, tmp_path, "bert", peft={"name": "ia3"})
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optimizer"]["lr"] == 2e-2
    code, _, err = call("finetune", "--config", run / "config.yaml", f"out={tmp_path / 'again'}")
    assert code == 0, err
    assert metrics(tmp_path / "again") == metrics(run)


def test_activation_checkpointing_changes_no_number(call, tmp_path):
    plain = trained(call, tmp_path, "bert", train={"max_steps": 3})
    code, _, err = call(
        "finetune",
        "--config",
        tmp_path / "config.yaml",
        "train.activation_checkpointing=full",
        f"out={tmp_path / 'again'}",
    )
    assert code == 0, err
    assert metrics(tmp_path / "again") == metrics(plain)
    code, _, err = call(
        "finetune", "--config", tmp_path / "config.yaml", "train.activation_checkpointing=selective", "--overwrite"
    )
    assert (code, "expected none or full" in err) == (2, True)


def test_an_adapter_goes_on_with_its_head_and_its_labels(call, tmp_path):
    first = trained(call, tmp_path, "bert", train={"max_steps": 6, "eval_every": 3})
    reached = min(record["validation_loss"] for record in metrics(first) if "validation_loss" in record)
    (tmp_path / "run").rename(tmp_path / "first")
    peft = {"init_adapter": str(tmp_path / "first" / "adapter")}
    second = trained(call, tmp_path, "bert", peft=peft, train={"max_steps": 2})
    losses = [record["validation_loss"] for record in metrics(second) if "validation_loss" in record]
    assert losses[0] == pytest.approx(reached, rel=1e-4)

    (tmp_path / "run").rename(tmp_path / "second")
    words = {"values": {"label": {"0": "yes", "1": "no"}}}
    code, _, err = call("finetune", "--config", task(tmp_path, "bert", peft=peft, data=words))
    assert code == 3
    assert "predicts " in err
    assert "but the rows ask for" in err


def test_a_validation_file_that_was_replaced_is_not_resumed(call, tmp_path):
    held_out = write_rows(tmp_path / "held.jsonl", 40, seed=1)
    trained(call, tmp_path, "bert", data={"validation": str(held_out)}, train={"max_steps": 2, "eval_rows": 9})
    config = tmp_path / "config.yaml"
    assert call("finetune", "--config", config, "--resume")[0] == 0
    write_rows(held_out, 40, seed=2)
    code, _, err = call("finetune", "--config", config, "--resume")
    assert code == 3
    assert "the validation rows are not those that the run started with" in err
