"""LongLoRA: take a model to a longer context with attention in shifted groups while it trains.

Positions are interpolated, so the model reads ``factor`` times as many tokens. In training, tokens attend within
groups, in half of the heads shifted by half a group: the cost of long documents grows with their length and not with
its square. Generating, validating and merging know full attention only. Beside q, k, v and o stands LoRA, and the
embedding and all norms train in full: low-rank updates alone do not learn long contexts.
Source: Chen et al. 2024, "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", sections 3.2 and 3.3;
the interpolation is Chen et al. 2023, arXiv:2306.15595, or YaRN, arXiv:2309.00071.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.model.attention.documents import Layout
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.peft.core.added import AddedModule, Attend
from lit_lora.peft.core.capabilities import AnyConfig, ChangesConfig, GroupsTokens
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.module_names import default_names, names_of
from lit_lora.peft.lora.config import LoRAConfig

__all__ = ["GroupedAttention", "LongContext", "LongLoRAConfig", "ShiftedGroups", "in_groups"]


class LongContext(AddedModule):
    """A longer context for the model that it stands in.

    Args:
        method: Whose ``configure`` changes the model's config.
    """

    child = "long_context"

    def __init__(self, method: LongLoRAConfig) -> None:
        super().__init__()
        self.method = method

    def join(self, host: nn.Module) -> None:
        """Become a part of ``host``, in place."""
        super().join(host)
        self.before_it: Any = host.config
        host.config = self.method.configure(self.before_it)

    def leave(self, host: nn.Module) -> None:
        """Take it out of its host, whose context is the former one again."""
        super().leave(host)
        host.config = self.before_it


class ShiftedGroups(AddedModule):
    """Attention within groups of tokens while its host trains.

    Args:
        size: Tokens of a group.
    """

    child = "shifted_groups"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The tokens as they are, and attention in groups."""
        if not host.training:
            return None
        x, attend = args
        return x, in_groups(attend, self.size)


@lru_cache(maxsize=1)  # all layers of a pass are given the same attention, and share what is built from it
def in_groups(attend: Attend, size: int) -> Attend:
    """Attention within groups of ``size`` tokens; over a cache it stays as it is, for decoding sees everything.

    Raises:
        ValueError: Documents share their first tokens, which would be in groups of different sizes.
    """
    if not isinstance(attend, PackedAttention):
        return attend
    if attend.layout.shared_prefix:
        raise ValueError(f"{attend.layout.shared_prefix} tokens that all documents begin with do not go with groups")
    return GroupedAttention(attend, size)


class GroupedAttention:
    """Documents cut into groups that do not see each other; half of the key/value heads cut them half a group earlier.

    A group is to attention what a document is, only that positions go on. So nobody sees what comes later, and nobody
    another document. A document of at most one group stays whole in all heads. With one key/value head, the query heads
    are halved.

    Source: arXiv:2309.12307 section 3.2, without the wrap of the last group around to the first tokens.

    Args:
        tokens: Attention over the documents.
        size: Tokens of a group.
    """

    prefix_length = 0

    def __init__(self, tokens: PackedAttention, size: int) -> None:
        self.tokens = tokens
        self.aligned = self._layout(size, first=size)
        self.shifted = self._layout(size, first=max(1, size // 2))

    def _layout(self, size: int, first: int) -> Layout:
        """All documents in groups, the first group of each with ``first`` tokens."""
        groups = [group for length in self.tokens.lengths for group in _groups(length, size, first)]
        return Layout(groups, self.tokens.window)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""
        query_heads, kv_heads = query.shape[1], key.shape[1]
        queries_per_kv = query_heads // kv_heads
        if kv_heads > 1:
            kv_cut = -(-kv_heads // 2)
            query_cut = kv_cut * queries_per_kv
            late_key, late_value = key[:, kv_cut:], value[:, kv_cut:]
        else:  # both halves of the queries read the one key/value head
            kv_cut = 1
            query_cut = -(-queries_per_kv // 2)
            late_key, late_value = key, value

        early = (query[:, :query_cut], key[:, :kv_cut], value[:, :kv_cut])
        late = (query[:, query_cut:], late_key, late_value)
        # The kernels take contiguous tensors only.
        early_out = self.tokens.within(self.aligned, *(tensor.contiguous() for tensor in early))
        late_out = self.tokens.within(self.shifted, *(tensor.contiguous() for tensor in late))
        return torch.cat([early_out, late_out], dim=1)

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        return self.tokens.rotate(x)

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: tokens before a document would be in its first group only."""
        raise ValueError("tokens before every document do not go with groups")


def _groups(length: int, size: int, first: int) -> list[int]:
    """A document's length in groups of ``size``, the first of ``first`` tokens; one that fits into a group is one."""
    if length <= size:
        return [length]
    whole, rest = divmod(length - first, size)
    return [first, *[size] * whole, *([rest] if rest else [])]


class LongLoRAConfig(LoRAConfig, ChangesConfig, GroupsTokens):
    """LongLoRA: a longer context by interpolated positions, trained with attention in shifted groups."""

    peft_type: ClassVar[str] = "LIT_LORA_LONGLORA"
    name: Literal["longlora"] = Field("longlora", description="The method.")  # type: ignore[assignment]
    factor: float = Field(2.0, ge=1, description="How many times longer the context becomes.")
    rope_type: Literal["linear", "yarn"] = Field(
        "yarn",
        description="How positions are stretched: yarn (slow rotations only; hardly needs training) or linear (all "
        "alike, as in the article; needs much).",
    )
    group: int | None = Field(
        None,
        ge=2,
        description="Tokens that attend to each other in training; a quarter of the new context when omitted. Shorter "
        "documents attend in full.",
    )
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        default_names("query", "key", "value", "attention_out"),
        description=LoRAConfig.model_fields["target_modules"].description,
    )
    modules_to_save: list[str] = Field(
        [*default_names("embedding"), "*norm"],
        description="Modules trained in full: embedding and norms, of which a longer context needs both.",
    )

    @property
    def graph_safe(self) -> bool:
        """Groups are cut by the documents' lengths."""
        return False

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "LongLoRA"

    @property
    def about(self) -> str:
        """Rank, alpha and the longer context."""
        return f"{super().about}, context × {self.factor:g} ({self.rope_type})"

    def configure(self, config: AnyConfig) -> AnyConfig:
        """The config of the model with the longer context."""
        if not hasattr(config, "extended"):
            raise UsageError("peft.name: longlora needs a decoder of this package, whose positions can be stretched")
        if self.factor == 1:
            return config
        extended: AnyConfig = config.extended(self.factor, self.rope_type)
        return extended

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets and lengthen the context in place; call ``freeze`` first.

        Raises:
            UsageError: The model is no decoder of this package, its positions are stretched in another way, or a name
                matches no module.
        """
        config = getattr(model, "config", None)
        if config is None:
            raise UsageError("peft: longlora is for decoders, this model has no positions to stretch")
        config = self.configure(config)  # refuses before anything is changed
        super().apply(model)
        LongContext(self).join(model)
        size = self.group or max(2, config.max_position_embeddings // 4)
        attention = names_of(model).attention
        for name, module in list(model.named_modules()):
            if matches(attention, name):
                ShiftedGroups(size).join(module)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in a form of ours: PEFT has no adapter that changes a model's positions."""
        return {**super().peft_config(model), "peft_type": self.peft_type}
