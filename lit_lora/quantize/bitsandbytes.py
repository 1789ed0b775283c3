"""bitsandbytes' kernels for CUDA. The package is imported on first use, and kept from reaching the Hugging Face Hub."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["dequantize", "load", "matrix_vector"]


@lru_cache(maxsize=1)
def load() -> ModuleType | None:
    """The package, or ``None`` where it is not installed or does not work.

    On some CPUs its import downloads kernels from the Hub through the package ``kernels``, where that is installed. It
    manages without, so ``kernels`` is hidden during the import.
    """
    kernels_package = sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level

    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    logger.setLevel(logging.ERROR)  # it warns about the kernels that it does not find
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes")
    except Exception:  # a broken installation fails in many ways, and everything works without it
        return None
    finally:
        logger.setLevel(level)
        if kernels_package is not None:
            sys.modules["kernels"] = kernels_package
        else:
            del sys.modules["kernels"]


def dequantize(
    codes: Tensor, scales: Tensor, name: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The matrix of 4-bit codes, (out, in), a new tensor.

    Args:
        codes: (out * in / 2, 1) uint8.
        scales: (blocks,) float32.
        name: nf4 or fp4.
        block_size: Values per block.
        shape: (out, in).
        dtype: Of the result.
    """
    matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block_size, name, list(shape), dtype)
    return matrix.view(shape)


def matrix_vector(
    x: Tensor, codes: Tensor, scales: Tensor, values: Tensor, block_size: int, shape: tuple[int, int]
) -> Tensor:
    """The matrix times ``x`` (in,), (out,) in the dtype of ``x``; ``values`` are those of the 16 codes."""
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.view(1, -1), codes, list(shape), scales, values, block_size)
    return y.view(-1)
