"""LongLoRA: extend a model's context, with attention in shifted groups during training.

Positions are interpolated, so the model reads ``factor`` times as many tokens. In training, tokens attend within
groups, shifted by half a group in half of the heads: the cost of long documents grows with their length instead of its
square. Generation, validation and merged models use full attention. LoRA adapts q, k, v and o, and the embedding and
all norms train in full, because low-rank updates alone do not learn long contexts.
Source: Chen et al. 2024, "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", sections 3.2 and 3.3;
the interpolation is Chen et al. 2023, arXiv:2306.15595, or YaRN, arXiv:2309.00071.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.attention.documents import Layout
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.peft.core.added import AddedModule
from lit_lora.peft.core.capabilities import AnyConfig, ChangesConfig, GroupsTokens
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.module_names import default_names, names_of
from lit_lora.peft.lora.config import LoRAConfig

__all__ = ["GroupedAttention", "LongContext", "LongLoRAConfig", "ShiftedGroups", "in_groups"]


class LongContext(AddedModule):
    """Extends the context of its host, the model, through the host's config.

    Args:
        method: Its ``configure`` changes the config.
    """

    child = "long_context"

    def __init__(self, method: LongLoRAConfig) -> None:
        super().__init__()
        self.method = method

    def join(self, host: nn.Module) -> None:
        """Become a child of ``host`` and extend its context, in place."""
        super().join(host)
        self.original_config: Any = host.config
        host.config = self.method.configure(self.original_config)

    def leave(self, host: nn.Module) -> None:
        """Remove it from its host and restore the host's context, in place."""
        super().leave(host)
        host.config = self.original_config


