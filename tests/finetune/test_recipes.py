"""The recipes end to end, called as functions and as files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lit_lora.finetune import classify, full, lora, qlora
from safetensors.torch import load_file

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import validation_batches
from lit_lora.errors import InputError, UsageError
from lit_lora.merge import find_places, merge, plan_merge
from lit_lora.model.decoder import DecoderLayer
from lit_lora.open.decoder import open_model
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.recipe import RECIPES, Options, load_data, load_recipe
from lit_lora.tokenizer import Tokenizer, encode_prompt
from lit_lora.train.validation import validation_loss
from tests.finetune.tiny_task import ROOT, contents, make_base, write_config, write_rows
from tests.train.tiny_run import checkpoints, losses, metrics


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and rows."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def finetuned(config: Path, *overrides: str, **options: bool) -> Path:
    recipe, settings = load_recipe(config, overrides)
    return recipe(settings, Options(**options))


def held_out_loss(config: Path, model) -> float:
    """The validation loss of ``model`` on the rows that the run held out."""
    settings = load_recipe(config, [])[1]
    data = load_data(settings, Tokenizer.load(settings.model.path))
    assert data.prepared.validation is not None
    return validation_loss(model, list(validation_batches(data.prepared.validation, 64)))


def test_lora_writes_an_adapter_with_the_best_weights_and_leaves_the_base_alone(task):
    config, base = (
        write_config(task, train={"eval_every": 1, "max_steps": 12}, optimizer={"lr": 0.3}),
        contents(task / "base"),
    )
    folder = finetuned(config)
    assert folder == task / "run"
    by_step = {r["step"]: r["validation_loss"] for r in metrics(folder) if "validation_loss" in r and r["step"]}
    best = min(by_step, key=by_step.__getitem__)
    assert checkpoints(folder) == sorted({best, 12})
    model = load_model(task / "base")
    report = peft.load_adapter(model, folder / "adapter")
    assert report.adapter.tensors == 2 * 7 * 2
    stored = load_file(folder / "checkpoints" / f"step-{best:08d}" / "trainable.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in peft.trainable_state(model).items())
    assert held_out_loss(config, model.eval()) == pytest.approx(by_step[best], rel=1e-5)
    assert contents(task / "base") == base
    card = (folder / "adapter" / "README.md").read_text()
    assert "rows.jsonl, 20 rows" in card
    assert f"| Best step | {best} |" in card


def test_full_writes_a_whole_model_with_the_best_weights(task):
    config = write_config(task, recipe="full", optimizer={"lr": 1e-3}, model={"dtype": "bf16"})
    folder = finetuned(config)
    model = load_model(folder / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    best = min((r for r in metrics(folder) if "validation_loss" in r and r["step"]), key=lambda r: r["validation_loss"])
    assert held_out_loss(config, model) == pytest.approx(best["validation_loss"], rel=1e-4)
    assert Tokenizer.load(folder / "model").fingerprint == Tokenizer.load(task / "base").fingerprint
    assert losses(folder)[-1] < losses(folder)[0]


PARTS = {
    "modules by name": (["mlp"], lambda name: "mlp" in name),
    "a layer": (["layers.1"], lambda name: "layers.1." in name),
    "norms only": (["*norm"], lambda name: "norm" in name),
    "embedding and norms": (["embed_tokens", "*norm"], lambda name: "norm" in name or "embed" in name),
    "embedding only": (["embed_tokens"], lambda name: "embed" in name),
}


@pytest.mark.parametrize("part", PARTS)
def test_part_of_the_weights_can_be_trained(task, part):
    names, trains = PARTS[part]
    folder = finetuned(write_config(task, recipe="full", peft={"name": "full", "train": names}))
    before, after = load_model(task / "base"), load_model(folder / "model")
    for name, value in before.named_parameters():
        assert torch.equal(value, after.get_parameter(name)) != trains(name), name
    validated = [record["validation_loss"] for record in metrics(folder) if "validation_loss" in record]
    assert min(validated[1:]) < validated[0]


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_the_saved_config_makes_the_same_run_again(task, recipe):
    first = finetuned(write_config(task, recipe=recipe))
    again = finetuned(first / "config.yaml", f"out={task / 'again'}")
    assert metrics(again) == metrics(first)
    weights = "adapter/adapter_model.safetensors" if recipe == "lora" else "model/model.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()


def test_new_tokens_are_trained_and_their_tokenizer_is_saved_with_the_adapter(task):
    folder = finetuned(write_config(task, peft={"trainable_tokens": ["<ticket>"]}))
    tokenizer = Tokenizer.load(folder / "adapter")
    assert tokenizer.vocab_size == 385
    assert tokenizer.encode("<ticket>", special=True) == [384]
    model = load_model(task / "base")
    peft.load_adapter(model, folder / "adapter")
    assert model(torch.tensor([[384]])).shape == (1, 1, 385)


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_pain_03_what_is_trained_by_the_plain_template_brings_it_along(task, recipe):
    (task / "base" / "chat_template.jinja").unlink()
    folder = finetuned(write_config(task, recipe=recipe, out=str(task / "out")))
    if recipe == "lora":
        places = find_places(folder)
        merge(plan_merge(places), places.out, allow_lossy=True)
        result = places.out
    else:
        result = folder / "model"
    conversation = [{"role": "user", "content": "colour 3?"}]
    theirs = transformers.AutoTokenizer.from_pretrained(result, local_files_only=True, trust_remote_code=False)
    ours = Tokenizer.load(task / "base")
    assert not ours.has_own_template
    expected = encode_prompt(ours, conversation)
    assert theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False) == expected
    assert encode_prompt(Tokenizer.load(result), conversation) == expected


def test_pain_03_a_chosen_template_is_remembered_by_adapter_merge_and_generation(task, capsys):
    config = write_config(task, model={"path": str(task / "base"), "dtype": "fp32", "chat_template": "zephyr"})
    folder = finetuned(config)
    assert "chat template\tzephyr" in capsys.readouterr().out
    assert "chat_template: zephyr" in (folder / "config.yaml").read_text()

    conversation = [{"role": "user", "content": "colour 3?"}]
    text = "<|user|>\ncolour 3?<|im_end|>\n<|assistant|>\n"  # the base's EOS is <|im_end|>
    places = find_places(folder)
    merge(plan_merge(places), places.out, allow_lossy=True)
    for opened in (open_model(folder, device="cpu"), open_model(places.out, device="cpu")):
        prompt = encode_prompt(opened.tokenizer, conversation)
        assert opened.tokenizer.decode(prompt, skip_special=False) == text
    theirs = transformers.AutoTokenizer.from_pretrained(places.out, local_files_only=True, trust_remote_code=False)
    assert theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) == text


def test_a_template_for_tools_of_the_base_does_not_come_back_in_the_merged_model(task):
    (task / "base" / "additional_chat_templates").mkdir()
    (task / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    folder = finetuned(write_config(task, model={"path": str(task / "base"), "chat_template": "zephyr"}))
    places = find_places(folder)
    merge(plan_merge(places), places.out, allow_lossy=True)
    assert not (places.out / "additional_chat_templates").exists()


def test_a_template_that_needs_a_new_token_is_trained_with_it(task):
    config = write_config(
        task,
        model={"path": str(task / "base"), "chat_template": "phi-3"},
        peft={"trainable_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]},
    )
    tokenizer = Tokenizer.load(finetuned(config) / "adapter")
    assert tokenizer.end_of_turn_id == tokenizer.token_id("<|end|>") == 386


@pytest.mark.parametrize("name", ["phi-3", "chatlm", "nowhere.jinja"])
def test_a_template_that_cannot_be_used_is_refused_before_the_weights_are_read(task, name):
    (task / "base" / "model.safetensors").unlink()
    config = write_config(task, model={"path": str(task / "base"), "chat_template": name})
    with pytest.raises((InputError, UsageError), match=name):
        finetuned(config)


def test_a_base_without_a_template_gets_a_stated_one(task, capsys):
    (task / "base" / "chat_template.jinja").unlink()
    finetuned(write_config(task), dry_run=True)
    expected = "chat template\tplain (the checkpoint has none; model.chat_template=NAME chooses another)"
    assert expected in capsys.readouterr().out


def test_plain_text_leaves_a_base_without_a_template_as_it_is(task):
    (task / "base" / "chat_template.jinja").unlink()
    write_rows(task / "rows.jsonl", [{"text": f"colour {number}" * 4} for number in range(24)])
    folder = finetuned(write_config(task))
    assert not (folder / "adapter" / "chat_template.jinja").exists()


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_a_start_from_rows_is_made_saved_merged_and_resumed(task, recipe, init, capsys, monkeypatch):
    sections = {"recipe": recipe, "peft": {"init": init, "rank": 3, "init_rows": 10}}
    sections |= {"quantize": {"name": "int8"}} if recipe == "qlora" else {}
    config = write_config(task, **sections)
    if (recipe, init) == ("qlora", "lora-ga"):
        with pytest.raises(UsageError, match="quantized"):
            finetuned(config)
        assert not (task / "run").exists()
        return
    finetuned(config, dry_run=True)
    assert not (task / "run").exists()
    whole = finetuned(config)
    assert losses(whole)[-1] < losses(whole)[0]
    adapter = peft.read_adapter(whole / "adapter")
    ranks = {len(tensor) for name, tensor in adapter.values.items() if name.endswith("lora_A.weight")}
    assert len(ranks) > 1 if init == "eva" else ranks == {6}
    parts = finetuned(config, f"out={task / 'parts'}", "train.max_steps=8", "train.save_every=1", "train.keep_last=8")
    for step in checkpoints(parts):
        if step > 4:
            shutil.rmtree(parts / "checkpoints" / f"step-{step:08d}")
    monkeypatch.setattr(LoRAConfig, "init_from_data", None)  # a resumed run does not look at rows again
    again = finetuned(parts / "config.yaml", resume=True)
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    (parts / "start" / "method.json").write_text("{")
    with pytest.raises(InputError, match=r"method\.json: cannot be read"):
        finetuned(parts / "config.yaml", resume=True)


def test_answers_shown_while_training_leave_it_as_it_is(task, capsys):
    with_dropout = {"peft": {"dropout": 0.3}, "model": {"dtype": "bf16"}}
    quiet = finetuned(write_config(task, **with_dropout))
    capsys.readouterr()
    shown = finetuned(write_config(task, **with_dropout, out=str(task / "shown"), train={"samples": 2}))
    assert metrics(shown) == metrics(quiet)
    assert contents(shown / "checkpoints") == contents(quiet / "checkpoints")
    lines = [line for line in capsys.readouterr().err.splitlines() if ": answers '" in line]
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in (0, 0, 3, 3, 6, 6, 8, 8)]
    assert all(", expected '" in line for line in lines)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "classify"])  # not of a decoder
def test_activation_checkpointing_recomputes_and_changes_no_number(task, recipe, monkeypatch):
    settings = {"recipe": recipe, **({"quantize": {"name": "int8"}} if recipe == "qlora" else {})}
    plain, calls = finetuned(write_config(task, **settings)), []
    monkeypatch.setattr(DecoderLayer, "_forward", counting(DecoderLayer._forward, calls))
    sections = {"train": {"activation_checkpointing": "full"}, "out": str(task / "again")}
    again = finetuned(write_config(task, **settings, **sections))
    assert metrics(again) == metrics(plain)
    trained = 8 * 2 * 2  # steps x layers x (forward, and again in the backward)
    assert sum(calls) == trained


def counting(function, calls):
    """``function``, noting for each call whether it was of training (the estimate runs layers without memory too)."""

    def wrapper(*args):
        calls.append(torch.is_grad_enabled() and args[1].device.type == "cpu")
        return function(*args)

    return wrapper


def test_a_recipe_file_runs_from_any_folder(task, tmp_path):
    write_config(task)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, ROOT / "finetune" / "lora.py", "--config", "../config.yaml", "train.max_steps=2"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"next: lit-lora chat {task / 'run'}   or   lit-lora merge {task / 'run'}\n")
    assert (task / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert list(elsewhere.iterdir()) == []


def test_a_recipe_file_ends_in_one_line_and_an_exit_code(task, tmp_path):
    write_config(task, recipe="full", model={"path": str(task / "nothing")})
    command = [sys.executable, ROOT / "finetune" / "full.py", "--config", task / "config.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {task / 'nothing'}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("recipe", [lora, qlora, full, classify])
def test_a_recipe_reads_as_one_story(recipe):
    """The loop, the data and the method are called, never written out: the file stays short."""
    lines = Path(recipe.__file__).read_text().splitlines()
    assert len(lines) < 70
    assert not any(line.lstrip().startswith(("for ", "while ", "try:")) for line in lines)
    assert sum(line.startswith("class ") for line in lines) == 1  # its config
