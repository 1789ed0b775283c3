"""A linear layer over a quantized weight, dequantized one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_lora.quantize.config import QuantizeConfig
from lit_lora.quantize.weights import Quantized

__all__ = ["QuantizedLinear", "count_quantized", "found_config", "stored_bytes"]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in few bits.

    ``weight`` is not a parameter: every read of it dequantizes the whole matrix. For its shape alone, use
    ``out_features`` and ``in_features``.

    Args:
        quantized: The weight (out, in).
        bias: (out,) in ``dtype``.
        dtype: Dtype of ``weight``; the forward pass computes in the dtype of its input.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, (out, in), a new tensor."""
        return self.dequantize()

    def dequantize(self) -> Tensor:
        """The weight, (out, in), a new tensor."""
        return self.quantized.dequantize(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        # A single token, as in decoding, is multiplied straight from the codes.
        if not torch.is_grad_enabled() and input.numel() == self.in_features:
            y = self.quantized.matrix_vector(input.reshape(-1)).view(*input.shape[:-1], -1)
        else:
            y = _Product.apply(input, self.quantized)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.to(dtype)` leaves the codes alone and changes the dtype that they are dequantized to.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.quantized.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, dtype={self.dtype}"


class _Product(torch.autograd.Function):
    """``x @ W.T``; saves nothing for the backward pass, which dequantizes ``W`` again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Quantized) -> Tensor:
        ctx.quantized = quantized
        return nn.functional.linear(x, quantized.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return grad @ ctx.quantized.dequantize(grad.dtype), None


def found_config(model: nn.Module) -> QuantizeConfig | None:
    """How most of a model's quantized layers are quantized; ``None`` if it has none."""
    configs = [module.config for module in model.modules() if isinstance(module, Quantized)]
    return max(configs, key=configs.count, default=None)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def count_quantized(model: nn.Module) -> int:
    """Number of weights that are stored quantized, and so are missing from ``model.parameters()``."""
    return sum(module.shape[0] * module.shape[1] for module in model.modules() if isinstance(module, Quantized))
