"""bitsandbytes' kernels, where they are best: on CUDA. Imported on first use, and so that no hub is reached."""

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

    On some CPUs its import fetches kernels from a hub through the package ``kernels`` when that is installed. It does
    without when it finds none, so ``kernels`` is out of sight during the import.
    """
    hidden, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes")
    level, was_there = logger.level, "kernels" in sys.modules
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes an import of it fail
    logger.setLevel(logging.ERROR)  # it warns of the kernels that it does not find
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes")
    except Exception:  # a broken installation fails in many ways, and everything works without
        return None
    finally:
        logger.setLevel(level)
        if was_there and hidden is not None:
            sys.modules["kernels"] = hidden
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
        block_size: Values of a block.
        shape: (out, in).
        dtype: Of the result.
    """
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block_size, name, list(shape), dtype)
    return made.view(shape)


def matrix_vector(
    x: Tensor, codes: Tensor, scales: Tensor, values: Tensor, block_size: int, shape: tuple[int, int]
) -> Tensor:
    """The matrix times ``x`` (in,), (out,) in the dtype of ``x``; ``values`` are those of the 16 codes."""
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.view(1, -1), codes, list(shape), scales, values, block_size)
    return y.view(-1)
