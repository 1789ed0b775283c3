"""Tiny checkpoints in every format, written the way that llama.cpp, PyTorch and LitGPT write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from tests.tiny import CHATML

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def state_dict(config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a Llama under Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    width, hidden = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    state = {"model.embed_tokens.weight": random(config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        state |= {
            f"{place}input_layernorm.weight": 1 + random(width),
            f"{place}self_attn.q_proj.weight": random(queries, width),
            f"{place}self_attn.k_proj.weight": random(keys, width),
            f"{place}self_attn.v_proj.weight": random(keys, width),
            f"{place}self_attn.o_proj.weight": random(width, queries),
            f"{place}post_attention_layernorm.weight": 1 + random(width),
            f"{place}mlp.gate_proj.weight": random(hidden, width),
            f"{place}mlp.up_proj.weight": random(hidden, width),
            f"{place}mlp.down_proj.weight": random(width, hidden),
        }
    state["model.norm.weight"] = 1 + random(width)
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = random(config["vocab_size"], width)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest]}.{kind}"
    return f"{_GGUF_NAMES[module]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them: row i and i + H/2 of each head side by side."""
    size = weight.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].__getitem__)
    special = {token["content"] for token in model["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def config_metadata(config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """The metadata of a Llama config."""
    return {
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
    }


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file; matrices are quantized to ``kind``, vectors stay float32.

    Args:
        path: The file.
        metadata: By key; the type follows from the Python type.
        tensors: Under llama.cpp's names.
        kind: Of the matrices.
        architecture: ``general.architecture``.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)](key, value)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(state: dict[str, Tensor], config: dict[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Weights under llama.cpp's names and in its row order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        module = name.split(".")[-2]
        tensors[gguf_name(name)] = interleaved(array, heads[module]) if module in heads else array
    return tensors


def write_tiny_gguf(
    path: Path, tokenizer: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32, **changes: Any
) -> Path:
    """A whole tiny model in one GGUF file; ``changes`` are to the config."""
    config = CONFIG | changes
    metadata = config_metadata(config) | tokenizer_metadata(tokenizer)
    return write_gguf(path, metadata, gguf_tensors(state_dict(config), config), kind=kind)


def write_hf_folder(folder: Path, tokenizer: Path, config: dict[str, Any] = CONFIG) -> Path:
    """A folder with config and tokenizer, ready for weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def litgpt_state(state: dict[str, Tensor], config: dict[str, Any] = CONFIG, *, grouped: bool) -> dict[str, Tensor]:
    """Weights under LitGPT's names; ``grouped`` as up to 0.5.3: the rows of q, k and v group by group."""
    names = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.norm.weight": "transformer.ln_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    layer_names = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    }
    result = {}
    for name, tensor in state.items():
        if name in names:
            result[names[name]] = tensor
        elif "self_attn" not in name or "o_proj" in name:
            _, _, layer, rest = name.split(".", 3)
            result[f"transformer.h.{layer}.{layer_names[rest.removesuffix('.weight')]}.weight"] = tensor
    result.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    groups = config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        if grouped:
            parts = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
            result[f"transformer.h.{layer}.attn.attn.weight"] = torch.cat([row for group in parts for row in group])
        else:
            result[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat([q, k, v])
    return result


def write_litgpt(folder: Path, state: dict[str, Tensor], config: dict[str, Any] = CONFIG, **changes: Any) -> Path:
    """A LitGPT folder: lit_model.pth and model_config.yaml; ``changes`` are to the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "lit_model.pth")
    lit = {
        "name": "Tiny",
        "block_size": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "head_size": config["head_dim"],
        "n_embd": config["hidden_size"],
        "n_query_groups": config["num_key_value_heads"],
        "intermediate_size": config["intermediate_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "shared_attention_norm": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": config["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(config["rope_theta"]),
        "rope_condense_ratio": 1,
        "rope_adjustments": None,
        "n_expert": 0,
        "n_expert_per_token": 0,
        "lm_head_bias": False,
        "scale_embeddings": False,
        "sliding_window_size": None,
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(lit | changes))
    return folder
