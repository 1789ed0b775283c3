"""LQ-LoRA: a number of bits per layer under a budget, and LoRA that starts from the quantization error.

LoftQ with three additions: an integer program chooses one of ``CHOICES`` for each matrix, so that all fit into a budget
with the least error; the alternating fits of codes and update stop when they gain nothing; and errors can be weighed by
Fisher information, the mean squared gradient of the loss on the user's rows. Only its means over rows and over columns
are used, because only for such weights is the best low-rank approximation of a weighted matrix known.
The error of each choice is measured on the codes, before the update. The choices are types of this package, with
scales in 8 bits, instead of the paper's 432 configurations.
Source: Guo et al. 2023, "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition", arXiv:2311.12023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import ChoosesTypes, NeedsQuantizedBase, WeighsErrors
from lit_lora.peft.core.modules_to_save import find_head
from lit_lora.peft.core.svd import Weights
from lit_lora.peft.quantized.decompose import Decomposed, decompose
from lit_lora.peft.quantized.loftq import LoftQConfig, LowRankStart
from lit_lora.quantize import QuantizeConfig, Quantized, Quantizer, stored_bytes
from lit_lora.quantize import quantize as quantize_matrix
from lit_lora.quantize.budget import choose

__all__ = ["CHOICES", "LQLoRAConfig"]

CHOICES = [
    *(QuantizeConfig(name=name, block_size=size) for name in ("nf2", "nf3", "nf4") for size in (64, 32)),
    QuantizeConfig(name="int8"),
]
_LEAST_GAIN = 1e-3  # the fits of a matrix stop when one lowers its error by less than this share


class LQLoRAConfig(LoftQConfig, NeedsQuantizedBase, WeighsErrors, ChoosesTypes):
    """LQ-LoRA: bits per layer under a budget, and LoRA that starts from the quantization error; for recipe: qlora.

    It chooses the types itself, so ``quantize`` is left out. The run saves its base.
    """

    name: Literal["lq-lora"] = Field("lq-lora", description="The method.")  # type: ignore[assignment]
    iterations: int = Field(
        20, ge=1, description="Maximum number of alternating fits of codes and update; stops early without a gain."
    )
    bits: float = Field(3.0, gt=0, description="Budget in bits per weight of the quantized layers, scales included.")
    gib: float | None = Field(None, gt=0, description="Budget in GiB for the quantized layers, instead of bits.")
    fisher_rows: int = Field(
        0,
        ge=0,
        description="Number of training rows whose gradients weigh the errors; above 0, the model is loaded once in "
        "full precision.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> LQLoRAConfig:
        if self.gib is not None and "bits" in self.model_fields_set and self.bits != 3.0:
            raise ValueError("bits and gib are both budgets, expected only one of them")
        return self

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "LQ-LoRA"

    @property
    def calibration_rows(self) -> int:
        """Number of rows whose gradients weigh the base's quantization errors."""
        return self.fisher_rows

    def for_quantized_base(self, quantize: QuantizeConfig) -> LQLoRAConfig:
        """These settings.

        Raises:
            UsageError: ``quantize`` is not the default, though this method chooses the types.
        """
        if quantize != QuantizeConfig():
            raise UsageError("quantize: has no effect with lq-lora, which chooses a type per layer; leave it out")
        return self

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> LowRankStart:
        """A quantizer that decomposes the weights of the adapted layers, each in the type chosen for it.

        Raises:
            UsageError: The settings do not fit this model, or the budget cannot be met.
        """
        weights_of = weights or {}
        # Before start_ranks, which puts the adapter into the model.
        configs = self._choose(model, lambda name, config: _error(read(name), config, weights_of.get(name)))
        ranks = self.start_ranks(model)

        def plain(name: str, weight: Tensor) -> Quantized:
            return quantize_matrix(weight, configs[name])

        def split(name: str, weight: Tensor, rank: int) -> Decomposed:
            return decompose(
                weight,
                partial(plain, name),
                rank,
                self.iterations,
                weights=weights_of.get(name),
                least_gain=_LEAST_GAIN,
            )

        return LowRankStart(ranks, split, plain)

    def planned(self, model: nn.Module) -> Quantizer:
        """Types under the budget, chosen as if the error depended only on a layer's size and number of bits.

        Raises:
            UsageError: The budget cannot be met.
        """
        sizes = {name: layer.weight.numel() for name, layer in _linears(model).items()}
        # One bit less doubles the distance between codes, and so makes the squared error four times as large.
        configs = self._choose(model, lambda name, config: sizes[name] * 4.0**-config.bits)
        return lambda name, weight: quantize_matrix(weight, configs[name])

    def _choose(self, model: nn.Module, error: Callable[[str, QuantizeConfig], float]) -> dict[str, QuantizeConfig]:
        """The type of each linear layer of the decoder, so that the sum of errors is least under the budget.

        Args:
            model: Without an adapter; no values are read.
            error: The squared error of a layer in a type.

        Raises:
            UsageError: The budget cannot be met.
        """
        shapes = {name: layer.weight.shape for name, layer in _linears(model).items()}
        options = {name: _options(name, shape) for name, shape in shapes.items()}
        sizes = [[option.size for option in layer_options] for layer_options in options.values()]
        weight_count = sum(shape.numel() for shape in shapes.values())
        budget = self._budget(sizes, weight_count)

        errors = []
        for name, layer_options in options.items():
            errors.append([error(name, option.config) for option in layer_options])
        chosen = choose(errors, sizes, budget)  # per layer, the index of its option
        return {name: options[name][index].config for name, index in zip(options, chosen, strict=True)}

    def _budget(self, sizes: Sequence[Sequence[int]], weight_count: int) -> int:
        """The budget in bytes.

        Args:
            sizes: The sizes in bytes that each layer can have.
            weight_count: Number of weights of all layers.

        Raises:
            UsageError: The smallest types need more.
        """
        least = sum(min(layer_sizes) for layer_sizes in sizes)
        if self.gib is not None:
            budget = int(self.gib * 2**30)
            setting = f"peft.gib: a budget of {self.gib:g} GiB"
            needed = f"{least / 2**30:.4g} GiB"
        else:
            budget = int(self.bits * weight_count / 8)
            setting = f"peft.bits: a budget of {self.bits:g} bits per weight"
            needed = f"{8 * least / weight_count:.3f} bits"
        if budget < least:
            raise UsageError(f"{setting} is too small, expected at least {needed}")
        return budget


class _Option(NamedTuple):
    """A type that a matrix can be quantized to."""

    config: QuantizeConfig
    size: int
    """Bytes."""


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, without the head."""
    head = find_head(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head}


def _options(name: str, shape: torch.Size) -> list[_Option]:
    """The types whose blocks divide a matrix's columns."""
    empty = torch.empty(shape, device="meta")
    options = []
    for config in CHOICES:
        if config.name == "int8" or shape[1] % config.block_size == 0:  # int8 has no blocks
            quantized = quantize_matrix(empty, config, name=name)
            options.append(_Option(config, stored_bytes(quantized)))
    return options


def _error(weight: Tensor, config: QuantizeConfig, weights: Weights | None) -> float:
    """Squared norm of the quantization error, weighted."""
    error = weight.float() - quantize_matrix(weight, config).dequantize(torch.float32)
    if weights is not None:
        error = weights.apply(error)
    return float(error.square().sum(dtype=torch.float64))
