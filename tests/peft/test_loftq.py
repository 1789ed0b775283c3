"""LoftQ: codes and update together are nearer to the weights than the codes alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.checkpoint.load import empty_model
from lit_lora.errors import UsageError
from lit_lora.model import ModelConfig
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.core.svd import Weights, low_rank
from lit_lora.peft.quantized.decompose import decompose
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, quantize
from tests.peft.tiny import adapted
from tests.quantize.model_folder import make_folder

NF4, INT2 = QuantizeConfig(double_quant=False), QuantizeConfig(name="int2")


def gaussian() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(512, 512)


def error(weight: torch.Tensor, config: QuantizeConfig, rank: int, turns: int) -> float:
    return decompose(weight, lambda rest: quantize(rest, config), rank, turns).error


@pytest.mark.parametrize(
    ("config", "alone", "expected"),
    [
        (NF4, 0.0921, [0.0867, 0.0827, 0.0808, 0.0796, 0.0787]),
        (INT2, 0.4511, [0.4248, 0.4132, 0.4110, 0.4110, 0.4109]),
    ],
    ids=str,
)
def test_errors_on_normal_values_are_those_of_methods(config, alone, expected):
    weight = gaussian()
    codes = (quantize(weight, config).dequantize(torch.float32) - weight).norm() / weight.norm()
    assert codes.item() == pytest.approx(alone, abs=1e-4)
    assert [error(weight, config, 16, turns) for turns in range(1, 6)] == pytest.approx(expected, abs=4e-4)


def test_one_turn_is_that_of_peft(monkeypatch):
    """PEFT's own start, which runs on CUDA only: its device is taken for the CPU here. It leaves scaling out."""
    loftq = pytest.importorskip("peft.utils.loftq_utils")
    pytest.importorskip("bitsandbytes")
    to = torch.Tensor.to

    def on_the_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple("cpu" if argument == "cuda" else argument for argument in args)
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in kwargs.items()}
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", on_the_cpu)
    monkeypatch.setattr(loftq, "clear_device_cache", lambda: None)
    import bitsandbytes as bnb

    theirs_to = bnb.nn.Params4bit.to
    monkeypatch.setattr(bnb.nn.Params4bit, "to", lambda self, *args: theirs_to(self, "cpu"))
    weight = gaussian()[:192] * 0.02
    for turns in (1, 3):
        codes, A, B = loftq.loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=turns)
        ours = decompose(weight, lambda rest: quantize(rest, NF4), 8, turns)
        their_error = ((weight - codes - B @ A).norm() / weight.norm()).item()
        assert ours.error == pytest.approx(their_error, rel=1e-3)
        if turns == 1:  # later turns start from other last bits, and codes beside a midpoint follow them
            torch.testing.assert_close(ours.quantized.dequantize(torch.float32), codes, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(ours.left @ ours.right, B @ A, atol=2e-6, rtol=1e-3)


def test_the_full_rank_loses_nothing_and_a_higher_rank_less():
    weight = gaussian()[:64, :128]
    errors = [error(weight, NF4, rank, 1) for rank in (1, 8, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (1200, 1100)], ids=str)
def test_low_rank_is_the_best_approximation(shape):
    torch.manual_seed(3)
    decaying = torch.randn(shape[0], 30) * 0.8 ** torch.arange(30) @ torch.randn(30, shape[1])
    matrix = decaying + 0.01 * torch.randn(shape)
    values = torch.linalg.svdvals(matrix)
    left, right = low_rank(matrix, 6)
    assert (matrix - left @ right).norm().item() == pytest.approx(values[6:].norm().item(), rel=1e-3)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(low_rank(matrix, 6), (left, right), strict=True))


def test_weights_of_one_change_nothing_and_others_lower_the_weighted_error():
    torch.manual_seed(4)
    matrix, ones = torch.randn(48, 64), Weights(torch.ones(48), torch.ones(64))
    for plain, weighted in zip(low_rank(matrix, 4), low_rank(matrix, 4, ones), strict=True):
        torch.testing.assert_close(plain, weighted)
    weights = Weights(torch.rand(48) * 5 + 0.1, torch.rand(64) * 5 + 0.1)
    plain, weighted = low_rank(matrix, 4), low_rank(matrix, 4, weights)
    lost = [weights.apply(matrix - left @ right).norm() for left, right in (plain, weighted)]
    assert lost[1] < lost[0]


def never(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is read before it comes")


def method(name: str = "loftq", **settings: Any) -> peft.Method:
    return peft.methods()[name].model_validate({"name": name, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("settings", [{}, {"alpha": 3.0}, {"use_rslora": True, "rank": 4}], ids=str)
@pytest.mark.parametrize("config", [NF4, QuantizeConfig(block_size=32), INT2, QuantizeConfig(name="int8")], ids=str)
def test_codes_and_scaled_update_are_nearer_to_every_weight_than_codes_alone(folder, config, settings):
    chosen, original = method(**settings), load_model(folder)
    decomposer = chosen.decomposer(empty_model(ModelConfig.from_folder(folder)), config, never)
    model = adapted(load_model(folder, quantize=decomposer), chosen)
    decomposer.fill(model)
    own = own_modules(model)
    assert len(own) == 14
    for name, module in own.items():
        weight = original.get_submodule(name).weight
        assert isinstance(module.base_layer, QuantizedLinear)
        together = module.base_layer.weight + module.scaling * module.lora_B @ module.lora_A
        alone = quantize(weight, config).dequantize(torch.float32)
        assert (together - weight).norm() < (alone - weight).norm(), name
        update = module.updates()["weight"].apply(module.base_layer.weight, 0, weight.shape[0])
        torch.testing.assert_close(update, together, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_adapted_are_quantized_as_they_are(folder):
    chosen, original = method(target_modules="q,v", rank_pattern={"v_proj": 2}), load_model(folder)
    decomposer = chosen.decomposer(empty_model(ModelConfig.from_folder(folder)), NF4, never)
    model = adapted(load_model(folder, quantize=decomposer), chosen)
    decomposer.fill(model)
    for name, module in original.named_modules():
        if name.endswith(("k_proj", "up_proj")):
            expected = quantize(module.weight, NF4).dequantize(torch.float32)
            assert torch.equal(model.get_submodule(name).weight, expected)
    assert model.get_submodule("model.layers.1.self_attn.v_proj").rank == 2
    norms = {name: math.fsum(p.abs().sum().item() for p in m.parameters()) for name, m in own_modules(model).items()}
    assert min(norms.values()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 33}, r"peft.rank: 33 is too large for .*k_proj \(32×64\), expected at most 32"),
        ({"target_modules": ["lm_head"]}, "needs at least one quantized layer to adapt"),
        ({"target_modules": ["q_prj"]}, "matches no module"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_before_any_tensor_is_read(folder, settings, message):
    with pytest.raises(UsageError, match=message):
        method(**settings).decomposer(empty_model(ModelConfig.from_folder(folder)), NF4, never)


def test_an_init_that_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="has no effect: A and B start from"):
        method(init="gaussian")


def test_a_folder_that_is_quantized_already_is_refused(folder, tmp_path):
    from lit_lora.checkpoint.convert import convert, open_source, plan_conversion

    convert(plan_conversion(open_source(folder), quantize=NF4), tmp_path / "packed")
    decomposer = method().decomposer(empty_model(ModelConfig.from_folder(tmp_path / "packed")), NF4, never)
    with pytest.raises(UsageError, match="already quantized"):
        load_model(tmp_path / "packed", quantize=decomposer)
