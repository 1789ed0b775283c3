"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
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
"""The environment variables by which users configure PyTorch's GPU allocator."""


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first of cuda, mps and cpu that is available.

    Raises:
        UsageError: The device is not available.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")

    if name == "auto":
        name = available[0]
    kind = name.partition(":")[0]
    if kind not in available:
        raise UsageError(f"device {name!r} is not available", hint=f"this machine has: {', '.join(available)}")

    if kind == "cuda" and sys.platform.startswith("linux") and not _ALLOCATOR & os.environ.keys():
        # PyTorch reads it at CUDA's first tensor. By default, blocks freed by one micro-batch do not fit the sizes of
        # the next, and the allocator takes 1.6 times the memory that tensors need.
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
        raise UsageError(f"unknown dtype {name!r}, expected auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def reuse_memory() -> None:
    """Let glibc keep freed tensors of up to 16 MB for the next ones, instead of returning their pages to the system.

    By default every activation gets fresh pages, and faulting them in takes longer than the arithmetic on them (three
    times as long for an elementwise pass over 6 MB). Larger tensors, such as logits, would leave holes that nothing
    else fills. Does nothing with another C library. Call it before the first product: oneDNN then also keeps 64
    compiled products instead of its default of 1,024, which took 50 MB and saved nothing.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # glibc's numbers for them, of malloc.h
        mallopt(mmap_threshold, 16 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take: of the GPU, or of this machine or container; ``None`` when unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None

    free = []
    with suppress(OSError, ValueError, StopIteration):
        free.append(_kilobytes(Path("/proc/meminfo"), "MemAvailable:"))
    with suppress(OSError, ValueError):  # without a limit, memory.max is the word "max", which is no number
        free.append(_free_in_container(Path("/sys/fs/cgroup")))
    return min(free, default=None)


def _free_in_container(group: Path) -> int:
    """Bytes up to the limit of a control group; cached files that nobody uses can make room."""
    limit = int((group / "memory.max").read_text(encoding="ascii"))
    used = int((group / "memory.current").read_text(encoding="ascii"))
    stats = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return limit - used + int(stats["inactive_file"])


def _kilobytes(path: Path, key: str) -> int:
    """The bytes in a line such as ``VmHWM:   1234 kB``."""
    lines = path.read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(key))
    return 1024 * int(line.split()[1])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by tensors on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    # Linux first: getrusage there also counts what the process that started this one held.
    with suppress(OSError, ValueError, StopIteration):
        return _kilobytes(Path("/proc/self/status"), "VmHWM:")
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes elsewhere


@contextmanager
def report_lack_of_memory(setting: str, kept: Callable[[], str]) -> Iterator[None]:
    """Say plainly when memory runs out inside the block.

    Args:
        setting: The setting to lower, and its value.
        kept: Returns, in words, which checkpoint there is.

    Raises:
        OutOfMemoryError: An allocation failed, of the GPU's memory or of the machine's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            hint = f"{setting}: lower it; or use shorter rows (data.max_seq_length), or model.dtype bf16"
            raise OutOfMemoryError(f"out of memory; {kept()}", hint=hint) from error
        raise
