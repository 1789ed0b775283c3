"""Residual adapters for convolutional nets: a 1×1 convolution added to the output of every filter bank.

::

    y = conv(x);  g(y) = y + α * y       α: (channels, channels, 1, 1), zero at first; * is the convolution

Source: Rebuffi et al. 2017, "Learning multiple visual domains with residual adapters", section 3.1. The scale and bias
of the batch norms train too (section 3.2); their running statistics remain those of the base.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora.errors import UsageError
from lit_lora.peft.core.added import AddedModule
from lit_lora.peft.core.matching import select
from lit_lora.peft.core.modules import replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy
from lit_lora.peft.core.with_modules_to_save import WithModulesToSave

__all__ = ["ResidualAdapter", "ResidualConfig"]


class ResidualAdapter(AddedModule):
    """``y + α * y`` of a convolution's output.

    Args:
        channels: Channels of the output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels, channels, 1, 1))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(B, channels, height, width) to the same."""
        return output + F.conv2d(output, self.alpha.to(output.dtype))

    def extra_repr(self) -> str:
        """Channels."""
        return f"{len(self.alpha)} channels"


class TrainedBatchNorm(TrainedCopy):
    """A batch norm whose scale and bias train, while its running statistics do not change."""

    def train(self, mode: bool = True) -> TrainedBatchNorm:
        """Set this module's mode; the batch norm itself stays in evaluation mode, in which it uses its statistics."""
        super().train(mode)
        self.base_layer.eval()
        return self


class ResidualConfig(WithModulesToSave):
    """Residual adapters: 1×1 convolutions added to the filters of a convolutional network."""

    default_lr: ClassVar[float | None] = 1e-3
    name: Literal["residual"] = Field("residual", description="The method.")
    target_modules: list[str] = Field(["*"], min_length=1, description="Convolutions that get an adapter; * for all.")
    train_norms: bool = Field(True, description="Also train the scale and bias of the batch norms.")

    def add(self, model: nn.Module) -> None:
        """Add the adapters, and let the batch norms train.

        Raises:
            UsageError: The model has no convolution that a target names.
        """
        convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        if not convolutions:
            raise UsageError("peft: residual adapters are for convolutional networks, but this model has no Conv2d")
        for name in select(self.target_modules, convolutions, key="peft.target_modules"):
            convolution = convolutions[name]
            ResidualAdapter(convolution.out_channels).join(convolution)
        if self.train_norms:
            batch_norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
            for name in batch_norms:
                replace_module(model, name, TrainedBatchNorm(model.get_submodule(name)))
        self.train_modules_to_save(model)
