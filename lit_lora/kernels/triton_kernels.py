"""Fused kernels for training on a GPU. Imported only where there is one: Triton is not required.

Each takes the arguments of its namesake in ``cpu.c`` and computes in float32. Tensors are contiguous, so a kernel gets
bare pointers and finds row ``r`` of a matrix at ``r * width``. A row, or a stretch of elements, is one program. Triton
wants block sizes that are powers of two (the constants in capitals); a mask leaves out what lies beyond the real size.
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
    "geglu",
    "geglu_backward",
    "rms_norm_backward",
    "rotate",
    "swiglu",
    "swiglu_backward",
]

_STRETCH = 2048
"""Elements of a program of an elementwise kernel."""

_LOGITS = 4096
"""Logits of a row that a program has in registers at a time."""

_COMPILED: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, programs: int, *arguments: Any, constants: dict[str, int], **options: Any) -> None:
    """Run a kernel. Compiled ones are called directly: Triton's own look-up takes longer than many a kernel runs.

    Args:
        kernel: Its constants come last.
        programs: Number of programs.
        arguments: All but the constants.
        constants: By name, in the kernel's order.
        options: Of the compiler.
    """
    # Everything that Triton specializes a kernel for must be in the key.
    key = (kernel.__name__, torch.cuda.current_device(), *map(_kind, arguments), *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[(programs,)](*arguments, **constants, **options)
    else:
        compiled[(programs, 1, 1)](*arguments, *constants.values())


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel anew for: dtype and alignment of a pointer; integers that are 1, round or large."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return (argument % 16 == 0, argument == 1, argument >= 2**31) if isinstance(argument, int) else float


@triton.jit
def _add_rms_norm(x, delta, weight, total, normed, roots, width, eps, offset, ADD: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * width may exceed 32
    column = tl.arange(0, WIDTH)
    inside = column < width
    start = row * width

    summed = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        summed += tl.load(delta + start + column, mask=inside, other=0.0).to(tl.float32)
        rounded = summed.to(total.dtype.element_ty)
        tl.store(total + start + column, rounded, mask=inside)
        summed = rounded.to(tl.float32)  # the norm is that of the sum as it is stored, as in PyTorch

    root = 1.0 / tl.sqrt(tl.sum(summed * summed) / width + eps)
    tl.store(roots + row, root)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(normed + start + column, (summed * root * scale).to(normed.dtype.element_ty), mask=inside)


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
    offset: float,
) -> None:
    """See :func:`lit_lora.model.ops.add_rms_norm`: writes ``total``, ``normed`` and ``roots``."""
    added = x if delta is None else delta  # without ADD the kernel does not read it, but a pointer has to be passed
    size = triton.next_power_of_2(width)
    constants = {"ADD": delta is not None, "WIDTH": size}
    _launch(
        _add_rms_norm, tokens, x, added, weight, total, normed, roots, width, eps, offset,
        constants=constants, num_warps=_warps(size),
    )  # fmt: skip


@triton.jit
def _rms_norm_backward(
    grad, grad_total, total, weight, roots, out, width, offset, ADD: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    start = row * width

    summed = tl.load(total + start + column, mask=inside, other=0.0).to(tl.float32)
    scaled_grad = tl.load(grad + start + column, mask=inside, other=0.0).to(tl.float32)
    scaled_grad *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    root = tl.load(roots + row)

    # The second term is what each element changes of all others' norm, by the mean square.
    shift = tl.sum(scaled_grad * summed) * root * root / width
    result = root * (scaled_grad - summed * shift)
    if ADD:
        result += tl.load(grad_total + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + column, result.to(out.dtype.element_ty), mask=inside)


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    roots: Tensor,
    out: Tensor,
    tokens: int,
    width: int,
    offset: float,
) -> None:
    """Write the gradient of the sum into ``out``: what comes through its norm, plus ``grad_total``."""
    added = grad if grad_total is None else grad_total
    size = triton.next_power_of_2(width)
    constants = {"ADD": grad_total is not None, "WIDTH": size}
    _launch(
        _rms_norm_backward, tokens, grad, added, total, weight, roots, out, width, offset,
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
    """Write ``silu(gate) * value`` into ``out``; all have ``count`` elements."""
    _launch(_swiglu, -(-count // _STRETCH), gate, value, out, count, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _swiglu_backward(grad, gate, value, grad_gate, grad_value, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    gate_slope = d * v * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + place, gate_slope.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, (d * g * sigmoid).to(grad_value.dtype.element_ty), mask=inside)


def swiglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor, count: int
) -> None:
    """Write the gradients of ``gate`` and ``value``; all have ``count`` elements."""
    arguments = (grad, gate, value, grad_gate, grad_value, count)
    _launch(_swiglu_backward, -(-count // _STRETCH), *arguments, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _gelu_sigmoid(g):
    # gelu(g) by its approximation with tanh is g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
    return 1.0 / (1.0 + tl.exp(-g * (1.5957691 + 0.07135482 * g * g)))


@triton.jit
def _geglu(gate, value, out, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g * _gelu_sigmoid(g) * v).to(out.dtype.element_ty), mask=inside)


def geglu(gate: Tensor, value: Tensor, out: Tensor, count: int) -> None:
    """Write ``gelu(gate) * value`` into ``out``; all have ``count`` elements."""
    _launch(_geglu, -(-count // _STRETCH), gate, value, out, count, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _geglu_backward(grad, gate, value, grad_gate, grad_value, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _gelu_sigmoid(g)
    slope = 1.5957691 + 0.21406446 * g * g
    gate_slope = d * v * sigmoid * (1.0 + g * (1.0 - sigmoid) * slope)
    tl.store(grad_gate + place, gate_slope.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, (d * g * sigmoid).to(grad_value.dtype.element_ty), mask=inside)


def geglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor, count: int
) -> None:
    """Write the gradients of ``gate`` and ``value``; all have ``count`` elements."""
    arguments = (grad, gate, value, grad_gate, grad_value, count)
    _launch(_geglu_backward, -(-count // _STRETCH), *arguments, constants={"SIZE": _STRETCH}, num_warps=8)


@triton.jit
def _rotate(x, cosine, sine, out, heads, half, turn, HEADS: tl.constexpr, HALF: tl.constexpr):
    # A program is a token, (heads, H). The element at `pair` of a head is turned with the one half a head further.
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
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
    """Turn every pair of ``x`` by its angle, or back with ``turn`` -1.0, into ``out``."""
    constants = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _launch(_rotate, tokens, x, cosine, sine, out, heads, half, turn, constants=constants, num_warps=4)


@triton.jit
def _cross_entropy(logits, labels, losses, scale, vocabulary, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    is_target = label >= 0

    # log(sum(exp(x))) in one pass over the row: the sum so far is scaled anew whenever a higher maximum comes.
    most = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(logits + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher))
        most = higher
    normalizer = most + tl.log(total)
    label_logit = tl.load(logits + tl.where(is_target, label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_target, normalizer - label_logit, 0.0))

    # The gradients go over the logits, so every thread must have read the label's logit before any goes on.
    tl.debug_barrier()
    factor = tl.where(is_target, tl.load(scale), 0.0)  # from memory: each replay of a CUDA graph may have another
    for start in range(0, vocabulary, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(logits + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - normalizer) - tl.where(place == label, 1.0, 0.0)) * factor
        gradient = tl.where(is_target, gradient, 0.0)  # factor 0 is not enough: 0 times infinity is NaN
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < vocabulary)


def cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, rows: int, vocabulary: int, scale: float | Tensor
) -> None:
    """Write the losses; the logits become their gradients."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=losses.device)
    arguments = (logits, labels, losses, scale, vocabulary)
    _launch(_cross_entropy, rows, *arguments, constants={"SIZE": _LOGITS}, num_warps=8)


