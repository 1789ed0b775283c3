"""The kernels for GPUs, compiled by Triton: they take the arguments of those in C, in any floating dtype."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lit_lora import log

__all__ = ["KERNELS", "launch", "switched_off", "usable"]

KERNELS = frozenset(
    (
        "add_rms_norm",
        "cross_entropy",
        "dequantize_blocks",
        "geglu",
        "geglu_backward",
        "rms_norm_backward",
        "rotate",
        "swiglu",
        "swiglu_backward",
    )
)


def switched_off() -> bool:
    """Whether ``LIT_LORA_KERNELS=0`` leaves everything to PyTorch, on CPUs too."""
    return os.environ.get("LIT_LORA_KERNELS") == "0"


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether Triton is installed and compiles for this machine's GPU; tried once, with a small kernel."""
    if not torch.cuda.is_available() or switched_off():
        return False
    try:
        one = torch.ones(1, device="cuda")
        _kernels().swiglu(one, one, torch.empty_like(one), 1)
    except Exception as error:  # an installation without a compiler, or a GPU of another kind, fails in many ways
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        log.note(f"Triton kernels are unavailable; falling back to slower PyTorch ones: {reason}")
        return False
    return True


def launch(kernel: str, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on the device that its tensors are on."""
    function = getattr(_kernels(), kernel)
    index = next(argument for argument in arguments if isinstance(argument, Tensor)).get_device()
    if index == torch.cuda.current_device():
        function(*arguments)
        return
    with torch.cuda.device(index):  # Triton launches on the current device, wherever the tensors are
        function(*arguments)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return importlib.import_module("lit_lora.kernels.triton_kernels")
