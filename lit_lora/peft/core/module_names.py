"""The places that methods name by default, as other architectures call them.

Defaults are written in the names of Llama-shaped decoders. On a BERT, a DeBERTa or a T5 the same places have the names
below; names that a user gives are never translated.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import OwnModule

__all__ = ["QUERY_VALUE", "same_places"]

# A place -> what it is called in BERT and RoBERTa, in DeBERTa-v2, in T5. `*[0-9].output` is an MLP's, not attention's.
_PLACES: dict[str, tuple[str, ...]] = {
    "q_proj": ("query", "query_proj", "SelfAttention.q", "EncDecAttention.q"),
    "k_proj": ("key", "key_proj", "SelfAttention.k", "EncDecAttention.k"),
    "v_proj": ("value", "value_proj", "SelfAttention.v", "EncDecAttention.v"),
    "down_proj": ("*[0-9].output.dense", "DenseReluDense.wo"),
    "self_attn": ("attention.output.dense", "SelfAttention.o", "EncDecAttention.o"),
    "mlp": ("*[0-9].output.dense", "DenseReluDense"),
}
QUERY_VALUE = ["q_proj", "v_proj"]


def same_places(patterns: Iterable[str], model: nn.Module) -> list[str]:
    """The patterns, or where one matches nothing in ``model`` what its place is called there."""
    names = [name for name, module in model.named_modules() if name and not isinstance(module, OwnModule)]
    found: list[str] = []
    for pattern in patterns:
        there = [pattern] if any(matches(pattern, name) for name in names) else []
        others = _PLACES.get(pattern, ())
        there = there or [other for other in others if any(matches(other, name) for name in names)]
        found += there or [pattern]
    return list(dict.fromkeys(found))