class ShiftedGroups(AddedModule):
    """Limits its host's attention to groups of tokens in training mode.

    Args:
        size: Tokens per group.
    """

    child = "shifted_groups"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The same tokens, with attention in groups."""
        if not host.training:
            return None
        x, attend = args
        return x, in_groups(attend, self.size)


@lru_cache(maxsize=1)  # all layers of a pass get the same attention, and share the layouts built from it
def in_groups(attend: Attend, size: int) -> Attend:
    """Attention within groups of ``size`` tokens; over a cache it is unchanged: decoding sees all tokens.

    Raises:
        ValueError: Documents have a shared prefix, whose tokens would be in groups of different sizes.
    """
    if not isinstance(attend, PackedAttention):
        return attend
    if attend.layout.shared_prefix:
        raise ValueError(
            f"attention in groups does not support a shared prefix, got {attend.layout.shared_prefix} tokens"
        )
    return GroupedAttention(attend, size)


class GroupedAttention:
    """Documents cut into groups that do not see each other; half of the key/value heads cut them half a group earlier.

    Attention treats a group like a document, except that positions continue from the group before. So no token sees a
    later one or another document. A document of at most one group stays whole in all heads. With a single key/value
    head, the query heads are split instead.

    Source: arXiv:2309.12307 section 3.2, except that the last group does not wrap around to the first tokens.

    Args:
        tokens: Attention over the documents.
        size: Tokens per group.
    """

    prefix_length = 0

    def __init__(self, tokens: PackedAttention, size: int) -> None:
        self.tokens = tokens
        self.aligned = self._layout(size, first=size)
        self.shifted = self._layout(size, first=max(1, size // 2))

    def _layout(self, size: int, first: int) -> Layout:
        """The layout of all documents in groups, the first group of each with ``first`` tokens."""
        groups: list[int] = []
        for length in self.tokens.lengths:
            groups += _groups(length, size, first)
        return Layout(groups)

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, J) -> (T, N, J)."""
        query_heads, kv_heads = query.shape[1], key.shape[1]
        queries_per_kv = query_heads // kv_heads
        if kv_heads > 1:
            kv_cut = -(-kv_heads // 2)
            query_cut = kv_cut * queries_per_kv
            late_key, late_value = key[:, kv_cut:], value[:, kv_cut:]
        else:  # both halves of the query heads read the one key/value head
            kv_cut = 1
            query_cut = -(-queries_per_kv // 2)
            late_key, late_value = key, value

        early = (query[:, :query_cut], key[:, :kv_cut], value[:, :kv_cut])
        late = (query[:, query_cut:], late_key, late_value)
        early_layer = late_layer = layer
        if layer.sinks is not None:  # one per query head
            early_layer = replace(layer, sinks=layer.sinks[:query_cut])
            late_layer = replace(layer, sinks=layer.sinks[query_cut:])
        # The kernels require contiguous tensors.
        early_out = self.tokens.within(self.aligned, early_layer, *(tensor.contiguous() for tensor in early))
        late_out = self.tokens.within(self.shifted, late_layer, *(tensor.contiguous() for tensor in late))
        return torch.cat([early_out, late_out], dim=1)

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(T, heads, H), rotated by the positions of its rows."""
        return self.tokens.rotate(layer, x)

    def token_positions(self) -> Tensor:
        """(T,) int64, the position of each row in its document."""
        return self.tokens.token_positions()

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Not supported: only a document's first group would see the prefix."""
        raise ValueError("attention in groups does not support a prefix before every document")


def _groups(length: int, size: int, first: int) -> list[int]:
    """The lengths of a document's groups, ``first`` and then ``size`` each; at most ``size`` tokens are one group."""
    if length <= size:
        return [length]
    full_groups, rest = divmod(length - first, size)
    groups = [first] + [size] * full_groups
    if rest:
        groups.append(rest)
    return groups


class LongLoRAConfig(LoRAConfig, ChangesConfig, GroupsTokens):
    """LongLoRA: a longer context by interpolated positions, trained with attention in shifted groups."""

    peft_type: ClassVar[str] = "LIT_LORA_LONGLORA"
    name: Literal["longlora"] = Field("longlora", description="The method.")  # type: ignore[assignment]
    factor: float = Field(2.0, ge=1, description="Factor by which the context becomes longer.")
    rope_type: Literal["linear", "yarn"] = Field(
        "yarn",
        description="Interpolation of positions: yarn (of slow rotations only; needs little training) or linear (of "
        "all, as in the paper; needs much).",
    )
    group: int | None = Field(
        None,
        ge=2,
        description="Tokens per attention group in training; a quarter of the new context if omitted. Shorter "
        "documents attend in full.",
    )
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        default_names("query", "key", "value", "attention_out"),
        description=LoRAConfig.model_fields["target_modules"].description,
    )
    modules_to_save: list[str] = Field(
        [*default_names("embedding"), "*norm"],
        description="Modules to train in full; a longer context needs both the embedding and the norms.",
    )

    @property
    def graph_safe(self) -> bool:
        """Not safe: groups depend on the documents' lengths."""
        return False

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "LongLoRA"

    @property
    def about(self) -> str:
        """The method, its rank, alpha and longer context."""
        return f"{super().about}, context × {self.factor:g} ({self.rope_type})"

    def configure(self, config: AnyConfig) -> AnyConfig:
        """The model's config with the longer context.

        Raises:
            UsageError: The model is not one of lit-lora's decoders, or its positions are already scaled.
        """
        # transformers' decoders rotate queries and keys themselves
        if not hasattr(config, "extended") or not getattr(config, "ropes", None):
            raise UsageError(
                "peft.name: longlora needs one of lit-lora's own decoders, whose positions it interpolates"
            )
        if self.factor == 1:
            return config
        extended: AnyConfig = config.extended(self.factor, self.rope_type)
        return extended

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets and extend the context in place; call ``freeze`` first.

        Raises:
            UsageError: The model is not one of lit-lora's decoders, its positions are already scaled in another way, or
                a name matches no module.
        """
        config = getattr(model, "config", None)
        if config is None:
            raise UsageError("peft: longlora is for decoders, and this model has no config with positions")
        config = self.configure(config)  # first: an error must leave the model unchanged
        super().apply(model)
        LongContext(self).join(model)
        size = self.group or max(2, config.max_position_embeddings // 4)
        attention = names_of(model).attention
        for name, module in list(model.named_modules()):
            if matches(attention, name):
                ShiftedGroups(size).join(module)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in our own format: PEFT has no adapter that changes a model's positions."""
        return {**super().peft_config(model), "peft_type": self.peft_type}
