"""A training step on tensors without values: how much memory it would take, and how many floating-point operations.

The step is the one that trains (:func:`lit_lora.train.loss.backward`), run on the meta device. So whatever a method, a
kernel or checkpointing keeps for the backward pass is counted as it is, and no formula has to follow the code.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lit_lora import IGNORE_INDEX, kernels
from lit_lora.model import LanguageModel
from lit_lora.train.loss import backward

__all__ = ["Peak", "MicroBatchShape", "on_paper", "rehearse"]


@dataclass(frozen=True)
class MicroBatchShape:
    """The sizes of a micro-batch, in a form that :func:`lit_lora.train.loss.backward` takes for one."""

    lengths: list[int]
    """Tokens of each document."""
    targets: int
    """Target tokens of all documents."""
    shared_prefix: int = 0
    """Length of the prefix that all documents share; it is computed once."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return sum(self.lengths) - self.shared_prefix * (len(self.lengths) - 1)

    @property
    def rows(self) -> list[int]:
        """Dataset row of each document."""
        return list(range(len(self.lengths)))

    @property
    def input_ids(self) -> Tensor:
        """(1, T) int64."""
        return torch.zeros(1, self.tokens, dtype=torch.int64)

    @property
    def labels(self) -> Tensor:
        """(1, T) int64."""
        places = torch.arange(self.tokens)[None]
        return torch.where(places < self.targets, 0, IGNORE_INDEX)


@dataclass(frozen=True)
class Peak:
    """Memory at the peak besides weights and optimizer state, by phase of its allocation, and work of a micro-batch."""

    activations: int
    """Bytes allocated in the decoder's forward pass."""
    logits: int
    """Bytes allocated in the output layer and the loss."""
    backward: int
    """Bytes allocated in the backward pass: gradients, recomputed activations, what passes from layer to layer."""
    operations: int
    """Floating-point operations of the matrix products of one micro-batch, forward and backward."""


def on_paper(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose tensors have no values; shared ones stay shared."""
    memo: dict[int, Any] = {}  # deepcopy takes these instead of copying values
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def rehearse(
    model: LanguageModel, micro_batch: MicroBatchShape, *, fused: str | None, masters: Iterable[Tensor] = ()
) -> Peak:
    """Run one micro-batch and record its peak of memory.

    Args:
        model: On the meta device, or any other; gradients are added to it.
        micro_batch: The largest micro-batch.
        fused: Use the kernels for this type of device, ``cpu`` or ``cuda``.
        masters: Master weights whose gradients already exist, from an earlier micro-batch of the step.
    """
    ledger = _Ledger()
    with ExitStack() as stack:
        if fused:
            stack.enter_context(kernels.rehearsed(ledger.note, fused))
        stack.enter_context(_phases(model, ledger))
        stack.enter_context(ledger)
        # Gradients that exist from the start count as those of a backward pass.
        ledger.phase = "backward"
        for master in masters:
            master.grad = torch.empty_like(master)
        backward(model, micro_batch, 1.0)
    peak = ledger.peak
    return Peak(peak["forward"], peak["head"], peak["backward"], ledger.operations)


@contextmanager
def _phases(model: LanguageModel, ledger: _Ledger) -> Iterator[None]:
    """Keep the ledger informed about the phase of the micro-batch: forward, head or backward."""

    def enter(phase: str) -> None:
        ledger.phase = phase

    def leave_decoder(module: nn.Module, inputs: Any, hidden: Tensor) -> None:
        if hidden.requires_grad:  # its gradient is computed when the backward pass goes from the head to the decoder
            hidden.register_hook(lambda _: enter("backward"))  # type: ignore[no-untyped-call]

    hooks = [
        model.get_decoder().register_forward_pre_hook(lambda *_: enter("forward")),
        model.get_decoder().register_forward_hook(leave_decoder),
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: enter("head")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# torch's formulas for the operations of matrix products and convolutions, by name.
_OPERATION_COUNTS = {packet.__name__: count for packet, count in flop_registry.items()}


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and follows each storage from the operation that allocates it until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.alive: Counter[str] = Counter()
        """Bytes that exist now, by the phase that allocated them."""
        self.peak: Counter[str] = Counter()
        """The same at the peak."""
        self.operations = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        count = _OPERATION_COUNTS.get(func._overloadpacket.__name__.removesuffix("_"))  # addmm_ works as addmm
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)

        # Views and in-place results share the storage of an input; anything else is a new one.
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in input_storages:
                self._allocated(leaf.untyped_storage())
        return out

    def note(self, kernel: str, *arguments: Any) -> None:
        """Count the operations of a kernel of ours, which is not run."""
        if kernel == "sum_of_products":
            terms, _, _, _, _, rows, columns, _ = arguments
            # Six values describe each term (model/products.py); the fifth is the length of its inner dimension.
            self.operations += 2 * rows * columns * sum(terms[4::6])

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        phase = self.phase
        size = storage.nbytes()
        self._storages.add(key)
        self.alive[phase] += size
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()
        weakref.finalize(storage, self._freed, key, phase, size)

    def _freed(self, key: int, phase: str, size: int) -> None:
        self._storages.discard(key)
        self.alive[phase] -= size
