"""The tables of architectures, by the ``model_type`` in ``config.json``.

A decoder that differs from Llama's only in names and defaults needs no more than an entry in ``FAMILIES`` to load,
train by every method, merge and save.
"""

from functools import partial
from typing import Any

from lit_lora.model.families import rules
from lit_lora.model.families.hosted import HOSTED, LLAMA_LIKE
from lit_lora.model.families.names import Block, DecoderNames, Family, PartNames

__all__ = ["ENCODERS", "FAMILIES", "HOSTED", "LLAMA_LIKE", "Block", "DecoderNames", "Family", "PartNames"]

_NORMS_OF_HEADS: dict[str, Any] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_POST_NORMS: dict[str, Any] = {
    "attention_norm": None,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": None,
    "mlp_post_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORMS: dict[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FUSED_QKV: dict[str, Any] = dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj")
_FUSED_MLP: dict[str, Any] = dict.fromkeys(("mlp_gate", "mlp_in"), "mlp.gate_up_proj")

_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
_GEMMA_BLOCK = Block(norm_offset=1.0, scaled_embedding=True)
_GEMMA2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "query_pre_attn_scalar": 256}
_GEMMA2_READS = frozenset(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"))
_GLM = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5}
_GLM_CONTEXT = {"attention_bias": True, "max_position_embeddings": 131072}

