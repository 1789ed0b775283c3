"""Call a kernel with tensors and numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from lit_lora.kernels import gpu
from lit_lora.kernels.build import library, rehearsal

__all__ = ["call", "has"]


_CAN_FAIL = {"packed_attention", "packed_attention_backward", "sum_of_products"}
"""Kernels that return whether they failed. The others return nothing, and what ctypes reads then is arbitrary."""


def has(kernel: str) -> bool:
    """Whether the library for CPUs has this kernel: some need certain instructions, such as AVX-512 BF16."""
    return hasattr(library(), kernel)


Argument = Tensor | int | float | Sequence[Tensor | int] | None
"""What a kernel takes; a sequence becomes an array of addresses and numbers."""


def call(kernel: str, *arguments: Argument) -> None:
    """Run a kernel on the device of its tensors; it writes into tensors that the caller made.

    A kernel for CPUs gets tensors as pointers to their data, ``None`` as a null pointer, ints as long, and a sequence
    of tensors and ints as a pointer to an array of addresses and longs. On the meta device nothing is computed.

    Raises:
        MemoryError: There is no memory for the kernel's work space.
    """
    if (note := rehearsal()) is not None:
        note(kernel, *arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and not argument.is_cpu:
            if not argument.is_meta:
                gpu.launch(kernel, arguments)
            return

    compiled = library()
    assert compiled is not None
    function = getattr(compiled, kernel)
    failed = function(*map(_argument, arguments))
    if failed and kernel in _CAN_FAIL:
        raise MemoryError(f"no memory for the work space of {kernel}")


def _argument(value: Argument) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_long(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if value is None:
        return ctypes.c_void_p(0)
    numbers = [item.data_ptr() if isinstance(item, Tensor) else item for item in value]
    return (ctypes.c_long * len(numbers))(*numbers)
