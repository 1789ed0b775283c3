"""LQ-LoRA: the choice under a budget is the best, respected in bytes, and follows the weights of errors."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.checkpoint.load import decoder_linears, empty_model
from lit_lora.errors import UsageError
from lit_lora.model import ModelConfig
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.core.svd import Weights
from lit_lora.quantize import QuantizeConfig, Quantized, count_quantized, stored_bytes
from lit_lora.quantize.budget import choose
from tests.peft.tiny import adapted
from tests.quantize.model_folder import make_folder


def best(losses: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """By trying all."""
    found = []
    for places in itertools.product(*(range(len(row)) for row in losses)):
        if sum(row[place] for row, place in zip(sizes, places, strict=True)) <= budget:
            found.append(sum(row[place] for row, place in zip(losses, places, strict=True)))
    return min(found)


def test_the_choice_is_that_of_trying_all():
    random.seed(0)
    for _ in range(200):
        counts = [random.randint(1, 5) for _ in range(random.randint(1, 4))]
        losses = [[random.random() for _ in range(count)] for count in counts]
        sizes = [[random.randint(1, 20) for _ in range(count)] for count in counts]
        budget = random.randint(sum(map(min, sizes)), sum(map(max, sizes)))
        chosen = choose(losses, sizes, budget)
        assert sum(row[place] for row, place in zip(sizes, chosen, strict=True)) <= budget
        loss = sum(row[place] for row, place in zip(losses, chosen, strict=True))
        assert loss == pytest.approx(best(losses, sizes, budget))


def test_many_matrices_fill_the_budget_and_a_tighter_one_never_loses_less():
    random.seed(1)
    sizes = [[2 * n, 3 * n, 4 * n, 8 * n] for n in (random.randint(1000, 9999) for _ in range(200))]
    losses = [[weight / 4**bits for bits in (2, 3, 4, 8)] for weight in (random.random() for _ in sizes)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    before = float("inf")
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        budget = round(least + share * (most - least))
        chosen = choose(losses, sizes, budget)
        used = sum(row[place] for row, place in zip(sizes, chosen, strict=True))
        loss = sum(row[place] for row, place in zip(losses, chosen, strict=True))
        assert loss <= before
        assert 0.98 * budget <= used <= budget
        before = loss
    assert chosen == [3] * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "base")


def started(folder: Path, weights: dict[str, Weights] | None = None, **settings: Any) -> torch.nn.Module:
    chosen = peft.methods()["lq-lora"].model_validate({"name": "lq-lora", "rank": 2, **settings})
    original = load_model(folder)
    decomposer = chosen.decomposer(
        empty_model(ModelConfig.from_folder(folder)),
        QuantizeConfig(),
        lambda name: original.get_submodule(name).weight.detach(),
        weights,
    )
    model = adapted(load_model(folder, quantize=decomposer), chosen)
    decomposer.fill(model)
    return model


def held(model: torch.nn.Module) -> int:
    return sum(stored_bytes(module) for module in model.modules() if isinstance(module, Quantized))


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.2, 6.0])
def test_the_bytes_are_within_the_budget_and_update_and_codes_near_the_weights(folder, bits):
    model, original = started(folder, bits=bits), load_model(folder)
    count = count_quantized(model)
    assert 0.85 * bits * count / 8 < held(model) <= bits * count / 8
    in_gib = started(folder, gib=bits * count / 8 / 2**30)
    assert held(in_gib) == held(model)
    for name, module in own_modules(model).items():
        weight, codes = original.get_submodule(name).weight, module.base_layer.weight
        together = codes + module.scaling * module.lora_B @ module.lora_A
        assert (together - weight).norm() < (codes - weight).norm()


def test_a_large_budget_takes_the_most_bits(folder):
    types = {module.config.name for module in started(folder, bits=9).modules() if isinstance(module, Quantized)}
    assert types == {"int8"}


def test_a_layer_whose_errors_matter_gets_more_bits(folder):
    original, name = load_model(folder), "model.layers.1.self_attn.q_proj"
    weights = {}
    for layer in decoder_linears(original):
        rows, columns = original.get_submodule(layer).weight.shape
        size = 1e4 if layer == name else 1.0
        weights[layer] = Weights.of_squares(torch.full((rows,), size), torch.full((columns,), size))
    plain, weighed = started(folder, bits=3), started(folder, weights, bits=3)
    config = weighed.get_submodule(name).base_layer.quantized.config
    assert config.code_bits == 8 > plain.get_submodule(name).base_layer.quantized.config.code_bits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2.0}, r"peft.bits: a budget of 2 bits per weight is too small, expected at least 2\.1"),
        ({"gib": 1e-6}, r"peft.gib: a budget of 1e-06 GiB is too small, expected at least "),
        ({"rank": 33}, r"peft.rank: 33 is too large"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_one_line(folder, settings, message):
    with pytest.raises(UsageError, match=message):
        started(folder, **settings)


def test_a_type_beside_the_budget_is_refused():
    chosen = peft.methods()["lq-lora"].model_validate({"name": "lq-lora"})
    with pytest.raises(UsageError, match="quantize: has no effect with lq-lora"):
        chosen.for_quantized_base(QuantizeConfig(name="int8"))
    with pytest.raises(ValueError, match="bits and gib are both budgets"):
        peft.methods()["lq-lora"].model_validate({"name": "lq-lora", "bits": 2.5, "gib": 1})
