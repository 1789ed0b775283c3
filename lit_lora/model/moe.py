"""Mixture of experts: an MLP per expert, of which a router chooses a few for each token.

::

    x (T, D) ─► router ─► k experts and weights per token
       │
       └─► rows (T · k, D), sorted by expert ─► each expert's MLP ─► sorted back ─► weighted sum (T, D)

The weights of a layer's experts are two tensors with one matrix per expert, named as in transformers' models. Only
experts that some token chose are computed, each by one product over all of its rows. Rows are moved by permutations and
summed in a fixed order, so results are the same bits on every run.

Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_lora.model.config import ModelConfig
from lit_lora.model.layers import GATED, MLP, Linear, add_part, recomputed
from lit_lora.model.ops import linear
from lit_lora.model.products import sum_of_products

__all__ = ["ExpertLayer", "Experts", "MixtureOfExperts", "Router", "Stack", "run_experts"]


class Router(nn.Module):
    """Chooses experts for each token: those of the largest softmax probabilities, which become their weights.

    Args:
        config: Sizes, and whether the chosen probabilities are rescaled to sum up to 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        self.experts_per_token = config.num_experts_per_tok
        self.rescales = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (T, D) to the numbers of the chosen experts (T, k) int64 and their weights (T, k) in the dtype of x."""
        probabilities = linear(x, self.weight).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        if self.rescales:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(x.dtype)


class Experts(nn.Module):
    """The gated MLPs of all experts of a layer: ``down(activation(gate(x)) * up(x))``.

    Its two parameters, under the family's names, are gate above up (E, 2F, D) and down (E, D, F).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.expert_width
        self.gated = GATED[config.hidden_act]
        self._first = _add_matrices(self, config.names.experts_in, experts, 2 * inner, width)
        self._second = _add_matrices(self, config.names.experts_out, experts, width, inner)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Map (T, D) to (T, D), given the chosen experts and their weights, both (T, k)."""
        first, second = self.layers().values()
        return run_experts(x, chosen, weights, first, second, self.activate)

    def layers(self) -> dict[str, ExpertLayer]:
        """First and second layer, by the names of their parameters."""
        return {name: ExpertLayer(getattr(self, name)) for name in (self._first, self._second)}

    def activate(self, gate_and_up: Tensor) -> Tensor:
        """Map (rows, 2F) to (rows, F)."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        return self.gated(gate.contiguous(), up.contiguous())


class MixtureOfExperts(nn.Module):
    """Router and experts, and in some families a shared expert that every token uses, scaled by a gate of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names = config.names
        self._router = add_part(self, names.router, Router(config))
        self._experts = add_part(self, names.experts, Experts(config))
        self._shared: str | None = None
        if config.shared_expert_intermediate_size:
            shared = MLP(config, config.shared_expert_intermediate_size)
            self._shared = add_part(self, names.shared, shared)
            gate = Linear(config.hidden_size, 1, bias=False)
            self._shared_gate = add_part(self, names.shared_gate, gate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, D)."""
        chosen, weights = getattr(self, self._router)(x)
        out: Tensor = getattr(self, self._experts)(x, chosen, weights)
        if self._shared is None:
            return out
        gate: Tensor = getattr(self, self._shared_gate)(x)
        shared: Tensor = getattr(self, self._shared)(x)
        return out + gate.sigmoid() * shared


def _add_matrices(parent: nn.Module, name: str, *shape: int) -> str:
    """Give ``parent`` a parameter of this shape, in place, called by the last part of ``name``; returns that part."""
    last = name.rpartition(".")[2]
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.normal_(parameter, std=shape[-1] ** -0.5)
    parent.register_parameter(last, parameter)
    return last


