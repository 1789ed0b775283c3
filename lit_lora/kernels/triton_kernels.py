"""Fused kernels for training on a GPU. Imported only where there is one: Triton is no requirement.

Each has the arguments of its namesake in ``cpu.c`` and its arithmetic in float32. A row of a matrix, or a stretch of
numbers, is one program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "dequantize_blocks",
    "rms_norm_backward",
    "rotate",
    "swiglu",
    "swiglu_backward",
]

_STRETCH = 2048
_LOGITS = 4096
_COMPILED: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, programs: int, *arguments: Any, constants: dict[str, int], **options: Any) -> None:
    """Run so many programs of a kernel, past most of Triton's own look-up, which takes longer than many a kernel.

    Args:
        kernel: Its constants come last.
        programs: How many.
        arguments: All but the constants.
        constants: In order.
        options: Of the compiler.
    """
    key = (kernel.__name__, torch.cuda.current_device(), *map(_kind, arguments), *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[(programs,)](*arguments, **constants, **options)
    else:
        compiled[(programs, 1, 1)](*arguments, *constants.values())


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel anew for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return (argument % 16 == 0, argument == 1, argument >= 2**31) if isinstance(argument, int) else float


@triton.jit
def _add_rms_norm(x, delta, weight, total, normed, roots, width, eps, ADD: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    wide = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(delta + row * width + place, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * width + place, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    tl.store(roots + row, root)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + place, (wide * root * scale).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    total: Tensor,
    normed: Tensor,
    roots: Tensor,
    tokens: int,
    width: int,
    eps: float,
) -> None:
    """Norm of a sum."""
    given = x if delta is None else delta
    size = triton.next_power_of_2(width)
    constants = {"ADD": delta is not None, "WIDTH": size}
    _launch(
        _add_rms_norm, tokens, x, given, weight, total, normed, roots, width, eps,
        constants=constants, num_warps=_warps(size),
    )  # fmt: skip


@triton.jit
def _rms_norm_backward(grad, grad_total, total, weight, roots, out, width, ADD: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    start = row * width
    wide = tl.load(total + start + place, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + start + place, mask=inside, other=0.0).to(tl.float32)
    given *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(roots + row)
    shift = tl.sum(given * wide) * root * root / width
    result = root * (given - wide * shift)
    if ADD:
        result += tl.load(grad_total + start + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + place, result.to(out.dtype.element_ty), mask=inside)


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    roots: Tensor,
    out: Tensor,
    tokens: int,
    width: int,
) -> None:
    """Gradient of what the norm took, with that of the sum added."""
    given = grad if grad_total is None else grad_total
    size = triton.next_power_of_2(width)
    constants = {"ADD": grad_total is not None, "WIDTH": size}
    _launch(
        _rms_norm_backward, tokens, grad, given, total, weight, roots, out, width,
        constants=constants, num_warps=_warps(size),
    )  # fmt: skip


@triton.jit
def _swiglu(gate, value, out, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g / (1.0 + tl.exp(-g)) * v).to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, value: Tensor, out: Tensor, count: int) -> None:
    """``silu(gate) * value``."""
    _launch(_swiglu, -(-count // _STRETCH), gate, value, out, count, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _swiglu_backward(grad, gate, value, grad_gate, grad_value, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    of_gate = d * v * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + place, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, (d * g * sigmoid).to(grad_value.dtype.element_ty), mask=inside)


def swiglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor, count: int
) -> None:
    """Gradients of both."""
    given = (grad, gate, value, grad_gate, grad_value, count)
    _launch(_swiglu_backward, -(-count // _STRETCH), *given, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _rotate(x, cosine, sine, out, heads, half, turn, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    c = tl.load(cosine + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sine + token * half + pair, mask=pair < half, other=0.0) * turn
    place = (token * heads + head) * 2 * half + pair
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rotate(
    x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor, tokens: int, heads: int, half: int, turn: float
) -> None:
    """Every pair turned by its angle times ``turn``, 1.0 or -1.0."""
    constants = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _launch(_rotate, tokens, x, cosine, sine, out, heads, half, turn, constants=constants, num_warps=4)


@triton.jit
def _cross_entropy(logits, labels, losses, scale, vocabulary, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    is_target = label >= 0
    most = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(logits + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher))
        most = higher
    normaliser = most + tl.log(total)
    chosen = tl.load(logits + tl.where(is_target, label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_target, normaliser - chosen, 0.0))
    tl.debug_barrier()  # the label's logit is read before it is overwritten
    factor = tl.where(is_target, tl.load(scale), 0.0)
    for start in range(0, vocabulary, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(logits + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - normaliser) - tl.where(place == label, 1.0, 0.0)) * factor
        gradient = tl.where(is_target, gradient, 0.0)  # also of a row that is not finite
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < vocabulary)


def cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, rows: int, vocabulary: int, scale: float | Tensor
) -> None:
    """The losses; the logits become their gradients."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=losses.device)
    given = (logits, labels, losses, scale, vocabulary)
    _launch(_cross_entropy, rows, *given, constants={"SIZE": _LOGITS}, num_warps=8)


@triton.jit
def _dequantize_blocks(
    codes, values, absmax, nested, dynamic, offset, out, blocks, NESTED: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = block < blocks
    if NESTED:
        scale = tl.load(dynamic + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(nested + block // 256, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    byte = tl.arange(0, BYTES)[None, :]
    both = tl.load(codes + block[:, None] * BYTES + byte, mask=inside[:, None], other=0).to(tl.int32)
    first, second = tl.load(values + (both >> 4)), tl.load(values + (both & 15))
    result = tl.interleave(first * scale[:, None], second * scale[:, None])
    place = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside[:, None])


def dequantize_blocks(
    codes: Tensor,
    values: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    dynamic: Tensor,
    offset: Tensor | None,
    out: Tensor,
    blocks: int,
    block: int,
    bits: int,
    wide: int,
) -> None:
    """The matrix of 4-bit codes, in the dtype of ``out``. Products are not fused with sums, so bits are the CPU's."""
    if bits != 4:
        raise ValueError(f"codes of {bits} bits, expected 4")
    rows = max(1, 4096 // block)
    given = (absmax, nested, offset) if nested is not None and offset is not None else (absmax, absmax, absmax)
    constants = {"NESTED": nested is not None, "ROWS": rows, "BYTES": block // 2}
    _launch(
        _dequantize_blocks, -(-blocks // rows), codes, values, given[0], given[1], dynamic, given[2], out, blocks,
        constants=constants, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def _warps(width: int) -> int:
    """Threads of a program over a row, in groups of 32: 8 or more numbers for each."""
    return min(16, max(1, width // 512))


assert torch.cuda.is_available() or triton.knobs.runtime.interpret, "imported only where there is a GPU"
