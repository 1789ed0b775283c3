"""The part names of decoders that transformers implements, where they differ from Llama's."""

from __future__ import annotations

from dataclasses import replace

from lit_lora.model.families.names import DecoderNames

__all__ = ["HOSTED", "LLAMA_LIKE"]

# A hosted layer's attention returns a tuple, so methods act on its output projection, whose output is the same.
LLAMA_LIKE = DecoderNames(attention="self_attn.o_proj")
"""The names of a hosted model that the table does not list."""

_GPT2 = DecoderNames(
    embedding="transformer.wte",
    layers="transformer.h",
    norm="transformer.ln_f",
    attention_norm="ln_1",
    attention="attn.c_proj",
    query="attn.c_attn",  # queries, keys and values in one
    key="attn.c_attn",
    value="attn.c_attn",
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    mlp="mlp",
    mlp_gate="mlp.c_fc",
    mlp_in="mlp.c_fc",
    mlp_out="mlp.c_proj",
)
_GPTJ = replace(
    _GPT2,
    attention="attn.out_proj",
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    attention_out="attn.out_proj",
    mlp_norm="ln_1",  # attention and MLP read one norm
    mlp_gate="mlp.fc_in",
    mlp_in="mlp.fc_in",
    mlp_out="mlp.fc_out",
)
_NEOX = DecoderNames(
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    attention="attention.dense",
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    attention_out="attention.dense",
    mlp_gate="mlp.dense_h_to_4h",
    mlp_in="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
)
_FALCON = replace(
    _NEOX,
    embedding="transformer.word_embeddings",
    layers="transformer.h",
    norm="transformer.ln_f",
    head="lm_head",
    attention="self_attention.dense",
    query="self_attention.query_key_value",
    key="self_attention.query_key_value",
    value="self_attention.query_key_value",
    attention_out="self_attention.dense",
)
_MLA = replace(LLAMA_LIKE, query="self_attn.q_b_proj", key="self_attn.kv_b_proj", value="self_attn.kv_b_proj")

HOSTED: dict[str, DecoderNames] = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": _GPTJ,
    "codegen": replace(_GPTJ, query="attn.qkv_proj", key="attn.qkv_proj", value="attn.qkv_proj"),
    "gpt_neo": replace(
        _GPT2,
        attention="attn.attention.out_proj",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        attention_out="attn.attention.out_proj",
    ),
    "gpt_neox": _NEOX,
    "falcon": _FALCON,
    "bloom": _FALCON,
    "mpt": replace(
        _FALCON,
        embedding="transformer.wte",
        layers="transformer.blocks",
        norm="transformer.norm_f",
        attention_norm="norm_1",
        attention="attn.out_proj",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_out="attn.out_proj",
        mlp_norm="norm_2",
        mlp="ffn",
        mlp_gate="ffn.up_proj",
        mlp_in="ffn.up_proj",
        mlp_out="ffn.down_proj",
    ),
    "opt": DecoderNames(
        embedding="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        attention="self_attn.out_proj",
        attention_out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="fc2",  # the layers have no module for the whole MLP
        mlp_gate="fc1",
        mlp_in="fc1",
        mlp_out="fc2",
    ),
    "phi": replace(
        LLAMA_LIKE,
        norm="model.final_layernorm",
        attention="self_attn.dense",
        attention_out="self_attn.dense",
        mlp_norm="input_layernorm",
        mlp_gate="mlp.fc1",
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
    ),
    "starcoder2": replace(LLAMA_LIKE, mlp_gate="mlp.c_fc", mlp_in="mlp.c_fc", mlp_out="mlp.c_proj"),
    "cohere": replace(LLAMA_LIKE, mlp_norm="input_layernorm"),
    "cohere2": replace(LLAMA_LIKE, mlp_norm="input_layernorm"),
    "nemotron": replace(LLAMA_LIKE, mlp_gate="mlp.up_proj"),
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
}
"""Decoders of transformers by ``model_type``. Where a layer has one linear layer for several parts, all have its name.
"""
