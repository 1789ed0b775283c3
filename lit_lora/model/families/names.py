"""The names of an architecture's parts. Code outside this package asks for a part and never writes its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecoderNames", "Family", "PartNames"]


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
    """The names of a decoder's parts in its checkpoints, in full or within a layer. The defaults are Llama's."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    """The list of layers. Embedding, layers and final norm are children of one module, the decoder."""
    norm: str = "model.norm"
    """The final norm."""
    # Within a layer. Projections are children of `attention` and `mlp`.
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_gate: str = "mlp.gate_proj"
    mlp_in: str = "mlp.up_proj"
    mlp_out: str = "mlp.down_proj"
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
class Family:
    """A family of decoders."""

    architecture: str
    """The class in transformers, which is written to ``config.json``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that ``config.json`` omits."""
    names: DecoderNames = DecoderNames()
    """The names of its parts in checkpoints."""
