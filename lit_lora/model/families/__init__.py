"""The architectures by ``model_type`` of their ``config.json``: one entry each, all that is known of it by name.

A family whose decoder differs from Llama's by names and defaults alone is an entry of ``FAMILIES``: it loads, trains by
every method, merges and saves.
"""

from lit_lora.model.families.names import DecoderNames, Family, PartNames

__all__ = ["ENCODERS", "FAMILIES", "DecoderNames", "Family", "PartNames"]

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
}
"""Decoders of this package."""

ENCODERS: dict[str, PartNames] = {
    "bert": PartNames(
        embedding="word_embeddings",
        query="query",
        key="key",
        value="value",
        attention="attention.output.dense",
        mlp="*[0-9].output.dense",  # of a numbered layer; that of attention is within `attention`
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
        embedding="embed_tokens",  # of encoder and decoder; nothing calls `shared`, to which both are tied
        query="*Attention.q",  # SelfAttention and EncDecAttention
        key="*Attention.k",
        value="*Attention.v",
        attention="*Attention.o",
        mlp="DenseReluDense",
        mlp_out="DenseReluDense.wo",
    ),
}
"""Encoders and encoder-decoders of transformers. A type that is not listed may share the names of one that is."""
