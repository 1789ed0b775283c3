"""The recipe ``adapter`` as a user meets it: config, run, answers, evaluation, what cannot merge."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_lora.cli import main
from lit_lora.peft import METHODS, methods
from lit_lora.train.run_log import read_metrics
from tests.finetune.tiny_task import make_base, write_config, write_rows

Call = Callable[..., tuple[int, str, str]]

SETTINGS: dict[str, dict[str, object]] = {
    "houlsby": {"bottleneck": 8},
    "lin": {"bottleneck": 8},
    "parallel": {"bottleneck": 8},
    "prefix": {"num_virtual_tokens": 4, "init_text": "The quick brown fox"},
    "prompt": {"num_virtual_tokens": 4, "init_text": "The quick brown fox"},
    "p-tuning": {"template": [2, "The answer to", 2]},
    "llama-adapter": {"adapter_len": 4, "adapter_layers": 2},
    "llama-adapter-v2": {"adapter_len": 4, "adapter_layers": 2},
    "composed": {"methods": [{"name": "lora", "rank": 4}, {"name": "prefix", "init_text": "hello there"}]},
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and rows."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def config(task: Path, name: str, **settings: object) -> Path:
    path = write_config(task, recipe="adapter", peft={"name": name, **settings}, train={"samples": 1})
    data = yaml.safe_load(path.read_text())
    del data["optimizer"]  # the method brings its learning rate
    path.write_text(yaml.safe_dump(data))
    return path


def test_every_method_of_the_kind_that_fits_a_decoder_is_tried():
    assert {*SETTINGS, "residual"} == {name for name, (kind, _) in METHODS.items() if kind == "added"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_learns_and_its_adapter_answers_and_is_evaluated(task, call, name):
    code, out, err = call("finetune", "--config", config(task, name, **SETTINGS[name]), "model.dtype=bf16")
    assert code == 0, err
    assert f"next: lit-lora chat {task / 'run'}   or   lit-lora evaluate" in out
    losses = [r["validation_loss"] for r in read_metrics(task / "run" / "metrics.jsonl") if "validation_loss" in r]
    assert losses[-1] < losses[0]
    resolved = yaml.safe_load((task / "run" / "config.yaml").read_text())
    assert resolved["optimizer"]["lr"] == methods()[name].model_validate({"name": name, **SETTINGS[name]}).lr
    code, _, err = call("generate", task / "run", "colour 1?", "--max-new-tokens", 4)
    assert code == 0, err
    code, out, err = call("evaluate", task / "run", "--data", task / "rows.jsonl", "--limit", 4)
    assert code == 0, err
    code, _, err = call("merge", task / "run")
    assert code == 3
    assert "cannot be merged" in err
    assert len(err.strip().splitlines()) <= 3
    assert "recipe: lora" in err


def test_adapters_of_the_first_layers_are_dropped_by_every_command_that_answers(task, call, monkeypatch):
    assert call("finetune", "--config", config(task, "houlsby", bottleneck=8), "optimizer.lr=0.1")[0] == 0
    ask = ("colour 1?", "--max-new-tokens", 8)
    answers = [call("generate", task / "run", *ask, "--drop-layers", number)[1] for number in (0, 1, 2)]
    assert len(set(answers)) == 3
    scores = []
    for number in (0, 1):
        code, out, err = call(
            "evaluate", task / "run", "--data", task / "rows.jsonl", "--skip-base", "--drop-layers", number
        )
        assert code == 0, err
        assert ("without adapters in the first layer" in err) == (number == 1)
        scores.append(out)
    assert scores[0] != scores[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("colour 1?\n"))
    assert call("chat", task / "run", "--max-new-tokens", 8, "--drop-layers", 1)[1] == answers[1]
    code, _, err = call("generate", task / "run", *ask, "--drop-layers", 3)
    assert (code, "drop_layers: expected 0 to 2" in err) == (2, True)
    assert call("finetune", "--config", config(task, "prefix"), f"out={task / 'other'}")[0] == 0
    code, _, err = call("generate", task / "other", *ask, "--drop-layers", 1)
    assert (code, "the model has no houlsby, lin or parallel adapters" in err) == (2, True)


def test_a_learning_rate_that_is_given_holds(task, call):
    path = config(task, "prefix")
    assert call("finetune", "--config", path, "optimizer.lr=0.5", "--dry-run")[0] == 0
    assert "0.5, cosine" in call("finetune", "--config", path, "optimizer.lr=0.5", "--dry-run")[1]
    assert "0.01, cosine" in call("finetune", "--config", path, "optimizer.weight_decay=0.1", "--dry-run")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["recipe=lora"], "peft.name: 'prefix' is not for this recipe (did you mean recipe: adapter?)"),
        (["recipe=full"], "peft.name: 'prefix' is not for this recipe (did you mean recipe: adapter?)"),
        (["peft.name=lora"], "peft.name: 'lora' is not for this recipe (did you mean recipe: lora?)"),
        (["peft.name=full"], "peft.name: 'full' is not for this recipe (did you mean recipe: full?)"),
        (["peft.name=prefx"], "peft.name: unknown name 'prefx' (did you mean 'prefix'?)"),
        (["peft.bottleneck=8"], "unknown key 'peft.bottleneck'"),
        (["peft.rank=8"], "unknown key 'peft.rank'"),
        (["peft.num_virtual_tokens=0"], "peft.num_virtual_tokens"),
        (["peft.num_virtual_tokens=128"], "128 virtual tokens leave no room in the model's context of 128"),
        (["peft.init=zeros", "peft.init_text=a"], "init_text has no effect with init: zeros"),
        (["peft={name: composed, methods: [{name: lora}]}"], "expected a list of at least two methods"),
        (["peft={name: composed, methods: [{name: lora}, {name: prefx}]}"], "'prefx' (did you mean 'prefix'?)"),
        (["peft={name: composed, methods: [{name: prefix}, {name: lora}]}"], "at most one low-rank method, and that"),
        (["peft={name: composed, methods: [{name: lora, rnk: 3}, {name: prefix}]}"], "0: lora: rnk: "),
        (["peft={name: composed, methods: [{name: prompt}, {name: prefix}]}"], "already has a prefix or prompt"),
        (["peft={name: composed, methods: [{name: lora}, {name: lora}]}"], "expected each method once, got lora, lora"),
        (["recipe=adaptor"], "'recipe=adaptor': unknown recipe 'adaptor' (did you mean 'adapter'?)"),
    ],
)
def test_what_does_not_fit_together_is_told(task, call, changes, message):
    code, _, err = call("finetune", "--config", config(task, "prefix"), "--dry-run", *changes)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (task / "run").exists()


def test_rows_longer_than_the_context_that_the_prefix_leaves_are_told(task, call):
    path = config(task, "prompt", num_virtual_tokens=120)
    err = call("finetune", "--config", path, "--dry-run")[2]
    assert "the model's context of 8 (too long: 20 training rows and 4 validation rows);" in err
