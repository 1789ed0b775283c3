"""Tiny random models of every causal language model that transformers has.

``build(key)`` gives the model, ``save(key, folder)`` its checkpoint. A key is a ``model_type``, or ``TYPE#VARIANT``
where one config cannot switch on all that a type can do; ``KEYS`` lists them, ``NOT_BUILT`` the types that are left
out, each with the reason. No model is built at import.

Every model has 4 layers, 4 heads of 8, a vocabulary of 384 (that of ``tests.tiny.tiny_tokenizer``), 128 positions, and
windows of 5 tokens. Norms, biases, sinks and gates are random, since ones and zeros would hide a part that is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

__all__ = ["KEYS", "NOT_BUILT", "VOCABULARY", "build", "config", "model_type", "save"]

VOCABULARY = 384

Settings = Mapping[str, Any]

# Sizes by the names of fields, for each field that a type's config has.
_SIZES: Settings = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "dim_head", "d_head", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "dim_ff", "d_inner", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 5),
    "attention_chunk_size": 5,
    "local_attention": 10,  # both sides together
    "use_sliding_window": True,
    "max_window_layers": 2,
    **dict.fromkeys(("hidden_size_per_layer_input", "altup_dim"), 8),
    "vocab_size_per_layer_input": VOCABULARY,
    # Mixture of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # Latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # Recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 16),
    # Other parts of composite models
    "patch_size": 4,
    "image_size": 8,
    **dict.fromkeys(("out_hidden_size", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"), 32),
    "num_position_embeddings": 16,
    "image_token_id": 5,
    "image_token_index": 5,
    "video_token_id": 6,
    "audio_token_id": 7,
}

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LATENT: Settings = {"num_key_value_heads": 4, "head_dim": 4}  # transformers rotates `head_dim` dimensions
_DOTS3_TEXT: Settings = {"num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 4}
_DOTS3_VISION: Settings = {"mlp_layer_types": ["dense"] * 4}
_COMPRESSED = ["sliding_attention", "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"]
_MULTIPLIERS: Settings = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_SOFTCAPS: Settings = {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_GEMMA3_TEXT: Settings = {"query_pre_attn_scalar": 12, "layer_types": _ALTERNATING}
_GEMMA4_TEXT: Settings = {"layer_types": _ALTERNATING, "global_head_dim": 16}
_QWEN4_TEXT: Settings = {
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 1,
    "ple_embed_dim": 8,
}

# Key -> what is set beyond the sizes. Types that are not listed need no more than them.
_TABLE: dict[str, Settings] = {
    # Decoders like Llama
    "llama#biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama#llama3": {"rope_parameters": _LLAMA3},
    "llama#yarn": {"rope_parameters": _YARN},
    "llama#dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "ministral": {"layer_types": _ALTERNATING},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}},
    "qwen2#full": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3#full": {"use_sliding_window": False, "tie_word_embeddings": True, "head_dim": 16},
    "gemma2": _SOFTCAPS,
    "gemma3_text": _GEMMA3_TEXT,
    "gemma3_text#scaled": {
        **_GEMMA3_TEXT,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        "final_logit_softcapping": 3.0,
    },
    "vaultgemma": _SOFTCAPS,
    "phi3#longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "rope_parameters": _LONGROPE,
    },
    "phi3#partial": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "tie_word_embeddings": True},
    "olmo": {"clip_qkv": 0.3},
    "smollm3#full": {"use_sliding_window": False},
    "granite": _MULTIPLIERS,
    "granite_swa": _MULTIPLIERS,
    "hyperclovax": _MULTIPLIERS,
    "exaone4#full": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "stablelm": {"use_qkv_bias": True},
    "stablelm#parallel": {"qk_layernorm": True, "use_parallel_residual": True},
    "phi": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "logit_scale": 0.5,
        "layer_types": _ALTERNATING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "seed_oss": {"attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    # Decoders of other builds
    "gpt2#scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode#heads": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_neox#sequential": {"use_parallel_residual": False},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "falcon#new": {"new_decoder_architecture": True},
    "falcon#alibi": {"alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True},
    "mpt": {"attn_config": {"clip_qkv": 0.3}},
    "bloom#post_norm": {"apply_residual_connection_post_layernorm": True},
    "opt#post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    # Mixtures of experts
    "qwen2_moe#dense_layers": {"mlp_only_layers": [0], "norm_topk_prob": True, "use_sliding_window": False},
    "qwen3_moe#dense_layers": {"mlp_only_layers": [0], "norm_topk_prob": True, "use_sliding_window": False},
    "olmoe": {"clip_qkv": 0.3},
    "granitemoe": _MULTIPLIERS,
    "granitemoe_swa": _MULTIPLIERS,
    "granitemoeshared": _MULTIPLIERS,
    "gpt_oss": {"layer_types": _ALTERNATING, "rope_parameters": _YARN},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "jetmoe": {"kv_channels": 8},
    "cohere2_moe": {"logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.3, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "inkling_text": {
        "logits_mup_width_multiplier": 1.0,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    # Latent attention
    "axk1": _LATENT,
    "axk2": _LATENT,
    "deepseek_v2": {**_LATENT, "n_group": 2},
    "deepseek_v2#whole_query": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": _LATENT,
    "deepseek_v3#yarn": {**_LATENT, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "dots3_note_text": _DOTS3_TEXT,
    "dots3_note": {"text_config": _DOTS3_TEXT, "vision_config": _DOTS3_VISION},
    "deepseek_v4": {
        "layer_types": _COMPRESSED,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    # Recurrent and convolutional layers
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {**_MULTIPLIERS, "layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    # Parts beside attention and MLP
    "gemma3n_text": {"layer_types": _ALTERNATING, "num_kv_shared_layers": 2, "laurel_rank": 8},
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_text#shared": {**_GEMMA4_TEXT, "num_kv_shared_layers": 2, "final_logit_softcapping": 3.0},
    "gemma4_text#experts": {**_GEMMA4_TEXT, "enable_moe_block": True, "attention_k_eq_v": True},
    "qwen4_exp_text": _QWEN4_TEXT,
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    # Composite checkpoints, whose text model is finetuned
    "gemma3#composite": {"text_config": _GEMMA3_TEXT},
    "gemma4#composite": {"text_config": _GEMMA4_TEXT},
    "qwen3_5#composite": {},
    "mistral3#composite": {},
    "mistral3#ministral3#composite": {
        "text_config": {"model_type": "ministral3", "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}}
    },
}

_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_ENCODER_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "trocr", "whisper",
)  # fmt: skip

NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(_ENCODERS, "an encoder: its checkpoints were not trained to predict the next token"),
    **dict.fromkeys(_ENCODER_DECODERS, "an encoder-decoder, of which transformers can also build the decoder alone"),
    "blt": "its patches come from an entropy model of its own",
    "cpmant": "not causal: each token of a prompt sees all others",
    "gemma3n": "its vision tower needs timm; its text model gemma3n_text is built",
    "gemma4_assistant": "drafts tokens for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it reads",
    "moshi": "speaks: its text is one of two streams",
    "musicgen": "predicts audio codes, not text",
    "musicgen_melody": "predicts audio codes, not text",
    "reformer": "hashes tokens into buckets, which differ with the length of the text",
    "xlnet": "not causal: it predicts tokens in any order",
}

KEYS = [
    *(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in NOT_BUILT),
    *(key for key in _TABLE if "#" in key),
]
"""Every key that ``build`` takes: each type of transformers, then the variants."""

# Buffers that training moves, and checkpoints hold.
_TRAINED_BUFFERS = ("e_score_correction_bias", "balancing_biases", "layer_scalar")


def model_type(key: str) -> str:
    """The ``model_type`` that ``key`` is a variant of."""
    return key.partition("#")[0]


def _settings(kind: type[PretrainedConfig], more: Settings) -> dict[str, Any]:
    """``more`` over the sizes of the fields that ``kind`` has, the configs of parts included."""
    fields = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in _SIZES.items() if name in fields}
    if kind.sub_configs:
        defaults = kind()
        for name in kind.sub_configs:
            part = getattr(defaults, name)
            if part is None:
                continue
            more_of_part = {"model_type": part.model_type, **more.get(name, {})}
            is_other = more_of_part["model_type"] != part.model_type  # some composites take several text models
            kind_of_part = CONFIG_MAPPING[more_of_part["model_type"]] if is_other else type(part)
            settings[name] = _settings(kind_of_part, more_of_part)
    return settings | {name: value for name, value in more.items() if name not in kind.sub_configs}


def config(key: str) -> PretrainedConfig:
    """The config of ``key``."""
    kind = CONFIG_MAPPING[model_type(key)]
    return kind(**_settings(kind, _TABLE.get(key, {})))


def build(key: str, *, dtype: torch.dtype = torch.float32, attn: str = "eager") -> PreTrainedModel:
    """The model of ``key``, in evaluation mode, the same at each call; ``attn`` is transformers' attention function."""
    auto = AutoModelForImageTextToText if key.endswith("#composite") else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config(key), attn_implementation=attn, trust_remote_code=False)
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(_TRAINED_BUFFERS)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.parameters(), *buffers]:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.1 * noise)
            else:  # around what it starts from: 1 of a norm, 0 of a bias, a rate of decay
                parameter.add_(0.2 * noise)
    return model.to(dtype).eval()


def save(key: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write the model of ``key`` to ``folder`` as transformers saves it, and return it."""
    model = build(key, dtype=dtype)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model
