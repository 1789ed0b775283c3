"""What prefix and prompt methods share: how many virtual tokens, what text they start from, and their file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.adapter_method import CONFIG, WEIGHTS
from lit_lora.peft.core.added import AddedMethod, decoder_of
from lit_lora.peft.core.capabilities import TakesText

__all__ = ["EMBEDDINGS", "VirtualTokens", "cycled", "embedding_of", "only_rows", "refuse"]

EMBEDDINGS = "prompt_embeddings"
"""PEFT's one tensor of a prefix or prompt: a row per virtual token, whatever network computed it in training."""

Self = TypeVar("Self", bound="VirtualTokens")


class VirtualTokens(AddedMethod, TakesText):
    """Settings of a method whose virtual tokens stand before every document."""

    default_lr: ClassVar[float | None] = 1e-2
    num_virtual_tokens: int = Field(
        20, ge=1, description="How many; they take up as many positions of the model's context."
    )
    init_text: str | list[int] | None = Field(
        None, description="Text (or token ids) that they start from, repeated or cut; random tokens when omitted."
    )

    @property
    def about(self) -> str:
        """Name and length."""
        return f"{self.model_dump()['name']}, {self.length} virtual tokens"

    @property
    def length(self) -> int:
        """All virtual tokens."""
        return self.num_virtual_tokens

    def with_text(self: Self, encode: Callable[[str], list[int]]) -> Self:
        """These settings with the text as token ids."""
        if not isinstance(self.init_text, str):
            return self
        ids = encode(self.init_text)
        if not ids:
            raise UsageError("peft.init_text: expected some text, got none")
        return self.model_copy(update={"init_text": ids})

    def _host(self, model: nn.Module) -> nn.Module:
        """The decoder, once it is sure that documents still have room.

        Raises:
            UsageError: They have not, or there is no such decoder.
        """
        host, context = decoder_of(model)[1], int(model.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
        if host.prefix_length:
            raise UsageError("peft: something else stands before every document already, expected one prefix or prompt")
        if self.length >= context:
            raise UsageError(f"peft: {self.length} virtual tokens leave no room in the model's context of {context}")
        return host

    def _start_ids(self, model: nn.Module) -> Tensor:
        """(P,) int64: the tokens to start from."""
        if isinstance(self.init_text, str):
            raise UsageError("peft.init_text: given as text, but no tokenizer has turned it into ids")
        vocabulary = len(embedding_of(model))
        if self.init_text is None:
            return torch.randint(vocabulary, (self.num_virtual_tokens,))
        if not self.init_text or not 0 <= min(self.init_text) <= max(self.init_text) < vocabulary:
            raise UsageError(f"peft.init_text: expected ids from 0 to {vocabulary - 1}, got {self.init_text[:10]}")
        return torch.tensor(cycled(self.init_text, self.num_virtual_tokens))

    def _peft_config(self, **more: Any) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 1,
            **more,
        }


def embedding_of(model: nn.Module) -> Tensor:
    """(V, D): the weight of the token embedding, of the base where an adapter is around it."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight.detach()


def cycled(ids: Sequence[int], length: int) -> list[int]:
    """The first ``length`` of the ids, repeated where they are fewer."""
    return [ids[place % len(ids)] for place in range(length)]


def only_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """The one tensor of such a file, (P, n).

    Raises:
        InputError: It is not there, or there are others.
    """
    if set(tensors) != {EMBEDDINGS} or tensors[EMBEDDINGS].ndim != 2:
        got = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise InputError(f"{WEIGHTS}: expected one matrix called {EMBEDDINGS}, got {got}")
    return tensors[EMBEDDINGS]


def refuse(raw: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what ``adapter_config.json`` asks for and nobody here does.

    Raises:
        InputError: Naming it.
    """
    inert = {"auto_mapping", "inference_mode", "revision", "task_type", "peft_version", "base_model_name_or_path"}
    asked = [f"{key} {value!r}" for key, value in raw.items() if value and key not in known | inert | {"peft_type"}]
    if asked:
        raise InputError(f"{CONFIG}: not supported: {'; '.join(asked)[:200]}")
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise InputError(f"{CONFIG}: num_transformer_submodules 2: made for an encoder-decoder, expected 1")
