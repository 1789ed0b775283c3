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
_WIDE = ["-mprefer-vector-width=512"]  # where the compiler knows it; GCC's default for these CPUs is half


Note = Callable[..., None]

_REHEARSAL: ContextVar[tuple[Note, str] | None] = ContextVar("_REHEARSAL", default=None)


@contextmanager
def rehearsed(note: Note, device: str = "cpu") -> Iterator[None]:
    """Inside the block, tensors of the meta device take the way that those of ``device``, cpu or cuda, take.

    Args:
        note: Told of each kernel that is called, its name and arguments. With tensors of the meta device nothing else
            happens.
        device: A type of device; there need be none here.
    """
    token = _REHEARSAL.set((note, device))
    try:
        yield
    finally:
        _REHEARSAL.reset(token)


def rehearsal() -> Note | None:
    """What is to be told of kernels that are called, inside :func:`rehearsed`."""
    found = _REHEARSAL.get()
    return None if found is None else found[0]


def device_type(device: torch.device) -> str:
    """Of which kind a device is; of the meta device, which one is rehearsed."""
    found = _REHEARSAL.get()
    return device.type if found is None or device.type != "meta" else found[1]


def usable(*tensors: Tensor, kernel: str, gaps: bool = False) -> bool:
    """Whether a kernel takes these tensors, laid out without gaps unless these are allowed.

    Those for CPUs take bfloat16, those for GPUs one floating dtype.

    Args:
        tensors: All of the kernel's that decide it.
        kernel: Its name.
        gaps: They may have gaps between rows.
    """
    place, dtype = tensors[0].device, tensors[0].dtype
    device = device_type(place)
    for tensor in tensors:  # a loop: this is asked for every kernel of every token
        if tensor.dtype != dtype or (tensor.device != place and device_type(tensor.device) != device):
            return False
        if not (gaps or tensor.is_contiguous()):
            return False
    if device == "cuda":
        rehearsed_only = tensors[0].is_meta
        return dtype.is_floating_point and kernel in gpu.KERNELS and (rehearsed_only or gpu.usable())
    return device == "cpu" and dtype == torch.bfloat16 and hasattr(library(), kernel)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` without a compiler, not on Linux, or with ``LIT_LORA_KERNELS=0``."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if gpu.switched_off() or not sys.platform.startswith("linux"):
        return None
    if compiler is None:
        log.note("no C compiler found (cc): training in bfloat16 on this CPU takes about twice the time")
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(str(resources.files("lit_lora.kernels"))), compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        log.note(f"the CPU kernels could not be compiled, going on without them: {error}")
        return None


def _compiled(folder: Path, compiler: str) -> Path:
    """The shared library of the C files in ``folder`` for this CPU, compiled (3 s) when it is not in the cache."""
    sources = sorted(folder.glob("*.c"))
    text = b"".join(path.read_bytes() for path in [*sources, *sorted(folder.glob("*.h"))])
    identity = [text, _cpu().encode(), compiler.encode(), " ".join(_FLAGS).encode()]
    target = cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(identity)).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "cpu.so"
        for wide in (_WIDE, []):
            command = [compiler, *_FLAGS, *wide, *map(str, sources), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, check=not wide)
            if done.returncode == 0:
                break
        made.replace(target)
    return target


def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
    )
