"""LongLoRA: take a model to a longer context with attention in shifted groups while it trains.

Positions are interpolated, so the model reads ``factor`` times as many tokens. In training, tokens attend within
groups, in half of the heads shifted by half a group: the cost of long documents grows with their length and not with
its square. Generating, validating and merging know full attention only. Beside q, k, v and o stands LoRA, and the
embedding and all norms train in full: low-rank updates alone do not learn long contexts.
Source: Chen et al. 2024, "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", sections 3.2 and 3.3;
the interpolation is Chen et al. 2023, arXiv:2306.15595, or YaRN, arXiv:2309.00071.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.added import AddedModule
from lit_lora.peft.core.method import AnyConfig
from lit_lora.peft.lora.config import LoRAConfig

__all__ = ["LongContext", "LongLoRAConfig", "ShiftedGroups"]


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
        x, attend = args
        return (x, attend.in_groups(self.size)) if host.training else None


class LongLoRAConfig(LoRAConfig):
    """LongLoRA: a longer context by interpolated positions, trained with attention in shifted groups."""

    peft_type: ClassVar[str] = "LIT_LORA_LONGLORA"
    groups_tokens: ClassVar[bool] = True
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
        ["q_proj", "k_proj", "v_proj", "o_proj"], description=LoRAConfig.model_fields["target_modules"].description
    )
    modules_to_save: list[str] = Field(
        ["embed_tokens", "*norm"],
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
        if config is None and type(model) is not nn.Module:  # plain modules stand for the tensors of a file
            raise UsageError("peft: longlora is for decoders, this model has no positions to stretch")
        if config is not None:
            config = self.configure(config)  # refuses before anything is changed
        super().apply(model)
        if config is None:
            return
        LongContext(self).join(model)
        size = self.group or max(2, config.max_position_embeddings // 4)
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] == "self_attn":
                ShiftedGroups(size).join(module)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in a form of ours: PEFT has no adapter that changes a model's positions."""
        return {**super().peft_config(model), "peft_type": self.peft_type}
