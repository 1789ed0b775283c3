"""Prompt tuning: trained embeddings of virtual tokens before every document.

::

    x = [p_1 … p_P ; E(token_1) … E(token_T)]       outputs of p are dropped; token i has position P + i

The virtual tokens do not attend to a document, so their activations are the same for all and are computed once per
batch.
Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.peft.core.added import AddedModule
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.prompts.virtual_tokens import EMBEDDINGS, VirtualTokens, embedded, embedding_of, only_rows, refuse

__all__ = ["Prompt", "PromptConfig", "PromptMethod"]


class Prompt(AddedModule):
    """Trained embeddings of the virtual tokens, float32.

    Args:
        rows: (P, D), their initial values.
    """

    child = "prompt"

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.prefix_length = len(rows)
        self.embedding = nn.Parameter(rows.float().clone())

    def rows(self) -> Tensor:
        """The embeddings that the decoder gets, (P, D) float32."""
        return self.embedding

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The decoder's input after the virtual tokens, and attention in which every document attends to them."""
        x, attend = args
        attend = attend.with_prefix(self.prefix_length)
        if attend.prefix_length:  # 0 once a cache contains the virtual tokens
            x = torch.cat([self.rows().to(x.dtype), x])
        return x, attend

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The decoder's output without that for the virtual tokens; ``args`` are those that ``before`` returned."""
        return output[args[1].prefix_length :]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.prefix_length} tokens × {self.embedding.shape[1]}"


class PromptMethod(VirtualTokens):
    """The base of prompt tuning and P-tuning, whose files have one row per virtual token."""

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        config: Any = model.config
        return self._peft_config(
            num_attention_heads=config.num_attention_heads,
            token_dim=config.hidden_size,
            num_layers=config.num_hidden_layers,
        )

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The rows; a network that computes them is not saved."""
        prompt = next(module for module in own_modules(model).values() if isinstance(module, Prompt))
        return {EMBEDDINGS: prompt.rows().detach()}


class PromptConfig(PromptMethod):
    """Prompt tuning: trained embeddings before every document."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    name: Literal["prompt"] = Field("prompt", description="The method.")
    init: Literal["tokens", "random"] = Field(
        "tokens",
        description="Initial embeddings: tokens (those of init_text or of random tokens) or random, which learns much "
        "more slowly.",
    )

    @model_validator(mode="after")
    def _text_is_used(self) -> PromptConfig:
        if self.init_text is not None and self.init != "tokens":
            raise ValueError("init_text has no effect with init: random, expected init: tokens")
        return self

    def add(self, model: nn.Module) -> None:
        """Put the virtual tokens before the decoder's input.

        Raises:
            UsageError: They leave no room in the context, or the model is not one of lit-lora's decoders.
        """
        host = self._host(model)
        embedding = embedding_of(model)
        if self.init == "tokens":
            rows = embedded(model, self._start_ids(model))
        else:
            rows = torch.randn(self.length, embedding.shape[1], device=embedding.device)
        Prompt(rows).join(host)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptConfig:
        """Settings by the rows alone; their initial values do not matter, for the file's replace them."""
        sizes = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
        init = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        refuse(raw, sizes | init)
        return cls(num_virtual_tokens=len(only_rows(tensors)), init="random")
