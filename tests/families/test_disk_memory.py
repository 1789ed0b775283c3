"""A merge of a hosted mixture of experts within the memory of a few tensors, not of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.core_model_loading import revert_weight_conversion

from lit_lora import peft
from lit_lora.checkpoint import CheckpointWriter
from lit_lora.checkpoint.load import load_model
from tests.checkpoint.test_memory import run_and_measure, written_bytes
from tests.peft.tiny import adapted, lora, shake

pytestmark = pytest.mark.slow

CONFIG = DeepseekV3Config(
    vocab_size=4000,
    hidden_size=1024,
    moe_intermediate_size=2816,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=0,
    n_group=1,
    topk_group=1,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    max_position_embeddings=128,
)


def write_base(folder: Path) -> Path:
    """A random checkpoint as transformers stores it, one matrix per expert."""
    CONFIG.architectures, CONFIG.dtype = ["DeepseekV3ForCausalLM"], torch.bfloat16
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    with CheckpointWriter(folder) as writer:
        for name, tensor in revert_weight_conversion(net, net.state_dict()).items():
            writer.add(name, (0.02 * torch.randn(tensor.shape)).to(tensor.dtype))
    return folder


def test_a_hosted_mixture_of_experts_is_merged_and_proved_without_being_in_memory(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = load_model(base)
    config = lora(target_modules="all-linear", target_parameters=["experts.down_proj"])
    adapted(model, config)
    shake(model, 0.05)
    adapter = peft.save_adapter(model, config, tmp_path / "adapter", base=base)
    del model

    peak = run_and_measure("merge", adapter, tmp_path / "merged", "--base", str(base))
    assert written_bytes(tmp_path / "merged") == pytest.approx(written_bytes(base), rel=1e-3)
    # Three models compute one layer of experts in float32, one after the other; imports take 0.3 GB.
    assert 1e8 < peak < 0.6 * written_bytes(base)
