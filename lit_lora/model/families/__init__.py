"""The tables of architectures, by the ``model_type`` in ``config.json``.

A decoder that differs from Llama's only in names and defaults needs no more than an entry in ``FAMILIES`` to load,
train by every method, merge and save.
"""

from lit_lora.model.families.hosted import HOSTED, LLAMA_LIKE
from lit_lora.model.families.names import DecoderNames, Family, PartNames

__all__ = ["ENCODERS", "FAMILIES", "HOSTED", "LLAMA_LIKE", "DecoderNames", "Family", "PartNames"]

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,  # always, so config.json has no such key
            "max_position_embeddings": 131072,
        },
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
