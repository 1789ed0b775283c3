"""QA-LoRA: the update of sums of groups, LoRA at groups of one, merging between the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import own_modules
from lit_lora.quantize import Groups, QuantizeConfig
from tests.peft.tiny import adapted, make_model, shake, token_ids
from tests.quantize.model_folder import make_folder

INT4 = QuantizeConfig(name="int4", block_size=32)


def method(name: str = "qa-lora", **settings: Any) -> peft.Method:
    return peft.methods()[name].model_validate({"name": name, "rank": 2, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "base")


def over(folder: Path, chosen: peft.Method, config: QuantizeConfig = INT4) -> torch.nn.Module:
    return adapted(load_model(folder, quantize=config), chosen).eval()


def test_groups_of_one_are_lora_bit_for_bit(folder):
    grouped, plain = over(folder, method(group_size=1)), over(folder, method("lora"))
    shake(grouped)
    shake(plain)
    with torch.no_grad():
        assert torch.equal(grouped(token_ids()), plain(token_ids()))
    assert peft.trainable_state(grouped).keys() == peft.trainable_state(plain).keys()


@pytest.mark.parametrize("group", [None, 64])
def test_a_layer_adds_the_product_of_sums_and_its_gradients_are_those(folder, group):
    model = over(folder, method(group_size=group, rank=1))
    shake(model)
    layer, size = own_modules(model)["model.layers.0.mlp.down_proj"], group or 32
    x = torch.randn(3, 5, 128, requires_grad=True)
    y = layer(x)
    sums = x.unflatten(-1, (-1, size)).sum(-1)
    A, B = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    expected = x @ layer.base_layer.weight.T + layer.scaling * (sums @ A.T) @ B.T
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)
    theirs = torch.autograd.grad(expected, (x, A, B), g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_the_count_is_rank_times_groups_plus_out(folder):
    model = over(folder, method())
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    assert peft.count_parameters(model).trainable == 2 * 2 * sum(out + wide // 32 for out, wide in linears)


@pytest.mark.parametrize(("group", "fits"), [(32, True), (64, True), (16, False)])
def test_a_matrix_takes_an_update_into_its_zeros_where_it_is_constant_in_every_group(folder, group, fits):
    model = over(folder, method(group_size=group, rank=1))
    shake(model)
    for module in own_modules(model).values():
        base, update = module.base_layer.quantized, module.updates()["weight"]
        merged = base.plus(update.left * update.scaling, update.right)
        assert (merged is not None) == fits == module_keeps(group)
        if merged is not None:
            exact = update.apply(base.dequantize(torch.float32), 0, base.shape[0])
            torch.testing.assert_close(merged.dequantize(torch.float32), exact, atol=1e-5, rtol=1e-5)
            assert torch.equal(merged.codes, base.codes)
            assert torch.equal(merged.scale, base.scale)
            assert not torch.equal(merged.zero, base.zero)


def module_keeps(group: int) -> bool:
    return method(group_size=group).keeps_codes(INT4)


def test_groups_of_equal_weights_are_exact():
    weight = torch.cat([torch.full((4, 32), 0.3), torch.linspace(-1, 1, 128).view(4, 32)], dim=1)
    made = Groups.of(weight, INT4)
    values = made.dequantize(torch.float32)
    assert torch.equal(values[:, :32], weight[:, :32])
    torch.testing.assert_close(values[:, 32:], weight[:, 32:], atol=0.02, rtol=0)


def test_a_saved_adapter_gives_the_same_logits(folder, tmp_path):
    model, chosen = over(folder, method()), method()
    shake(model)
    peft.save_adapter(model, chosen.for_quantized_base(INT4), tmp_path / "adapter", base=folder)
    again = load_model(folder, quantize=peft.quantization_of(tmp_path / "adapter"))
    report = peft.load_adapter(again, tmp_path / "adapter")
    assert report.adapter.config.group_size == 32
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids()), model(token_ids()))


def test_a_base_without_groups_is_refused(folder):
    with pytest.raises(
        UsageError, match=r"needs a base in int4 or int2, but model\.layers\.0\.self_attn\.q_proj is not"
    ):
        adapted(make_model(), method())
    with pytest.raises(UsageError, match="needs a base in int4 or int2, got nf4-dq"):
        over(folder, method(), QuantizeConfig())
    with pytest.raises(UsageError, match="got int8"):
        method().for_quantized_base(QuantizeConfig(name="int8"))
