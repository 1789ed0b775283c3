"""What an architecture calls its parts. Methods, merging and saving ask for a part, never for a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecoderNames", "Family", "PartNames"]


@dataclass(frozen=True)
class PartNames:
    """The parts that finetuning methods ask for in any transformer.

    Names end where a module's dotted name ends, and ``*`` stands for anything, as in
    :func:`lit_lora.peft.core.matching.matches`.
    """

    embedding: str
    """The token embedding."""
    query: str
    key: str
    value: str
    attention: str
    """The module that gives what attention adds to the residual stream."""
    mlp: str
    """The module that gives what the MLP adds to it."""
    mlp_out: str
    """The MLP's last layer."""
    head: str = "lm_head"
    """The output head, which has a row per token."""


@dataclass(frozen=True)
class DecoderNames(PartNames):
    """The parts of a decoder, as its checkpoints call them: in full, or within a layer. By default a Llama's."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    """The list of layers. Embedding, layers and final norm are children of one module, the decoder."""
    norm: str = "model.norm"
    """The final norm."""
    # Within a layer. What attention and the MLP are made of are their children.
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

    @property
    def decoder(self) -> str:
        """The module from the embedding to the final norm."""
        return self.layers.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """A family of decoders."""

    architecture: str
    """Its class in transformers, written to ``config.json``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What its ``config.json`` leaves unsaid."""
    names: DecoderNames = DecoderNames()
    """What its checkpoints call its parts."""