class Stack(Protocol):
    """A frozen stack whose matrices are made one by one on use, such as by dequantizing them."""

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Number of matrices."""

    def __getitem__(self, index: int, /) -> Tensor:
        """One matrix, a new tensor."""


class _Turned:
    """A stack as (E, in, out), whatever way its matrices lie."""

    def __init__(self, stack: Stack, transposed: bool) -> None:
        self._stack, self._transposed = stack, transposed
        experts, rows, columns = stack.shape
        self.shape = (experts, rows, columns) if transposed else (experts, columns, rows)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        matrix = self._stack[expert]
        return matrix if self._transposed else matrix.T


@dataclass(frozen=True)
class ExpertLayer:
    """One linear layer of every expert, with a low-rank update or without: ``y = W x + b + s B A x``."""

    weight: Tensor | Stack
    """(E, out, in), or (E, in, out) if ``transposed``."""
    bias: Tensor | None = None
    """(E, out)."""
    transposed: bool = False
    A: Tensor | None = None
    """(E, R, in), usually float32."""
    B: Tensor | None = None
    """(E, out, R), usually float32."""
    scaling: float = 1.0
    """The factor ``s`` of the update."""

    def __call__(self, rows: Tensor, groups: _Groups) -> Tensor:
        """Map the rows of all experts, sorted by expert, (rows, in) to (rows, out)."""
        matrix: Tensor | _Turned  # (E, in, out)
        if isinstance(self.weight, Tensor):
            matrix = self.weight if self.transposed else self.weight.mT
            if groups.fused(rows, matrix, self.A):
                return self._fused(rows, matrix, groups)
        else:
            matrix = _Turned(self.weight, self.transposed)
        out: Tensor = _Products.apply(  # type: ignore[no-untyped-call]
            rows, matrix, self.bias, self.A, self.B, self.scaling, groups.sizes()
        )
        return out

    def _fused(self, rows: Tensor, matrix: Tensor, groups: _Groups) -> Tensor:
        """The same by PyTorch's grouped product, which needs no number from the GPU."""
        out: Tensor = F.grouped_mm(rows, matrix, offs=groups.ends)
        if self.A is not None and self.B is not None:
            low = F.grouped_mm(rows, self.A.to(rows.dtype).mT, offs=groups.ends)
            out = out + self.scaling * F.grouped_mm(low, self.B.to(rows.dtype).contiguous().mT, offs=groups.ends)
        return out if self.bias is None else out + self.bias[groups.expert_of_row]


def run_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    first: ExpertLayer,
    second: ExpertLayer,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the chosen experts' outputs, for each token.

    Args:
        x: (T, D).
        chosen: (T, k) int64: the experts of each token.
        weights: (T, k): their weights, through which the router gets its gradient.
        first: From D to the inner width, gate and up together.
        second: From the inner width to D.
        activate: What comes between.

    Returns:
        (T, D) in the dtype of ``x``.
    """
    tokens, per_token = chosen.shape
    groups = _Groups(chosen, len(first.weight))
    rows = _Moved.apply(x, groups.token_of_row, groups.inverse, per_token)  # type: ignore[no-untyped-call]
    with recomputed(rows, lambda: x.detach()[groups.token_of_row]):
        hidden = first(rows, groups)
    out = second(activate(hidden), groups)
    out = _Moved.apply(out, groups.inverse, groups.order, 1)  # type: ignore[no-untyped-call]
    weighted = out.view(tokens, per_token, -1) * weights.to(x.dtype)[..., None]
    total: Tensor = weighted.sum(1, dtype=torch.float32)  # rounded once, at the end
    return total.to(x.dtype)


class _Groups:
    """The order of rows by expert; each row is one token at one of its experts.

    Args:
        chosen: (T, k) int64.
        experts: E.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        flat = chosen.flatten()
        self.order = flat.argsort(stable=True)  # (T · k,): sorted row -> row in the order of tokens
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(len(flat), device=flat.device)
        self.token_of_row = self.order // chosen.shape[1]
        self.expert_of_row = flat[self.order]
        self.counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))  # rows per expert
        self._sizes: list[int] | None = None

    @property
    def ends(self) -> Tensor:
        """The row after the last one of each expert, (E,) int32."""
        return self.counts.cumsum(0, dtype=torch.int32)

    def sizes(self) -> list[int]:
        """Number of rows of each expert.

        Raises:
            RuntimeError: A CUDA graph is being captured; every replay would have these sizes.
        """
        if self._sizes is None:
            if self.counts.is_meta:
                # For estimates, which have no values: every expert gets the same share.
                share, more = divmod(len(self.order), len(self.counts))
                self._sizes = [share + (expert < more) for expert in range(len(self.counts))]
            elif self.counts.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the rows of each expert are counted on the CPU")
            else:
                self._sizes = self.counts.tolist()
        return self._sizes

    def fused(self, rows: Tensor, matrix: Tensor, A: Tensor | None) -> bool:
        """Whether PyTorch's grouped product can be used: on a GPU, with rows of a multiple of 16 bytes."""
        lengths = [*matrix.shape[1:], *([] if A is None else [A.shape[1]])]
        aligned = all(length * rows.element_size() % 16 == 0 for length in lengths)
        return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned


