"""Compile the kernels once per machine and source, and load them."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lit_lora import log
from lit_lora.files import cache_folder
from lit_lora.kernels import gpu

__all__ = ["device_type", "library", "rehearsal", "rehearsed", "usable"]

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_WIDE = ["-mprefer-vector-width=512"]  # where the compiler knows it; GCC's default for these CPUs is 256

Note = Callable[..., None]
"""Called with the name and the arguments of each kernel that a rehearsal calls."""

_REHEARSAL: ContextVar[tuple[Note, str] | None] = ContextVar("_REHEARSAL", default=None)
"""The function to call, and the type of device to stand in for."""


@contextmanager
def rehearsed(note: Note, device: str = "cpu") -> Iterator[None]:
    """Inside the block, tensors on the meta device take the path of those on ``device``, so that an estimate sees it.

    Args:
        note: Called with the name and the arguments of each kernel; on the meta device nothing else happens.
        device: ``cpu`` or ``cuda``; this machine need not have it.
    """
    token = _REHEARSAL.set((note, device))
    try:
        yield
    finally:
        _REHEARSAL.reset(token)


def rehearsal() -> Note | None:
    """The function to call with each kernel, inside :func:`rehearsed`; ``None`` outside."""
    rehearsing = _REHEARSAL.get()
    return None if rehearsing is None else rehearsing[0]


def device_type(device: torch.device) -> str:
    """The type of a device; for the meta device, the one that is rehearsed."""
    rehearsing = _REHEARSAL.get()
    if rehearsing is None or device.type != "meta":
        return device.type
    return rehearsing[1]


def usable(*tensors: Tensor, kernel: str, gaps: bool = False) -> bool:
    """Whether a kernel takes these tensors: on one device, of one dtype, contiguous.

    Kernels for CPUs take bfloat16, those for GPUs any floating dtype.

    Args:
        tensors: Those of the kernel's arguments that decide it.
        kernel: Its name.
        gaps: Whether it takes tensors that are not contiguous.
    """
    first, dtype = tensors[0].device, tensors[0].dtype
    device = device_type(first)
    for tensor in tensors:  # a plain loop, for speed: decoding asks this for every kernel of every token
        if tensor.dtype != dtype or (tensor.device != first and device_type(tensor.device) != device):
            return False
        if not (gaps or tensor.is_contiguous()):
            return False

    if device == "cuda":
        if not dtype.is_floating_point or kernel not in gpu.KERNELS:
            return False
        return tensors[0].is_meta or gpu.usable()  # a rehearsal needs no GPU
    return device == "cpu" and dtype == torch.bfloat16 and hasattr(library(), kernel)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` without a compiler, not on Linux, or with ``LIT_LORA_KERNELS=0``."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if gpu.switched_off() or not sys.platform.startswith("linux"):
        return None
    if compiler is None:
        log.note("no C compiler (cc) found: training in bfloat16 takes about twice as long on this CPU")
        return None
    folder = Path(str(resources.files("lit_lora.kernels")))
    try:
        return ctypes.CDLL(str(_compiled(folder, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        log.note(f"the CPU kernels could not be compiled; falling back to slower PyTorch ones: {error}")
        return None


def _compiled(folder: Path, compiler: str) -> Path:
    """The shared library of the C files in ``folder`` for this CPU; compiled in about 3 s unless it is in the cache."""
    sources = sorted(folder.glob("*.c"))
    text = b"".join(path.read_bytes() for path in [*sources, *sorted(folder.glob("*.h"))])
    # A home folder may be shared by machines: a library is found only by the CPU and compiler that it was made for.
    identity = [text, _cpu().encode(), compiler.encode(), " ".join(_FLAGS).encode()]
    digest = hashlib.sha256(b"|".join(identity)).hexdigest()
    target = cache_folder() / "kernels" / f"{digest[:16]}.so"
    if target.is_file():
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        compiled = Path(temporary) / "cpu.so"
        for wide in (_WIDE, []):  # without it where the compiler does not know it; that must succeed
            command = [compiler, *_FLAGS, *wide, *map(str, sources), "-o", str(compiled), "-lm"]
            completed = subprocess.run(command, capture_output=True, check=not wide)
            if completed.returncode == 0:
                break
        compiled.replace(target)  # atomic: another process sees the whole file or none
    return target


def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    # All cores list the same, so the first line of each kind is enough; "Features" is what Arm calls its flags.
    first_lines = [
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
    ]
    return "".join(first_lines)