@triton.jit
def _dequantize_blocks(
    codes, values, absmax, nested, dynamic, offset, out, blocks, NESTED: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    # A program takes ROWS blocks of codes. A block has one scale; with NESTED that is a code itself, (0..255) into
    # `dynamic`, and 256 scales share a value of `nested`.
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = block < blocks
    if NESTED:
        scale = tl.load(dynamic + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(nested + block // 256, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)

    # A byte holds two codes, the first in its high half.
    byte = tl.arange(0, BYTES)[None, :]
    both = tl.load(codes + block[:, None] * BYTES + byte, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(values + (both >> 4))
    second = tl.load(values + (both & 15))
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
    """Write the values of 4-bit codes into ``out``, in its dtype.

    Products are not fused with sums, so the bits are those of the CPU's kernel.

    Raises:
        ValueError: The codes have another number of bits.
    """
    if bits != 4:
        raise ValueError(f"codes of {bits} bits, expected 4")
    is_nested = nested is not None and offset is not None
    if not is_nested:  # the kernel does not read these two, but pointers have to be passed
        nested = offset = absmax
    rows = max(1, 4096 // block)
    constants = {"NESTED": is_nested, "ROWS": rows, "BYTES": block // 2}
    _launch(
        _dequantize_blocks, -(-blocks // rows), codes, values, absmax, nested, dynamic, offset, out, blocks,
        constants=constants, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def _warps(width: int) -> int:
    """Warps (groups of 32 threads) of a program over a row: one for 512 elements, 16 at most."""
    return min(16, max(1, width // 512))


assert torch.cuda.is_available() or triton.knobs.runtime.interpret, "imported only where there is a GPU"
