"""The names of an architecture's parts. Code outside this package asks for a part and never writes its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Block", "DecoderNames", "Family", "PartNames"]


@dataclass(frozen=True)
class PartNames:
    """The parts of any transformer that finetuning methods ask for.

    A name is the end of a module's dotted name, and ``*`` matches anything, as in
    :func:`lit_lora.peft.core.matching.matches`.
    """

    embedding: str
    """The token embedding."""
    query: str
    key: str
    value: str
    attention: str
    """The module whose output is added to the residual stream after attention."""
    mlp: str
    """The module whose output is added to the residual stream after the MLP."""
    mlp_out: str
    """The MLP's last layer."""
    head: str = "lm_head"
    """The output head, with one row per token of the vocabulary."""


@dataclass(frozen=True)
class DecoderNames(PartNames):
    """The names of a decoder's parts in its checkpoints, in full or within a layer. The defaults are Llama's.

    A part whose name is ``None`` does not exist. Projections of one input that have the same name are one module, whose
    output is theirs in order: query, key and value, or the MLP's gate and input.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    """The list of layers. Embedding, layers and final norm are children of one module, the decoder."""
    norm: str = "model.norm"
    """The final norm."""
    # Within a layer. Projections are children of `attention` and `mlp`.
    attention_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_post_norm: str | None = None
    """The norm of the attention's output, before that is added to the residual stream."""
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_gate: str = "mlp.gate_proj"
    mlp_in: str = "mlp.up_proj"
    mlp_out: str = "mlp.down_proj"
    mlp_post_norm: str | None = None
    """The norm of the MLP's output, before that is added to the residual stream."""
    # Of a layer with a mixture of experts. Its shared expert has an MLP's names within.
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    experts_in: str = "mlp.experts.gate_up_proj"
    """The parameter with every expert's gate and up projections."""
    experts_out: str = "mlp.experts.down_proj"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"

    @property
    def decoder(self) -> str:
        """The module from the embedding to the final norm."""
        return self.layers.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """What a family's layers compute that neither their parts' names nor ``config.json`` say. The defaults are Llama's.

    Which norms there are, and which projections are fused, is said by :class:`DecoderNames`.
    """

    norm_offset: float = 0.0
    """Norms multiply by this plus their weight."""
    query_key_norm: Literal["head", "width"] = "head"
    """What the norms of queries and keys span: each head, or all heads together."""
    norm_after_rope: bool = False
    """Queries and keys are normed after their rotation, not before it."""
    rope_pairs: Literal["halves", "neighbors"] = "halves"
    """Which dimensions of a head turn together: ``i`` and ``i + R/2``, or ``2 i`` and ``2 i + 1``."""
    scaled_embedding: bool = False
    """The embedding is multiplied by the root of its width, rounded to the dtype of its weights."""


Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of decoders."""

    architecture: str
    """The class in transformers, which is written to ``config.json``."""
    defaults: Fields = field(default_factory=dict)
    """Values of keys that ``config.json`` omits."""
    fixed: Fields = field(default_factory=dict)
    """Fields of ``ModelConfig`` that are the same for all models, whatever ``config.json`` says."""
    reads: frozenset[str] = frozenset()
    """Fields of ``ModelConfig`` that only some families have, and this one reads from ``config.json``."""
    complete: Callable[[Fields], Fields] = lambda fields: {}
    """Fields that follow from the keys of ``config.json``, with the defaults in it."""
    names: DecoderNames = DecoderNames()
    """The names of its parts in checkpoints."""
    block: Block = Block()
    """What its layers compute."""
