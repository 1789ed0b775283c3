"""Merging: the same model, proved; refused when rounding loses the update; switching tasks without drift."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_lora import merge as merging
from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.tensors import open_tensors
from lit_lora.errors import DiskError, InputError, NumericalError, UsageError
from lit_lora.merge import TaskSwitcher, find_places, plan_merge
from lit_lora.merge.write import merged_tensors
from lit_lora.open.folders import find_folders
from lit_lora.peft import load_adapter
from lit_lora.tokenizer import Tokenizer
from tests.peft.tiny import VOCABULARY, adapted, lora, make_adapter, make_model, save_base, shake, token_ids
from tests.tiny import tiny_tokenizer

CASES = {
    "all-linear": {},
    "rslora, q,v": {"target_modules": "q,v", "use_rslora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "norm and biases": {"target_modules": "q,v", "modules_to_save": ["model.norm"], "bias": "lora_only"},
    "tokens": {"target_modules": "q,v", "trainable_tokens": [3, 7]},
    "added tokens": {"target_modules": "q,v", "trainable_tokens": [3, VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]},
}
both_ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def ids_for(case):
    ids = token_ids()
    if case == "added tokens":
        ids[1, :3] = torch.arange(VOCABULARY, VOCABULARY + 3)
    return ids


def merge(adapter, out, **options):
    places = find_places(adapter, base=options.pop("base", None), out=out)
    plan = plan_merge(places, subtract=options.pop("subtract", None), dtype=options.pop("dtype", None))
    return merging.merge(plan, out, **options)


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@both_ties
@pytest.mark.parametrize("case", CASES)
def test_pain_14_15_16_merged_folder_gives_the_logits_of_base_and_adapter(case, tied, tmp_path):
    base = save_base(make_model(tied), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "run" / "adapter", **CASES[case])
    before = folder_hash(base)
    report = merge(adapter, tmp_path / "merged")
    assert folder_hash(base) == before
    ids = ids_for(case)
    model = load_model(base).eval()
    load_adapter(model, adapter)
    merged = load_model(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), model(ids), atol=1e-4, rtol=1e-4)
    changes_one_of_the_two = case.startswith(("embedding", "head"))
    assert report.untied == (tied and changes_one_of_the_two)
    assert merged.config.tie_word_embeddings == (tied and not changes_one_of_the_two)
    assert [block.place for block in report.proof.blocks] == ["layer 0", "layer 1"]
    assert [block.place for block in report.proof.ends] == ["model.embed_tokens", "lm_head"]
    assert report.proof.logits.agreement == 1
    assert report.proof.lost < 1e-4
    assert report.totals.kept == 1
    assert report.totals.relative_error < 1e-5


@both_ties
@pytest.mark.parametrize("case", ["all-linear", "head", "added tokens"])
def test_pain_17_merged_folder_opens_in_transformers_with_equal_logits(case, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_base(make_model(tied), tmp_path / "base")
    merge(make_adapter(base, tmp_path / "adapter", **CASES[case]), tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "merged").eval()
    ids = ids_for(case)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    if case == "all-linear":
        sizes = [
            sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("base", "merged")
        ]
        assert sizes[0] > 0
        assert abs(sizes[1] - sizes[0]) <= 66_000 * len(list((tmp_path / "base").glob("*.safetensors")))


def test_pain_15_only_new_rows_change_and_a_padded_vocabulary_never_shrinks(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    merge(make_adapter(base, tmp_path / "a", trainable_tokens=[VOCABULARY - 2]), tmp_path / "same")
    merge(make_adapter(base, tmp_path / "b", trainable_tokens=[VOCABULARY, VOCABULARY + 1]), tmp_path / "grown")
    for folder, rows, changed in (("same", VOCABULARY, [VOCABULARY - 2]), ("grown", VOCABULARY + 2, [])):
        old, new = open_tensors(base), open_tensors(tmp_path / folder)
        assert json.loads((tmp_path / folder / "config.json").read_text())["vocab_size"] == rows
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert new.shape(name) == (rows, old.shape(name)[1])
            differ = (new.read(name)[:VOCABULARY] != old.read(name)).any(dim=1)
            assert differ.nonzero().flatten().tolist() == changed


def test_bfloat16_merge_rounds_once_from_float32(tmp_path):
    base = save_base(make_model(dtype=torch.bfloat16), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    model = load_model(base).eval()
    load_adapter(model, adapter)
    layer = model.model.layers[1].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.scaling * layer.lora_B @ layer.lora_A
    stored = open_tensors(tmp_path / "merged").read("model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(stored, exact.detach().bfloat16(), atol=0, rtol=2**-8)
    assert (stored == exact.detach().bfloat16()).float().mean() > 0.99  # ties of two ways to sum a product
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(open_tensors(tmp_path / "merged").read(norm), open_tensors(base).read(norm))


def test_pain_16_a_merge_that_loses_the_update_is_refused_with_the_remedy(tmp_path):
    base = save_base(make_model(dtype=torch.bfloat16), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", size=0.001)
    with pytest.raises(NumericalError, match=r"rounding to bf16 loses \d\d% of the adapter's effect") as error:
        merge(adapter, tmp_path / "merged")
    assert "--dtype fp16" in error.value.hint
    assert "--dtype fp32" in error.value.hint
    assert not (tmp_path / "merged").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    lossy = merge(adapter, tmp_path / "lossy", allow_lossy=True)
    assert lossy.proof.lost > 0.2
    assert lossy.totals.relative_error > 0.2
    assert lossy.totals.kept < 0.9
    exact = merge(adapter, tmp_path / "exact", dtype=torch.float32)
    assert exact.proof.lost < 1e-3
    assert exact.totals.relative_error < 1e-3
    assert load_model(tmp_path / "exact").lm_head.weight.dtype == torch.float32
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"


def test_the_forecast_is_what_the_merge_then_does(tmp_path):
    base = save_base(make_model(dtype=torch.bfloat16), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", size=0.01, target_modules=["q_proj", "embed_tokens", "lm_head"])
    plan = plan_merge(find_places(adapter, base=base))
    expected = merging.forecast(plan, torch.bfloat16)
    report = merge(adapter, tmp_path / "merged", allow_lossy=True)
    assert report.totals == expected.totals
    assert report.proof.lost == pytest.approx(expected.proof.lost, rel=1e-3)
    assert 0.01 < report.proof.lost < 1
    finer = merging.forecast(plan, torch.float16)
    assert finer.proof.lost < 0.3 * expected.proof.lost


@pytest.mark.parametrize("damage", ["scaling", "tensor"])
def test_pain_16_the_proof_notices_a_wrong_merge(damage, tmp_path, monkeypatch):
    base = save_base(make_model(), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")

    def wrong(plan):
        if damage == "scaling":
            doubled = {name: replace(update, scaling=2 * update.scaling) for name, update in plan.updates.items()}
            yield from merged_tensors(replace(plan, updates=doubled))
            return
        for name, tensor, proof in merged_tensors(plan):
            yield name, (plan.base[name] if name.endswith("1.mlp.down_proj.weight") else tensor), proof

    monkeypatch.setattr("lit_lora.merge.folder.merged_tensors", wrong)
    with pytest.raises(NumericalError, match=r"layer [01]: merged and base \+ adapter differ"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_overflow_of_float16_is_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    base = save_base(model, tmp_path / "base")
    with pytest.raises(NumericalError, match="beyond"):
        merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", dtype=torch.float16)


@both_ties
def test_subtracting_one_task_and_adding_another_gives_the_other_merged(tied, tmp_path):
    base = save_base(make_model(tied), tmp_path / "base")
    first = make_adapter(base, tmp_path / "first", seed=5)
    second = make_adapter(base, tmp_path / "second", seed=6, target_modules="q,v", rank=3)
    merge(first, tmp_path / "one")
    merge(second, tmp_path / "two")
    merge(second, tmp_path / "switched", base=tmp_path / "one", subtract=first)
    ids = token_ids()
    with torch.no_grad():
        expected, got = (load_model(tmp_path / name)(ids) for name in ("two", "switched"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_replaced_values_cannot_be_subtracted(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    first = make_adapter(base, tmp_path / "first", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head\.weight was replaced"):
        merge(make_adapter(base, tmp_path / "second"), tmp_path / "out", subtract=first)


@both_ties
def test_a_hundred_task_switches_give_the_bits_of_a_fresh_merge(tied, tmp_path):
    base = save_base(make_model(tied, torch.bfloat16), tmp_path / "base")
    tasks = [
        make_adapter(base, tmp_path / "a", seed=5),
        make_adapter(base, tmp_path / "b", seed=6, target_modules=["v_proj", "lm_head"]),
        make_adapter(base, tmp_path / "c", seed=7, trainable_tokens=[2, VOCABULARY]),
        None,
    ]
    before = folder_hash(base)
    model = load_model(base).eval()
    switcher = TaskSwitcher(model, base)
    for turn in range(100):
        switcher.switch(tasks[turn % 4])
    assert folder_hash(base) == before
    for task in tasks:
        switcher.switch(task)
        if task is None:
            fresh = load_model(base).eval()
        else:
            merge(task, tmp_path / f"merged-{task.name}")
            fresh = load_model(tmp_path / f"merged-{task.name}").eval()
        ours, theirs = model.state_dict(), fresh.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == fresh.config.tie_word_embeddings
        assert model.config.vocab_size == fresh.config.vocab_size
        assert torch.equal(model(token_ids()), fresh(token_ids()))


def test_switching_is_refused_on_a_model_with_an_adapter_and_keeps_the_task_on_a_wrong_one(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    other = save_base(make_model(seed=9), tmp_path / "other")
    adapter = make_adapter(base, tmp_path / "adapter")
    foreign = make_adapter(other, tmp_path / "foreign")
    model = load_model(base)
    switcher = TaskSwitcher(model, base)
    switcher.switch(adapter)
    expected = model(token_ids())
    with pytest.raises(InputError, match="another base model"):
        switcher.switch(foreign)
    assert torch.equal(model(token_ids()), expected)
    fresh = load_model(base)
    load_adapter(fresh, adapter)
    with pytest.raises(UsageError, match="adapter"):
        TaskSwitcher(fresh, base)


def test_pain_10_an_adapter_for_another_base_is_refused_unless_forced(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    other = save_base(make_model(seed=9), tmp_path / "other")
    adapter = make_adapter(base, tmp_path / "adapter")
    places = find_places(adapter, base=other)
    with pytest.raises(InputError, match="trained on another base model"):
        plan_merge(places)
    assert plan_merge(places, force=True).updates


def test_existing_output_is_kept(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("kept")
    with pytest.raises(DiskError, match="already exists"):
        merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "mine").read_text() == "kept"


def test_places_of_a_run_come_from_its_config(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    run = tmp_path / "run"
    make_adapter(base, run / "adapter")
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(UsageError, match=r"base model .* not found"):
        find_places(run)
    (run / "config.yaml").write_text(f"model:\n  path: {moved}\n")
    places = find_places(run)
    assert (places.adapter, places.base, places.out) == (run / "adapter", moved, run / "merged")
    assert find_folders(run) == (moved, run / "adapter")
    assert find_places(run / "adapter", base=moved).out == run / "merged"
    (run / "adapter").rename(run / "gone")
    with pytest.raises(InputError, match="written no adapter yet"):
        find_places(run)


def test_the_adapters_tokenizer_goes_with_the_merged_model(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    (base / "chat_template.jinja").write_text("base")
    adapter = make_adapter(base, tmp_path / "adapter")
    written = peft.model_card("a", base="b", method="LoRA", data="a|b.jsonl, 9 rows", adapter=True)
    (adapter / "README.md").write_text(written)
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "base"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "LoRA, rank 8" in card
    assert "| Data | a\\|b.jsonl, 9 rows |" in card
    assert str(tmp_path) not in card


@both_ties
def test_pain_15_tokens_added_by_text_go_through_tokenizer_training_merge_and_reload(tied, tmp_path):
    base = save_base(make_model(tied, vocabulary=384), tmp_path / "base")
    tiny_tokenizer(base)
    tokenizer = Tokenizer.load(base)
    config = lora(target_modules="q,v", trainable_tokens=["<tool>", "</tool>", "<none>"])
    config = config.with_token_ids(tokenizer.add_tokens)
    model = adapted(load_model(base), config)
    shake(model)
    peft.save_adapter(model, config, tmp_path / "run" / "adapter", base=base)
    tokenizer.save(tmp_path / "run" / "adapter")
    merge(tmp_path / "run", tmp_path / "run" / "merged")
    again = Tokenizer.load(tmp_path / "run" / "merged")
    ids = again.encode("a <tool>x</tool>", special=True)
    assert {384, 385} <= set(ids)
    assert again.fingerprint == tokenizer.fingerprint
    merged = load_model(tmp_path / "run" / "merged").eval()
    assert merged.lm_head.weight.shape == merged.model.embed_tokens.weight.shape == (387, 16)
    with torch.no_grad():
        wanted, got = model.eval()(torch.tensor([ids])), merged(torch.tensor([ids]))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_pain_21_merging_a_checkpoint_of_gigabytes_needs_little_memory(tmp_path):
    """Peak of anonymous memory over a bare import of torch: at most 2 x the largest tensor + 1 GB."""
    script = textwrap.dedent(
        """
        import json, sys, threading, time
        from pathlib import Path
        import torch

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        start, peak, done = anonymous(), [0], threading.Event()
        def watch():
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous())
        threading.Thread(target=watch, daemon=True).start()
        from lit_lora import merge
        places = merge.find_places(Path(sys.argv[1]), base=Path(sys.argv[2]), out=Path(sys.argv[3]))
        merge.merge(merge.plan_merge(places), places.out)
        done.set()
        print(json.dumps(peak[0] - start))
        """
    )
    base, largest = big_base(tmp_path / "base")
    adapter = big_adapter(base, tmp_path / "adapter")
    command = [sys.executable, "-c", script, str(adapter), str(base), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout)
    total = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    print(f"merged {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert total > 2e9
    assert peak <= 2 * largest + 1e9


def big_base(folder):
    """A random bfloat16 checkpoint of about 2.4 GB, written as a stream."""
    from lit_lora.checkpoint.save import CheckpointWriter
    from lit_lora.model import CausalLM, ModelConfig

    config = ModelConfig(
        vocab_size=64_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        dtype="bfloat16",
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CausalLM(config).named_parameters()}
    with CheckpointWriter(folder) as writer:
        for name, shape in shapes.items():
            writer.add(
                name, torch.ones(shape).bfloat16() if len(shape) == 1 else (torch.randn(shape) * 0.02).bfloat16()
            )
    return folder, max(shape.numel() for shape in shapes.values()) * 2


def big_adapter(base, folder):
    return make_adapter(base, folder, size=0.02, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"])