class _Moved(torch.autograd.Function):
    """Rows in another order, each ``copies`` times.

    The gradient of plain indexing would be a sum in no fixed order; that of copies lies side by side after moving back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return rows[source]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        moved = grad[back]
        if ctx.copies > 1:
            moved = moved.view(-1, ctx.copies, grad.shape[-1]).sum(1, dtype=torch.float32).to(grad.dtype)
        return moved, None, None, None


class _Products(torch.autograd.Function):
    """``y = x W + b + s x A^T B^T`` of consecutive groups of rows, each with its own matrices.

    A frozen ``W`` needs no ``x`` for the backward pass, and gets no gradient. ``A`` and ``B`` get theirs in float32.
    Matrices of a :class:`Stack` are made in the forward pass and again in the backward pass, one at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor | _Turned,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
        sizes: list[int],
    ) -> Tensor:
        _, needs_matrix, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        low_A = None if A is None else A.to(x.dtype).contiguous()
        low_B = None if B is None else B.to(x.dtype).contiguous()
        weight = matrix if isinstance(matrix, Tensor) else None
        ctx.save_for_backward(x if needs_matrix or needs_A or needs_B else None, weight, low_A, low_B)
        ctx.stack = None if isinstance(matrix, Tensor) else matrix
        ctx.scaling, ctx.sizes = scaling, sizes

        out = x.new_empty(len(x), matrix.shape[2])
        for expert, start, stop in _used(sizes):
            rows = x[start:stop]
            expert_bias = None if bias is None else bias[expert]
            if low_A is not None and low_B is not None:
                low = sum_of_products((rows, low_A[expert].T)).mul_(scaling)
                terms = [(low, low_B[expert].T), (rows, matrix[expert])]
                out[start:stop] = sum_of_products(*terms, start=expert_bias)
            elif len(rows) == 1:
                out[start:stop] = linear(rows, matrix[expert].T, expert_bias)  # decoding: a matrix-vector product
            else:
                out[start:stop] = sum_of_products((rows, matrix[expert]), start=expert_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, A, B = ctx.saved_tensors
        matrix = weight if ctx.stack is None else ctx.stack
        needs_x, needs_matrix, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        experts = len(matrix)

        # Experts without rows keep zeros.
        grad_x = grad.new_empty(len(grad), matrix.shape[1]) if needs_x else None
        grad_matrix = torch.zeros_like(matrix) if needs_matrix else None
        grad_bias = grad.new_zeros(experts, grad.shape[1]) if needs_bias else None
        grad_A = torch.zeros_like(A, dtype=torch.float32) if needs_A else None
        grad_B = torch.zeros_like(B, dtype=torch.float32) if needs_B else None
        for expert, start, stop in _used(ctx.sizes):
            grad_rows = grad[start:stop]
            terms = [(grad_rows, matrix[expert].T)]
            if A is not None:
                grad_low = sum_of_products((grad_rows, B[expert])).mul_(ctx.scaling)  # (rows, R)
                terms.insert(0, (grad_low, A[expert]))
                if grad_A is not None:
                    grad_A[expert] = sum_of_products((grad_low.T, x[start:stop]), dtype=torch.float32)
                if grad_B is not None:
                    low = sum_of_products((x[start:stop], A[expert].T)).mul_(ctx.scaling)
                    grad_B[expert] = sum_of_products((grad_rows.T, low), dtype=torch.float32)
            if grad_x is not None:
                grad_x[start:stop] = sum_of_products(*terms)
            if grad_matrix is not None:
                grad_matrix[expert] = sum_of_products((x[start:stop].T, grad_rows))
            if grad_bias is not None:
                grad_bias[expert] = grad_rows.sum(0)
        return grad_x, grad_matrix, grad_bias, grad_A, grad_B, None, None


def _used(sizes: list[int]) -> list[tuple[int, int, int]]:
    """The experts that have rows, each with its first row and the one after its last."""
    used = []
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            used.append((expert, start, start + size))
        start += size
    return used
