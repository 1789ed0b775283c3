"""GLoRA's search: the evolution by itself, the forms' shared numbers, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.lowrank.glora import GLoRALinear
from lit_lora.peft.lowrank.glora_search import Search, evolve
from tests.finetune.test_recipes import finetuned, held_out_loss, task
from tests.finetune.tiny_task import write_config
from tests.peft.tiny import adapted, make_model, shake, token_ids

__all__ = ["task"]


def method(**settings: object) -> peft.Method:
    return peft.methods()["glora"].model_validate({"name": "glora", "search": {}, **settings})


def test_the_evolution_finds_the_best_and_scores_none_twice():
    sizes, calls = [[8, 4, 1, 0]] * 6, []

    def score(genes: tuple[int, ...]) -> float:
        calls.append(genes)
        return float(sum(abs(gene - wanted) for gene, wanted in zip(genes, (0, 3, 1, 2, 2, 0), strict=True)))

    best, loss = evolve(sizes, Search(population=40, parents=10, generations=25), score)
    assert (best, loss) == ((0, 3, 1, 2, 2, 0), 0.0)
    assert len(calls) == len(set(calls)) < 40 * 25
    assert calls[0] == (0,) * 6
    assert evolve(sizes, Search(generations=2), score) == evolve(sizes, Search(generations=2), score)
    few, _ = evolve(sizes, Search(population=40, parents=10, generations=9, most=0.3), lambda genes: float(sum(genes)))
    assert sum(sizes[0][gene] for gene in few) <= 0.3 * 48
    with pytest.raises(UsageError, match=r"found no selection of forms with at most 0\.01"):
        evolve(sizes, Search(most=0.01), score)


def test_narrower_forms_are_parts_of_the_same_numbers():
    model = adapted(make_model(), method(C="lora", D="vector", E="constant"))
    shake(model)
    layer = own_modules(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, GLoRALinear)
    assert len(layer.choices) == 4 * 4 * 3 * 3 * 2
    model.eval()
    x = torch.randn(5, 16)
    for forms in layer.choices:
        layer.take(forms)
        expected, size = layer(x).detach(), layer.size(forms)
        fresh = adapted(make_model(), method(C="lora", D="vector", E="constant"))
        copy = own_modules(fresh)["model.layers.0.self_attn.q_proj"]
        copy.load_state_dict(layer.state_dict())
        copy.finalize(forms)
        torch.testing.assert_close(copy.eval()(x), expected, atol=1e-6, rtol=1e-6)
        assert sum(p.numel() for n, p in copy.named_parameters() if "base_layer" not in n) == size


def test_training_draws_forms_measuring_takes_the_widest_and_a_checkpoint_draws_the_same():
    model = adapted(make_model(), method())
    shake(model)
    ids = token_ids()
    with torch.no_grad():
        wide = [model.eval()(ids) for _ in range(2)]
        drawn = [model.train()(ids) for _ in range(2)]
        assert torch.equal(*wide)
        assert not torch.equal(*drawn)
        assert torch.equal(model.eval()(ids), wide[0])
    gradients = []
    for what in ("none", "full"):
        model.train().checkpoint_activations(what)
        torch.manual_seed(3)
        model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_run_chooses_forms_saves_only_these_and_merges(task: Path, capsys: pytest.CaptureFixture[str]):
    search = {"population": 6, "parents": 3, "generations": 3, "most": 0.5}
    config = write_config(task, peft={"name": "glora", "search": search}, train={"max_steps": 12})
    run = finetuned(config)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "chose forms" in line]
    noted = json.loads((run / "adapter" / "lit_lora.json").read_text())["method"]
    assert noted["search"] is None
    assert len({json.dumps(forms) for forms in noted["forms_pattern"].values()}) > 2
    model = load_model(task / "base")
    peft.load_adapter(model, run / "adapter")
    trained = sum(p.numel() for p in peft.trainable_state(model).values())
    full = adapted(load_model(task / "base"), method(search=None))
    assert trained <= 0.5 * peft.count_parameters(full).trainable
    assert f"{trained:,} of" in line
    assert f"{held_out_loss(config, model.eval()):.4f}" in line
    again = finetuned(config, f"out={task / 'again'}")
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()


def test_a_search_without_validation_rows_is_refused_before_training(task: Path):
    config = write_config(task, peft={"name": "glora", "search": {}}, data={"validation": None})
    with pytest.raises(UsageError, match="scored on validation rows, and there are none"):
        finetuned(config)
    assert not (task / "run").exists()
    with pytest.raises(ValueError, match="at most as many parents as the population of 2, got 4"):
        method(search={"population": 2})
