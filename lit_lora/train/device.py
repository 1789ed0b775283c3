"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lit_lora.errors import OutOfMemoryError, UsageError
from lit_lora.model import DTYPES

__all__ = [
    "choose_device",
    "choose_dtype",
    "free_memory_bytes",
    "peak_memory_bytes",
    "report_lack_of_memory",
    "reuse_memory",
]


_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
"""Where users say how PyTorch takes a GPU's memory."""


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one, then Apple's, then the CPU.

    Raises:
        UsageError: The device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there.get(name.partition(":")[0]):
        raise UsageError(
            f"device {name!r} is not there", hint=f"this machine has: {', '.join(d for d in there if there[d])}"
        )
    if name.startswith("cuda") and sys.platform.startswith("linux") and not _ALLOCATOR & os.environ.keys():
        # Before CUDA's first tensor: else blocks of one micro-batch's sizes do not fit those of the next, and 1.6 times
        # the memory that tensors need is taken.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the base weights and of the products.

    ``auto`` is bfloat16 where the hardware multiplies it natively, else float16 on a GPU and float32 on a CPU.

    Raises:
        UsageError: Unknown name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(f"dtype {name!r} is not known, expected auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def reuse_memory() -> None:
    """Let glibc keep freed tensors of up to 16 MB for the next ones, instead of returning their pages to the system.

    Without it every activation is made of fresh pages, and faulting them in costs more than the arithmetic on them
    (three times for an elementwise pass over 6 MB). Larger ones (logits) would leave holes that nothing else fills.
    A no-op where the C library is another. Call it before the first product: oneDNN then also keeps fewer compiled
    products than its 1,024, which took 50 MB and saved nothing.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2
        mallopt(mmap_threshold, 16 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take: of the GPU, or of this machine or container; ``None`` when unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    left = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # "max" is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        stats = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        left.append(limit - int((group / "memory.current").read_text(encoding="ascii")) + int(stats["inactive_file"]))
    return min(left, default=None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError, StopIteration):  # getrusage counts what the starting process held, too
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def report_lack_of_memory(setting: str) -> Iterator[None]:
    """Say plainly when memory runs out inside the block.

    Args:
        setting: What to lower, and what it is now.

    Raises:
        OutOfMemoryError: An allocation failed, of the GPU's memory or of the machine's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            hint = f"{setting}: lower it; or choose shorter rows (data.max_seq_length), or model.dtype bf16"
            raise OutOfMemoryError("out of memory; the last checkpoint is kept", hint=hint) from error
        raise
