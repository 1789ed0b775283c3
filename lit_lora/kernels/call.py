"""Call a kernel with tensors and numbers."""

from __future__ import annotations

import ctypes

from torch import Tensor

from lit_lora.kernels.build import library

__all__ = ["call", "has"]


_CAN_FAIL = {"packed_attention", "packed_attention_backward"}
"""These return whether they failed; what the others return means nothing."""


def has(kernel: str) -> bool:
    """Whether the library has this kernel: some are for CPUs with certain instructions."""
    return hasattr(library(), kernel)


def call(kernel: str, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel: tensors as pointers to their data, ``None`` as a null pointer, ints as long.

    On the meta device nothing is computed: kernels write into tensors that their callers made.

    Raises:
        MemoryError: It found no memory to work in.
    """
    if any(isinstance(argument, Tensor) and argument.is_meta for argument in arguments):
        return
    loaded = library()
    assert loaded is not None
    function = getattr(loaded, kernel)
    if function(*map(_argument, arguments)) and kernel in _CAN_FAIL:
        raise MemoryError(f"no memory for {kernel}")


def _argument(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)
