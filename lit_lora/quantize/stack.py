"""The stacked matrices of a mixture's experts in few bits, of which each is dequantized on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_lora.quantize.config import QuantizeConfig
from lit_lora.quantize.weights import Quantized, quantize

__all__ = ["QuantizedStack", "quantize_stack", "quantized_stacks"]


class QuantizedStack(nn.Module):
    """A frozen stack of matrices, stored in few bits; it takes the place and the name of a parameter.

    ``stack[index]`` dequantizes one matrix. The codes are those of one matrix with the rows of all.

    Args:
        quantized: All matrices, one below the other (matrices * rows, columns).
        matrices: Their number.
        dtype: Dtype of the dequantized matrices.
    """

    def __init__(self, quantized: Quantized, matrices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized = quantized
        rows, columns = quantized.shape
        self.shape = (matrices, rows // matrices, columns)
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return self.quantized.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """One matrix (rows, columns), a new tensor."""
        rows = self.shape[1]
        return self.quantized.rows(index * rows, (index + 1) * rows).dequantize(self.dtype)

    def dequantize(self) -> Tensor:
        """All matrices (matrices, rows, columns), a new tensor."""
        return self.quantized.dequantize(self.dtype).view(self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.to(dtype)` leaves the codes alone and changes the dtype that they are dequantized to.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        return f"{self.shape}, dtype={self.dtype}"


def quantize_stack(weight: Tensor, config: QuantizeConfig, *, name: str) -> Quantized:
    """Quantize a stack of matrices (matrices, rows, columns), as one matrix with the rows of all.

    Raises:
        UsageError: The block size does not divide the row length.
    """
    return quantize(weight.reshape(-1, weight.shape[-1]), config, name=name)


def quantized_stacks(module: nn.Module) -> dict[str, QuantizedStack]:
    """The stacks that have taken the place of a module's own parameters, by name."""
    return {name: child for name, child in module.named_children() if isinstance(child, QuantizedStack)}
