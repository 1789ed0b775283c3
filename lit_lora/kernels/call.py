"""Call a kernel with tensors and numbers."""

from __future__ import annotations

import ctypes

from torch import Tensor

from lit_lora.kernels.build import library

__all__ = ["call"]


def call(kernel: str, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel of ``cpu.c``: tensors as pointers to their data, ``None`` as a null pointer, ints as long."""
    loaded = library()
    assert loaded is not None
    getattr(loaded, kernel)(*map(_argument, arguments))


def _argument(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)
