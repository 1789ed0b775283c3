"""LoftQ: LoRA on a quantised base, both chosen so that together they start near the original weights.

``W`` is taken apart into codes ``Q`` and a low-rank ``s B A`` in turns (see :mod:`lit_lora.peft.quantized.decompose`),
from the weights alone, without data. The codes are therefore not those of ``W``, and the run keeps its base. ``A`` and
``B`` are divided by ``sqrt(s)`` each, so that the branch adds all of the correction whatever alpha is; the authors'
script and PEFT leave that out, and with alpha 16 and rank 64 add a quarter of it. Source: Li et al. 2023, "LoftQ:
LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
"""Takes the weight of the layer of a name apart, with a remainder of a rank."""


class LowRankStart:
    """Takes the weights of adapted layers apart as they come and keeps the remainders; quantises the others.

    Args:
        ranks: Of the remainder, by layer.
        split: How an adapted layer is taken apart.
        plain: How the others are quantised.
    """

    def __init__(self, ranks: Mapping[str, int], split: Split, plain: Callable[[str, Tensor], Quantized]) -> None:
        self._ranks, self._split, self._plain = ranks, split, plain
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantise the weight (out, in) of the layer ``name``."""
        if name not in self._ranks:
            return self._plain(name, weight)
        parts = self._split(name, weight, self._ranks[name])
        self._factors[name] = parts.left, parts.right
        return parts.quantized

    def fill(self, model: nn.Module) -> None:
        """Give ``lora_A`` and ``lora_B`` of the adapter in ``model`` their values, in place."""
        own = own_modules(model)
        with torch.no_grad():
            for name, (left, right) in self._factors.items():
                layer = own[name]
                assert isinstance(layer, LoRALinear)
                root = math.sqrt(layer.scaling)
                layer.lora_A.copy_(right / root)
                layer.lora_B.copy_(left / root)


class LoftQConfig(LoRAConfig, ChoosesCodes):
    """LoftQ: LoRA that starts from what quantising the base loses, without data; for recipe: qlora.

    The run keeps its base, which has codes of its own.
    """

    kind: ClassVar[Kind] = "quantized"
    name: Literal["loftq"] = Field("loftq", description="The method.")  # type: ignore[assignment]
    iterations: int = Field(5, ge=1, description="How many times codes and update are fitted in turns.")

    @field_validator("init")
    @classmethod
    def _own_start(cls, value: str) -> str:
        if value != "kaiming":
            raise ValueError("has no effect: A and B start from what quantising loses; leave it out")
        return value

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "LoftQ"

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> LowRankStart:
        """What takes the weights of the adapted layers apart.

        Raises:
            UsageError: The settings do not fit this model.
        """

        def split(name: str, weight: Tensor, rank: int) -> Decomposed:
            return decompose(weight, lambda rest: _quantize(name, rest, quantize), rank, self.iterations)

        return LowRankStart(self.start_ranks(model), split, lambda name, weight: _quantize(name, weight, quantize))

    def start_ranks(self, model: nn.Module) -> dict[str, int]:
        """Rank of every linear layer that is adapted; applies the method to ``model``, which is without values.

        Raises:
            UsageError: The settings do not fit this model, or adapt no linear layer of the decoder.
        """
        freeze(model)
        head = find_head(model)
        self.apply(model)
        own = own_modules(model)
        ranks = {n: module.rank for n, module in own.items() if isinstance(module, LoRALinear) and n != head}
        if not ranks:
            raise UsageError(f"peft.target_modules: {self.name} starts from quantised layers, none of them is adapted")
        return ranks


def _quantize(name: str, weight: Tensor, config: QuantizeConfig) -> Quantized:
    return quantize(weight, config, name=f"{name}.weight")
