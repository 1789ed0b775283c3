"""Fused kernels for training: in C for bfloat16 on a CPU, compiled for the machine on first use; in Triton for GPUs.

Without a C compiler, or without Triton, the callers use their PyTorch arithmetic: the same results, more slowly.
"""

from lit_lora.kernels.build import device_type, library, rehearsed, usable
from lit_lora.kernels.call import call, has
from lit_lora.kernels.gpu import switched_off

__all__ = ["call", "device_type", "has", "library", "rehearsed", "switched_off", "usable"]
