"""Our decoder against transformers, live, on tiny random configs that switch on every rope and window kind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lit_lora.model import CausalLM, KVCache, ModelConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "plain": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "multi_query": (LlamaConfig, {"num_key_value_heads": 1}),
    "no_groups": (LlamaConfig, {"num_key_value_heads": 6}),
    "head_dim": (LlamaConfig, {"head_dim": 16}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "theta": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": (LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "yarn": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "longrope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                **LONGROPE,
            }
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "sliding_window": (MistralConfig, {"sliding_window": 7}),
}


def _pair(name: str) -> tuple[torch.nn.Module, CausalLM]:
    kind, changes = CASES[name]
    config = kind(**{**SIZES, **changes})
    torch.manual_seed(0)
    theirs = {LlamaConfig: LlamaForCausalLM, MistralConfig: MistralForCausalLM}[kind](config).eval()
    for parameter in theirs.parameters():  # the default std of 0.02 would hide a wrong rotation
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
    ours = CausalLM(ModelConfig.from_hf(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [9, 100])
def test_logits_equal_transformers(name: str, length: int) -> None:
    theirs, ours = _pair(name)
    ids = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_transformers(name: str) -> None:
    theirs, ours = _pair(name)
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    for model, logits in ((theirs, theirs(ids).logits), (ours, ours(ids))):
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    for (name_, parameter), (_, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        scale = reference.grad.abs().max()
        torch.testing.assert_close(parameter.grad / scale, reference.grad / scale, rtol=1e-4, atol=1e-4, msg=name_)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dynamic", "longrope")])
def test_cached_decoding_equals_the_full_pass(name: str) -> None:
    _, ours = _pair(name)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    cache = KVCache(2, 30)
    with torch.no_grad():
        pieces = [ours(ids[:, start:end], cache=cache) for start, end in ((0, 11), (11, 12), (12, 13), (13, 30))]
        torch.testing.assert_close(torch.cat(pieces, 1), ours(ids), rtol=1e-4, atol=1e-4)
