"""LQ-LoRA: each layer in its own number of bits under a budget, and LoRA that starts from what they lose.

As LoftQ, with three things more: an integer program gives each matrix one of ``CHOICES`` so that all fit into a budget
and lose least; codes and update are fitted in turns until that gains nothing; and errors can be weighed by Fisher
information, the mean squared gradient of the loss on the user's rows, of which the means over rows and over columns are
kept, for a weighted matrix has a best low-rank approximation only then.
What is lost by each choice is measured on the codes, before the update. The choices are types of this package, with
scales in 8 bits, in the place of the article's 432.
Source: Guo et al. 2023, "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition", arXiv:2311.12023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import ChoosesTypes, NeedsQuantizedBase, WeighsErrors
from lit_lora.peft.core.modules_to_save import find_head
from lit_lora.peft.core.svd import Weights
from lit_lora.peft.quantized.decompose import Decomposed, decompose
from lit_lora.peft.quantized.loftq import LoftQConfig, LowRankStart
from lit_lora.quantize import QuantizeConfig, Quantizer, stored_bytes
from lit_lora.quantize import quantize as quantize_matrix
from lit_lora.quantize.budget import choose

__all__ = ["CHOICES", "LQLoRAConfig"]

CHOICES = [
    *(QuantizeConfig(name=name, block_size=size) for name in ("nf2", "nf3", "nf4") for size in (64, 32)),
    QuantizeConfig(name="int8"),
]
_LEAST_GAIN = 1e-3


class LQLoRAConfig(LoftQConfig, NeedsQuantizedBase, WeighsErrors, ChoosesTypes):
    """LQ-LoRA: bits per layer under a budget, and LoRA that starts from what they lose; for recipe: qlora.

    The types are chosen here, so ``quantize`` is left out. The run keeps its base.
    """

    name: Literal["lq-lora"] = Field("lq-lora", description="The method.")  # type: ignore[assignment]
    iterations: int = Field(
        20, ge=1, description="How many times at most codes and update are fitted in turns; ends when it gains nothing."
    )
    bits: float = Field(3.0, gt=0, description="Budget: bits a weight of the quantised layers, scales included.")
    gib: float | None = Field(None, gt=0, description="Budget in GiB for the quantised layers, in the place of bits.")
    fisher_rows: int = Field(
        0, ge=0, description="Rows of the data whose gradients weigh the errors; needs the model in full once."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> LQLoRAConfig:
        if self.gib is not None and "bits" in self.model_fields_set and self.bits != 3.0:
            raise ValueError("bits and gib are two budgets, expected one of them")
        return self

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "LQ-LoRA"

    @property
    def calibration_rows(self) -> int:
        """Rows of the data whose gradients say how much errors of the base matter."""
        return self.fisher_rows

    def for_quantized_base(self, quantize: QuantizeConfig) -> LQLoRAConfig:
        """These settings; the types are theirs to choose.

        Raises:
            UsageError: A type is given.
        """
        if quantize != QuantizeConfig():
            raise UsageError("peft.name: lq-lora chooses a type for each layer: quantize has no effect, leave it out")
        return self

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> LowRankStart:
        """What takes the weights of the adapted layers apart, each in the type chosen for it.

        Raises:
            UsageError: The settings do not fit this model, or the budget cannot be met.
        """
        matters = weights or {}
        configs = self._chosen(model, lambda name, config: _loss(read(name), config, matters.get(name)))
        ranks = self.start_ranks(model)

        def split(name: str, weight: Tensor, rank: int) -> Decomposed:
            settings: dict[str, Any] = {"weights": matters.get(name), "least_gain": _LEAST_GAIN}
            return decompose(weight, lambda rest: _codes(rest, configs[name]), rank, self.iterations, **settings)

        return LowRankStart(ranks, split, lambda name, weight: _codes(weight, configs[name]))

    def planned(self, model: nn.Module) -> Quantizer:
        """Types under the budget, as they would be if all layers lost alike by fewer bits.

        Raises:
            UsageError: The budget cannot be met.
        """
        sizes = {name: layer.weight.numel() for name, layer in _linears(model).items()}
        configs = self._chosen(model, lambda name, config: sizes[name] * 4.0**-config.bits)
        return lambda name, weight: quantize_matrix(weight, configs[name])

    def _chosen(self, model: nn.Module, loss: Callable[[str, QuantizeConfig], float]) -> dict[str, QuantizeConfig]:
        """The type of every linear layer of the decoder that loses least under the budget.

        Raises:
            UsageError: The budget cannot be met.
        """
        shapes = {name: layer.weight.shape for name, layer in _linears(model).items()}
        options = {name: _options(name, shape) for name, shape in shapes.items()}
        budget = self._budget(options, sum(shape.numel() for shape in shapes.values()))
        losses = [[loss(name, config) for config, _ in choices] for name, choices in options.items()]
        chosen = choose(losses, [[size for _, size in choices] for choices in options.values()], budget)
        return {name: options[name][place][0] for name, place in zip(options, chosen, strict=True)}

    def _budget(self, options: Mapping[str, list[tuple[QuantizeConfig, int]]], count: int) -> int:
        """Bytes.

        Raises:
            UsageError: They are fewer than the smallest types take.
        """
        budget = int(self.bits * count / 8 if self.gib is None else self.gib * 2**30)
        least = sum(min(size for _, size in choices) for choices in options.values())
        if budget < least:
            key, given, needed = (
                ("bits", f"{self.bits:g} bits a weight", f"{8 * least / count:.3f}")
                if self.gib is None
                else ("gib", f"{self.gib:g} GiB", f"{least / 2**30:.4g}")
            )
            raise UsageError(f"peft.{key}: a budget of {given} cannot be met, the least is {needed}")
        return budget


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, without the head."""
    head = find_head(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head}


def _options(name: str, shape: torch.Size) -> list[tuple[QuantizeConfig, int]]:
    """The types that fit a matrix, with their bytes."""
    empty = torch.empty(shape, device="meta")
    fitting = [config for config in CHOICES if config.name == "int8" or shape[1] % config.block_size == 0]
    return [(config, stored_bytes(quantize_matrix(empty, config, name=name))) for config in fitting]


def _loss(weight: Tensor, config: QuantizeConfig, weights: Weights | None) -> float:
    """Squared norm of what the codes lose, weighted."""
    lost = weight.float() - quantize_matrix(weight, config).dequantize(torch.float32)
    return float((lost if weights is None else weights.apply(lost)).square().sum(dtype=torch.float64))


def _codes(weight: Tensor, config: QuantizeConfig) -> Any:
    return quantize_matrix(weight, config)
