"""Prompt tuning: trained embeddings of virtual tokens before every document.

::

    x = [p_1 … p_P ; E(token_1) … E(token_T)]       their outputs are dropped again; token i has position P + i

The virtual tokens see no document, so they are the same for all and run through the layers once for a whole batch.
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
from lit_lora.peft.prompts.virtual_tokens import EMBEDDINGS, VirtualTokens, embedding_of, only_rows, refuse

__all__ = ["Prompt", "PromptConfig", "PromptMethod"]


class Prompt(AddedModule):
    """Embeddings of the virtual tokens, float32.

    Args:
        rows: (P, D): what they start as.
    """

    child = "prompt"

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.prefix_length = len(rows)
        self.embedding = nn.Parameter(rows.float().clone())

    def rows(self) -> Tensor:
        """(P, D) float32."""
        return self.embedding

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The decoder's input with the virtual tokens before it, and attention that lets every document see them."""
        x, attend = args
        attend = attend.with_prefix(self.prefix_length)
        return (torch.cat([self.rows().to(x.dtype), x]) if attend.prefix_length else x), attend

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The decoder's output without that of the virtual tokens."""
        return output[args[1].prefix_length :]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.prefix_length} tokens × {self.embedding.shape[1]}"


class PromptMethod(VirtualTokens):
    """What prompt tuning and P-tuning share: a file with one row per virtual token, whatever computed them."""

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        config: Any = model.config
        more = {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers}
        return self._peft_config(num_attention_heads=config.num_attention_heads, **more)

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The rows."""
        prompt = next(module for module in own_modules(model).values() if isinstance(module, Prompt))
        return {EMBEDDINGS: prompt.rows().detach()}


class PromptConfig(PromptMethod):
    """Prompt tuning: trained embeddings before every document."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    name: Literal["prompt"] = Field("prompt", description="The method.")
    init: Literal["tokens", "random"] = Field(
        "tokens", description="tokens: embeddings of init_text, or of random tokens; random learns much slower."
    )

    @model_validator(mode="after")
    def _text_is_used(self) -> PromptConfig:
        if self.init_text is not None and self.init != "tokens":
            raise ValueError("init_text has no effect with init: random, expected init: tokens")
        return self

    def add(self, model: nn.Module) -> None:
        """Put the virtual tokens before the decoder's input.

        Raises:
            UsageError: They leave no room in the context, or the model is not one of this package's decoders.
        """
        host = self._host(model)
        embedding = embedding_of(model)
        if self.init == "tokens":
            rows = embedding[self._start_ids(model).to(embedding.device)]
        else:
            rows = torch.randn(self.length, embedding.shape[1], device=embedding.device)
        Prompt(rows).join(host)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptConfig:
        """Plain rows, whatever they started from."""
        known = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
        known |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        refuse(raw, known)
        return cls(num_virtual_tokens=len(only_rows(tensors)), init="random")
