"""What transformers' decoders do with their parts, where methods must follow or refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import UsageError
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.loss import backward
from tests.families import tiny_configs
from tests.families.opened import micro_batch


def trained(key: str, folder: Path, name: str, **settings: object):
    """The tiny model of ``key`` after a backward pass through a method."""
    tiny_configs.save(key, folder)
    model = load_model(folder)
    peft.freeze(model)
    peft.methods()[name].model_validate({"name": name, **settings}).apply(model)
    backward(model.train(), micro_batch(0), 1.0)
    return model


def test_a_bias_that_a_layer_reads_of_another_trains(tmp_path):
    model = trained("mamba", tmp_path, "bitfit")
    biases = [p for name, p in model.named_parameters() if "conv1d" in name and p.requires_grad]
    assert len(biases) == len(model.blocks())
    assert all(bias.grad is not None and bias.grad.any() for bias in biases)


def test_indices_that_a_layer_passes_on_are_not_taken_for_its_output(tmp_path):
    model = trained("glm_moe_dsa", tmp_path, "lin", bottleneck=4, task_embedding=False)
    own = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in own)


def test_adapters_have_the_width_of_the_residual_stream_after_a_mixture_of_experts(tmp_path):
    model = trained("dbrx", tmp_path, "houlsby", bottleneck=4)
    adapters = [p for name, p in model.named_parameters() if name.endswith("ffn.adapter.down")]
    assert {p.shape[1] for p in adapters} == {model.config.hidden_size}


@pytest.mark.parametrize(
    ("key", "name", "settings", "message"),
    [
        ("qwen4_exp_text", "lin", {"task_embedding": False}, "adapters 32 wide do not fit this model, which has 128"),
        ("opt", "parallel", {}, "adapters 32 wide do not fit this model, which has 48 values per token"),
        ("ctrl", "houlsby", {"target_modules": ["ffn"]}, "a sequence of layers cannot hold an adapter"),
        ("longcat_flash", "llama-adapter", {}, "needs a decoder of lit-lora's own"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(key, name, settings, message, tmp_path):
    with pytest.raises(UsageError, match=message) as refused:
        trained(key, tmp_path, name, **settings)
    assert "\n" not in str(refused.value)


def test_blocks_that_share_their_weights_are_quantized_together(tmp_path):
    tiny_configs.save("zamba", tmp_path)
    model, plain = load_model(tmp_path, quantize=QuantizeConfig(name="int8")), load_model(tmp_path)
    ids = micro_batch(0).input_ids
    with torch.no_grad():
        got, expected = (m.logits(m.hidden_states(ids)) for m in (model, plain))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert float((got - expected).norm() / expected.norm()) < 0.05