_EXPERTS = frozenset(("num_experts", "num_experts_per_tok", "norm_topk_prob"))
_EXPERTS_IN_SOME_LAYERS = _EXPERTS | {"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        complete=lambda fields: {key: fields.get("use_bias") or False for key in ("attention_bias", "mlp_bias")},
        block=Block(rope_pairs="neighbors"),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        fixed={"attention_bias": False, "mlp_bias": False},
        reads=frozenset(("layer_types", "no_rope_layers")),
        complete=rules.exaone4,
        names=DecoderNames(**_NORMS_OF_HEADS, **_POST_NORMS),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        defaults={**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192},
        complete=rules.gemma,
        block=_GEMMA_BLOCK,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        defaults={
            **_GEMMA2,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        reads=_GEMMA2_READS | {"layer_types"},
        complete=rules.gemma2,
        names=DecoderNames(**_SANDWICH_NORMS),
        block=_GEMMA_BLOCK,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        defaults={
            **_GEMMA2,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        reads=_GEMMA2_READS | {"layer_types"},
        complete=rules.gemma3,
        names=DecoderNames(**_NORMS_OF_HEADS, **_SANDWICH_NORMS),
        block=_GEMMA_BLOCK,
    ),
    "glm": Family(
        "GlmForCausalLM",
        defaults=_GLM | _GLM_CONTEXT,
        fixed={"attention_out_bias": False, "mlp_bias": False},
        names=DecoderNames(**_FUSED_MLP),
        block=Block(rope_pairs="neighbors"),
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        defaults=_GLM | _GLM_CONTEXT,
        fixed={"attention_out_bias": False, "mlp_bias": False},
        names=DecoderNames(
            **_FUSED_MLP, attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"
        ),
        block=Block(rope_pairs="neighbors"),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        defaults={"attention_multiplier": 1.0},
        reads=frozenset(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        fixed={"mlp_bias": False},
        complete=rules.hunyuan,
        names=DecoderNames(query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm"),
        block=Block(norm_after_rope=True),
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        fixed={"attention_bias": False, "mlp_bias": False},
        reads=frozenset(("layer_types",)),
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        fixed={"mlp_bias": False},
        names=DecoderNames(**_NORMS_OF_HEADS, **_POST_NORMS),
        block=Block(query_key_norm="width"),
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        defaults={
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "rope_theta": 500000.0,
            "rope_local_base_freq": 500000.0,
        },
        fixed={"mlp_bias": False},
        reads=frozenset(("layer_types",)),
        complete=partial(rules.every, 4),
        names=DecoderNames(**_NORMS_OF_HEADS, **_POST_NORMS),
        block=Block(query_key_norm="width"),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        fixed={"attention_bias": False, "mlp_bias": False},
        complete=rules.phi3,
        names=DecoderNames(**_FUSED_QKV, **_FUSED_MLP),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
        fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        reads=frozenset(("layer_types",)),
        complete=rules.qwen,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
        fixed={"mlp_bias": False},
        reads=frozenset(("layer_types",)),
        complete=rules.qwen,
        names=DecoderNames(**_NORMS_OF_HEADS),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
        reads=frozenset(("attention_out_bias",)),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        reads=frozenset(("layer_types", "no_rope_layers")),
        complete=rules.smollm3,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM",
        defaults={"rope_theta": 500000.0, "max_position_embeddings": 4096, "num_experts": 7, "num_experts_per_tok": 5},
        fixed={"mlp_bias": False},
        reads=_EXPERTS,
        complete=rules.experts,
        names=DecoderNames(**_NORMS_OF_HEADS, **_POST_NORMS),
        block=Block(query_key_norm="width"),
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        defaults={"attention_multiplier": 1.0, "num_experts": 8, "num_experts_per_tok": 2},
        fixed={"norm_topk_prob": True},
        reads=_EXPERTS | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
        complete=rules.experts,
        names=DecoderNames(
            mlp="block_sparse_moe",
            router="block_sparse_moe.router",
            experts="block_sparse_moe.experts",
            experts_in="block_sparse_moe.experts.gate_up_proj",
            experts_out="block_sparse_moe.experts.down_proj",
        ),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        fixed={"attention_bias": False, "mlp_bias": False, "norm_topk_prob": True},
        reads=_EXPERTS,
        complete=rules.experts,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        defaults={
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        fixed={"attention_out_bias": False, "mlp_bias": False},
        reads=_EXPERTS_IN_SOME_LAYERS | {"layer_types", "shared_expert_intermediate_size"},
        complete=rules.qwen2_moe,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        fixed={"mlp_bias": False},
        reads=_EXPERTS_IN_SOME_LAYERS,
        complete=rules.qwen3_moe,
        names=DecoderNames(**_NORMS_OF_HEADS),
    ),
}
"""Decoders, which this package implements."""

ENCODERS: dict[str, PartNames] = {
    "bert": PartNames(
        embedding="word_embeddings",
        query="query",
        key="key",
        value="value",
        attention="attention.output.dense",
        mlp="*[0-9].output.dense",  # of a numbered layer, unlike attention.output.dense
        mlp_out="*[0-9].output.dense",
    ),
    "deberta-v2": PartNames(
        embedding="word_embeddings",
        query="query_proj",
        key="key_proj",
        value="value_proj",
        attention="attention.output.dense",
        mlp="*[0-9].output.dense",
        mlp_out="*[0-9].output.dense",
    ),
    "t5": PartNames(
        embedding="embed_tokens",  # of encoder and decoder; both are tied to `shared`, which is never called
        query="*Attention.q",  # SelfAttention and EncDecAttention
        key="*Attention.k",
        value="*Attention.v",
        attention="*Attention.o",
        mlp="DenseReluDense",
        mlp_out="DenseReluDense.wo",
    ),
    "bart": PartNames(
        embedding="embed_tokens",  # of encoder and decoder; both are tied to `shared`, which is never called
        query="*_attn.q_proj",  # self_attn and encoder_attn
        key="*_attn.k_proj",
        value="*_attn.v_proj",
        attention="*_attn.out_proj",
        mlp="fc2",
        mlp_out="fc2",
    ),
    "distilbert": PartNames(
        embedding="word_embeddings",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        attention="out_lin",
        mlp="ffn",
        mlp_out="ffn.lin2",
    ),
    "modernbert": PartNames(
        embedding="tok_embeddings",
        query="Wqkv",  # query, key and value are one product
        key="Wqkv",
        value="Wqkv",
        attention="attn.Wo",
        mlp="mlp",
        mlp_out="mlp.Wo",
    ),
}
"""Encoders and encoder-decoders, which transformers implements. A type that is not listed may share another's names."""
