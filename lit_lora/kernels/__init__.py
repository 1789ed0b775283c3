"""Fused kernels for training in bfloat16 on a CPU, compiled for the machine on first use.

Where there is no C compiler the callers use their PyTorch arithmetic: the same results, more slowly.
"""

from lit_lora.kernels.build import library, rehearsed, usable
from lit_lora.kernels.call import call, has

__all__ = ["call", "has", "library", "rehearsed", "usable"]
