"""The base of prefix and prompt methods: number of virtual tokens, the text they start from, and their file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.adapter_method import CONFIG, WEIGHTS
from lit_lora.peft.core.added import AddedMethod, decoder_of
from lit_lora.peft.core.capabilities import TakesText
from lit_lora.peft.core.modules import embed_scale

__all__ = ["EMBEDDINGS", "VirtualTokens", "cycled", "embedded", "embedding_of", "only_rows", "refuse"]

EMBEDDINGS = "prompt_embeddings"
"""The only tensor in PEFT's file of a prefix or prompt: one row per virtual token, as computed by any network."""

Self = TypeVar("Self", bound="VirtualTokens")


class VirtualTokens(AddedMethod, TakesText):
    """Settings of a method that puts virtual tokens before every document."""

    default_lr: ClassVar[float | None] = 1e-2
    num_virtual_tokens: int = Field(
        20, ge=1, description="Number of virtual tokens, which take up positions of the model's context."
    )
    init_text: str | list[int] | None = Field(
        None, description="Text (or token ids) to start from, repeated or cut to size; random tokens if omitted."
    )

    @property
    def about(self) -> str:
        """The method and its number of virtual tokens."""
        return f"{self.model_dump()['name']}, {self.length} virtual tokens"

    @property
    def length(self) -> int:
        """Number of all virtual tokens."""
        return self.num_virtual_tokens

    def with_text(self: Self, encode: Callable[[str], list[int]]) -> Self:
        """These settings with the text turned into token ids.

        Raises:
            UsageError: The text is empty.
        """
        if not isinstance(self.init_text, str):
            return self
        ids = encode(self.init_text)
        if not ids:
            raise UsageError("peft.init_text: expected text, got none")
        return self.model_copy(update={"init_text": ids})

    def _host(self, model: nn.Module) -> nn.Module:
        """The decoder, after a check that documents still have room.

        Raises:
            UsageError: They have none, or the model has no such decoder, or the decoder already has a prefix.
        """
        _, host = decoder_of(model)
        context = int(model.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
        if host.prefix_length:
            raise UsageError("peft: the model already has a prefix or prompt, expected only one of them")
        if self.length >= context:
            raise UsageError(f"peft: {self.length} virtual tokens leave no room in the model's context of {context}")
        return host

    def _start_ids(self, model: nn.Module) -> Tensor:
        """(P,) int64: the tokens to start from.

        Raises:
            UsageError: ``init_text`` is still text, or its ids are not the model's.
        """
        if isinstance(self.init_text, str):
            raise UsageError("peft.init_text: expected token ids, got text; call with_text first")
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
    """(V, D): the weight of the token embedding; the base's if an adapter wraps it."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight.detach()


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """(n, D): what the decoder gets for token ids (n,), by the base's embedding if an adapter wraps it."""
    weight = embedding_of(model)
    return weight[ids.to(weight.device)] * embed_scale(model.get_input_embeddings())  # type: ignore[operator]


def cycled(ids: Sequence[int], length: int) -> list[int]:
    """The ids, repeated or cut to ``length``."""
    return list(itertools.islice(itertools.cycle(ids), length))


def only_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """The only tensor of such a file, (P, n).

    Raises:
        InputError: It is missing, or the file has others.
    """
    if set(tensors) != {EMBEDDINGS}:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise InputError(f"{WEIGHTS}: expected one tensor named {EMBEDDINGS}, got {names}")
    rows = tensors[EMBEDDINGS]
    if rows.ndim != 2:
        raise InputError(f"{WEIGHTS}: expected {EMBEDDINGS} to be a matrix, got shape {list(rows.shape)}")
    return rows


def refuse(raw: Mapping[str, Any], supported: set[str]) -> None:
    """Refuse keys of ``adapter_config.json`` that are set and not supported.

    Raises:
        InputError: With these keys and their values.
    """
    inert = {"auto_mapping", "inference_mode", "revision", "task_type", "peft_version", "base_model_name_or_path"}
    ignored = supported | inert | {"peft_type"}
    refused = [f"{key} {value!r}" for key, value in raw.items() if value and key not in ignored]
    if refused:
        raise InputError(f"{CONFIG}: not supported: {'; '.join(refused)[:200]}")
    submodules = raw.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise InputError(f"{CONFIG}: num_transformer_submodules {submodules} is for encoder-decoder models, expected 1")
