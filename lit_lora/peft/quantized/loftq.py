"""LoftQ: LoRA on a quantized base, both initialized so that their sum is near the original weights.

``W`` is decomposed into codes ``Q`` and a low-rank ``s B A`` (see :mod:`lit_lora.peft.quantized.decompose`), from the
weights alone, without data. The codes differ from those of ``W``, so the run saves its base. ``A`` and ``B`` are
divided by ``sqrt(s)`` each, so that the update adds all of the correction whatever alpha is; the authors' script and
PEFT do not, and with alpha 16 and rank 64 add a quarter of it. Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware
Quantization for Large Language Models", arXiv:2310.08659.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import ChoosesCodes
from lit_lora.peft.core.method import Kind
from lit_lora.peft.core.modules import freeze, own_modules
from lit_lora.peft.core.modules_to_save import find_head
from lit_lora.peft.core.svd import Weights
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.peft.quantized.decompose import Decomposed, decompose
from lit_lora.quantize import QuantizeConfig, Quantized, quantize

__all__ = ["LoftQConfig", "LowRankStart"]

Split = Callable[[str, Tensor, int], Decomposed]
"""Decomposes a layer's weight: called with its name, the weight (out, in) and the rank of the remainder."""


class LowRankStart:
    """A quantizer that decomposes the weights of adapted layers, and stores their remainders for the adapter.

    Args:
        ranks: Ranks of the remainders, by adapted layer.
        split: Decomposes an adapted layer's weight.
        plain: Quantizes the weight of any other layer.
    """

    def __init__(self, ranks: Mapping[str, int], split: Split, plain: Callable[[str, Tensor], Quantized]) -> None:
        self._ranks = ranks
        self._split = split
        self._plain = plain
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantize the weight (out, in) of the layer ``name``."""
        if name not in self._ranks:
            return self._plain(name, weight)
        parts = self._split(name, weight, self._ranks[name])
        self._factors[name] = parts.left, parts.right
        return parts.quantized

    def fill(self, model: nn.Module) -> None:
        """Set ``lora_A`` and ``lora_B`` of the adapter in ``model`` to the remainders, in place."""
        own = own_modules(model)
        with torch.no_grad():
            for name, (left, right) in self._factors.items():
                layer = own[name]
                assert isinstance(layer, LoRALinear)
                root = math.sqrt(layer.scaling)
                layer.lora_A.copy_(right / root)
                layer.lora_B.copy_(left / root)


class LoftQConfig(LoRAConfig, ChoosesCodes):
    """LoftQ: LoRA that starts from the quantization error of the base, without data; for recipe: qlora.

    The run saves its base, which has codes of its own.
    """

    kind: ClassVar[Kind] = "quantized"
    name: Literal["loftq"] = Field("loftq", description="The method.")  # type: ignore[assignment]
    iterations: int = Field(5, ge=1, description="Number of alternating fits of codes and update.")

    @field_validator("init")
    @classmethod
    def _no_init(cls, value: str) -> str:
        if value != "kaiming":
            raise ValueError("has no effect: A and B start from the quantization error; leave it out")
        return value

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "LoftQ"

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> LowRankStart:
        """A quantizer that decomposes the weights of the adapted layers.

        Raises:
            UsageError: The settings do not fit this model.
        """

        def plain(name: str, weight: Tensor) -> Quantized:
            return _quantize(name, weight, quantize)

        def split(name: str, weight: Tensor, rank: int) -> Decomposed:
            return decompose(weight, partial(plain, name), rank, self.iterations)

        return LowRankStart(self.start_ranks(model), split, plain)

    def start_ranks(self, model: nn.Module) -> dict[str, int]:
        """Ranks of the adapted linear layers, except the head, which is not quantized.

        Args:
            model: No values are read; the method is applied to it, in place.

        Raises:
            UsageError: The settings do not fit this model, or adapt no linear layer of the decoder.
        """
        freeze(model)
        head = find_head(model)
        self.apply(model)
        ranks = {
            name: module.rank
            for name, module in own_modules(model).items()
            if isinstance(module, LoRALinear) and name != head
        }
        if not ranks:
            raise UsageError(f"peft.target_modules: {self.name} needs at least one quantized layer to adapt, got none")
        return ranks


def _quantize(name: str, weight: Tensor, config: QuantizeConfig) -> Quantized:
    return quantize(weight, config, name=f"{name}.weight")
