"""Checkpoints of other families: loaded, quantized, merged, saved, with transformers as the oracle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from lit_lora.checkpoint.load import load_model
from lit_lora.quantize import QuantizeConfig, QuantizedLinear
from tests.families import tiny_configs

TEXT = [
    "gpt2", "gpt_neox", "falcon", "mpt", "bloom", "opt", "phi", "mixtral", "qwen3_moe", "granitemoe", "deepseek_v3",
    "gpt_oss", "falcon_h1", "mamba", "qwen3_5",
]  # fmt: skip
COMPOSITE = ["gemma3#composite", "gemma4#composite", "qwen3_5#composite", "mistral3#composite"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """The checkpoint of a key, written once, and transformers' model of it."""
    written: dict[str, tuple[Path, PreTrainedModel]] = {}

    def save(key: str) -> tuple[Path, PreTrainedModel]:
        if key not in written:
            folder = tmp_path_factory.mktemp(key.replace("#", "_"))
            written[key] = folder, tiny_configs.save(key, folder)
        return written[key]

    return save


def token_ids() -> torch.Tensor:
    return torch.randint(8, tiny_configs.VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=token_ids()).logits[0]


@torch.no_grad()
def ours(model) -> torch.Tensor:
    return model.logits(model.hidden_states(token_ids()))[0]


def assert_equal(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("key", TEXT + COMPOSITE)
def test_a_loaded_model_computes_what_transformers_does(key: str, saved) -> None:
    folder, net = saved(key)
    model = load_model(folder)
    left_empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert left_empty == []
    assert_equal(ours(model), theirs(net))


def test_a_head_in_the_files_of_a_composite_that_seems_tied_is_used_as_transformers_does(saved, tmp_path) -> None:
    folder, _ = saved("mistral3#composite")
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(tiny_configs.VOCABULARY, 32, generator=torch.Generator().manual_seed(1))
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert not model.config.tie_word_embeddings
    net = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(net.lm_head.weight, head)
    assert_equal(ours(model), theirs(net))


@pytest.mark.parametrize("key", ["gpt2", "falcon", "qwen3_moe", "gemma3#composite", "mamba"])
def test_quantized_while_loading_is_what_its_dequantized_weights_compute(key: str, saved) -> None:
    folder, net = saved(key)
    model = load_model(folder, quantize=QuantizeConfig(name="int8"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) >= 8
    full = load_model(folder)
    with torch.no_grad():
        for name, layer in layers.items():
            full.get_parameter(f"{name}.weight").copy_(layer.dequantize())
    assert_equal(ours(model), ours(full))
    assert not torch.allclose(ours(model), theirs(net), rtol=1e-4, atol=1e-4)


def test_a_dtype_is_applied_except_where_transformers_keeps_float32(saved) -> None:
    folder, _ = saved("deepseek_v3")
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, stored)
