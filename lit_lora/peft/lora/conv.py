"""LoRA for convolutions: the update is a convolution to R channels, then a pointwise one to all channels.

``y = W * x + b + s B (A * x)``: ``A`` has the kernel, stride, padding and dilation of ``W``, so the sum is the same
convolution with the weight ``W + s B A``. Source: LoRA, Hu et al. 2021, in PEFT's form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import OwnModule
from lit_lora.peft.core.updates import LowRank, Update

__all__ = ["Conv", "LoRAConv"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LoRAConv(OwnModule):
    """A frozen convolution plus a trained low-rank update.

    ``lora_A`` (R, in, *kernel) and ``lora_B`` (out, R) are float32.

    Args:
        base_layer: The convolution, with one group; it stays unchanged.
        rank: R.
        scaling: The factor of the update, alpha / rank.
        dropout: Share of the update's inputs that are zeroed in training.

    Raises:
        UsageError: The convolution has several groups: their updates are not one product.
    """

    def __init__(self, base_layer: Conv, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        if base_layer.groups > 1:
            raise UsageError(f"peft.target_modules: a convolution has {base_layer.groups} groups, expected one")
        self.base_layer: Conv = base_layer
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        weight = base_layer.weight
        shape = (rank, *weight.shape[1:])
        self.lora_A = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, ...) to (B, out, ...)."""
        base: Tensor = self.base_layer(x)
        dropped = nn.functional.dropout(x, self.dropout, self.training)
        # The base's own forward pass with another weight: stride, padding mode and dilation are those of the base.
        low: Tensor = self.base_layer._conv_forward(dropped, self.lora_A.to(x.dtype), None)  # (B, R, ...)
        channels = 1 if x.dim() == self.lora_A.dim() else 0  # PyTorch also takes an input without a batch dimension
        update = nn.functional.linear(low.movedim(channels, -1), self.lora_B.to(x.dtype)).movedim(-1, channels)
        return base + self.scaling * update

    def updates(self) -> dict[str, Update]:
        """``W + s B A``, with kernels flattened."""
        return {"weight": LowRank(self.lora_B.detach(), self.lora_A.detach().flatten(1), self.scaling)}

    def file_tensors(self) -> dict[str, Tensor]:
        """Both factors, as weights of convolutions: ``B`` has a kernel of size 1."""
        kernel = (1,) * (self.lora_A.dim() - 2)
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B.view(*self.lora_B.shape, *kernel)}

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
