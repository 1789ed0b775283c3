"""LoRA over a quantized base against PEFT's LoRA over bitsandbytes' Linear4bit: same tensors, outputs, gradients."""

from __future__ import annotations

import pytest
import torch

from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, bitsandbytes, quantize

# Theirs rounds the scaled update and the base product each to the dtype, ours their sum once.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("name", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_outputs_and_gradients_are_those_of_peft(name: str, double: bool, dtype: torch.dtype) -> None:
    bnb = bitsandbytes.load()
    peft = pytest.importorskip("peft")
    if bnb is None:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128) * 0.1, torch.randn(5, 7, 128)
    theirs = torch.nn.Sequential(
        bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=name)
    )
    theirs[0].weight = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, compress_statistics=double, quant_type=name
    )
    theirs.to("cpu")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    made = quantize(weight.to(dtype), QuantizeConfig.model_validate({"name": name, "double_quant": double}))
    assert torch.equal(made.codes, layer.base_layer.weight.data.view(torch.uint8).view(-1, 1))
    ours = LoRALinear(QuantizedLinear(made, None, dtype), 4, 2.0)
    torch.nn.init.normal_(ours.lora_B, std=0.1)
    layer.lora_A.default.weight.data.copy_(ours.lora_A.data)
    layer.lora_B.default.weight.data.copy_(ours.lora_B.data)
    results = []
    for module, a, b in (
        (ours, ours.lora_A, ours.lora_B),
        (wrapped, layer.lora_A.default.weight, layer.lora_B.default.weight),
    ):
        inputs = x.to(dtype).requires_grad_()
        inputs.grad = None
        y = module(inputs)
        y.float().square().mean().backward()
        assert inputs.grad is not None
        results.append([y.detach().float(), inputs.grad.clone().float(), a.grad, b.grad])
    for mine, other in zip(*results, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(mine / scale, other / scale, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
