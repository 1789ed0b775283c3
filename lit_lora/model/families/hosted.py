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
_OPT = DecoderNames(
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
)
_PERSIMMON = replace(
    LLAMA_LIKE,
    norm="model.final_layernorm",
    attention="self_attn.dense",
    query="self_attn.query_key_value",
    key="self_attn.query_key_value",
    value="self_attn.query_key_value",
    attention_out="self_attn.dense",
    mlp_gate="mlp.dense_h_to_4h",
    mlp_in="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
)
_MLA = replace(LLAMA_LIKE, query="self_attn.q_b_proj", key="self_attn.kv_b_proj", value="self_attn.kv_b_proj")
_FEED_FORWARD = replace(
    LLAMA_LIKE,
    mlp="feed_forward",
    mlp_gate="gate_proj",  # of the MLP, or of a shared expert in it
    mlp_in="up_proj",
    mlp_out="down_proj",
)
# "o*_proj" is the attention's `o_proj` and the `out_proj` of layers that mix tokens in another way.
_JAMBA = replace(
    _FEED_FORWARD, norm="model.final_layernorm", attention="o*_proj", mlp_norm="pre_ff_layernorm", mlp="feed_forward"
)
_LFM = replace(
    LLAMA_LIKE,
    norm="model.embedding_norm",
    attention_norm="operator_norm",
    attention="o*_proj",
    attention_out="self_attn.o*_proj",
    mlp_norm="ffn_norm",
    mlp="feed_forward",
    mlp_gate="feed_forward.w1",
    mlp_in="feed_forward.w3",
    mlp_out="feed_forward.w2",
)
_GRANITE = replace(
    LLAMA_LIKE,
    attention="o*_proj",
    mlp="shared_mlp",  # beside the mixture of experts, if any
    mlp_gate="shared_mlp.input_linear",
    mlp_in="shared_mlp.input_linear",
    mlp_out="shared_mlp.output_linear",
)

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
    "opt": _OPT,
    "xglm": replace(_OPT, embedding="model.embed_tokens", layers="model.layers", norm="model.layer_norm"),
    "biogpt": replace(
        _OPT,
        embedding="biogpt.embed_tokens",
        layers="biogpt.layers",
        norm="biogpt.layer_norm",
        head="output_projection",
    ),
    "openai-gpt": replace(_GPT2, embedding="transformer.tokens_embed"),  # without a final norm
    "ctrl": DecoderNames(
        embedding="transformer.w",
        layers="transformer.h",
        norm="transformer.layernorm",
        attention_norm="layernorm1",
        attention="multi_head_attention.dense",
        query="multi_head_attention.Wq",
        key="multi_head_attention.Wk",
        value="multi_head_attention.Wv",
        attention_out="multi_head_attention.dense",
        mlp_norm="layernorm2",
        mlp="ffn.2",  # `ffn` is a sequence of layers, which calls all of its children
        mlp_gate="ffn.0",
        mlp_in="ffn.0",
        mlp_out="ffn.2",
    ),
    "gpt_neox_japanese": replace(
        _NEOX,
        embedding="gpt_neox_japanese.embed_in",
        layers="gpt_neox_japanese.layers",
        norm="gpt_neox_japanese.final_layer_norm",
    ),
    "persimmon": _PERSIMMON,
    "fuyu": replace(
        _PERSIMMON,
        embedding="model.language_model.embed_tokens",
        layers="model.language_model.layers",
        norm="model.language_model.final_layernorm",
    ),
    "dbrx": replace(
        LLAMA_LIKE,
        embedding="transformer.wte",
        layers="transformer.blocks",
        norm="transformer.norm_f",
        attention_norm="norm_attn_norm.norm_1",
        attention="norm_attn_norm.attn.out_proj",
        query="norm_attn_norm.attn.Wqkv",
        key="norm_attn_norm.attn.Wqkv",
        value="norm_attn_norm.attn.Wqkv",
        attention_out="norm_attn_norm.attn.out_proj",
        mlp_norm="norm_attn_norm.norm_2",
        mlp="ffn",
    ),
    "nanochat": replace(LLAMA_LIKE, mlp_gate="mlp.fc1", mlp_in="mlp.fc1", mlp_out="mlp.fc2"),
    "modernbert-decoder": replace(
        LLAMA_LIKE,
        embedding="model.embeddings.tok_embeddings",
        norm="model.final_norm",
        head="decoder",
        attention_norm="attn_norm",
        attention="attn.Wo",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        attention_out="attn.Wo",
        mlp_norm="mlp_norm",
        mlp_gate="mlp.Wi",
        mlp_in="mlp.Wi",
        mlp_out="mlp.Wo",
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
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu"), _MLA),
    **dict.fromkeys(("axk1", "axk2", "dots3_note", "dots3_note_text", "hy_v4", "minicpm3"), _MLA),
    "longcat_flash": replace(  # each layer has two of everything but the mixture
        _MLA,
        attention="self_attn.*.o_proj",
        query="q_b_proj",
        key="kv_b_proj",
        value="kv_b_proj",
        mlp="mlps.*[0-9]",
        mlp_out="mlps.*.down_proj",
    ),
    **dict.fromkeys(("llama4", "llama4_text"), _FEED_FORWARD),
    "recurrent_gemma": replace(LLAMA_LIKE, attention="temporal_block", mlp="mlp_block"),
    "zaya": replace(
        LLAMA_LIKE,
        query="self_attn.qkv_proj.q_proj",
        key="self_attn.qkv_proj.k_proj",
        value="self_attn.qkv_proj.v_proj_*",  # of the token and of the one before it
    ),
    **dict.fromkeys(("bamba", "falcon_h1", "jamba"), _JAMBA),
    **dict.fromkeys(("zamba", "zamba2"), replace(_JAMBA, attention="self_attn.o_proj")),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _LFM),
    **dict.fromkeys(("granitemoehybrid", "granitemoeshared", "granitemoe_swa"), _GRANITE),
}
"""Decoders of transformers by ``model_type``. Where a layer has one linear layer for several parts, all have its name.
"""
