"""The merged checkpoint against base + adapter, block by block, reading weights from the files some rows at a time.

Three models share one decoder layer's code: the base, the base with the adapter's branch beside it (``x A^T B^T``, not
the merged matrix), and the merged files as they were written. All compute in float32, so what differs is what rounding
the merged weights did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.errors import NumericalError
from lit_lora.merge.plan import EMBEDDING, MergePlan
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.updates import LowRank, Updates

__all__ = ["BlockProof", "LogitsProof", "prove_blocks"]

# Norm of the difference of a block's outputs relative to the outputs. Rounding gives a third of this or less; a wrong
# scaling, a swapped factor or a missing tensor gives far more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_CHUNK_VALUES = 1 << 22
_LAST_TOKENS = 16


@dataclass(frozen=True)
class BlockProof:
    """One decoder layer on the same inputs."""

    layer: int
    """Its index."""
    error: float
    """Merged against base + adapter: norm of the difference relative to the output."""
    lost: float
    """The same relative to what the adapter does in this block; 0 where it does nothing."""


@dataclass(frozen=True)
class LogitsProof:
    """The last tokens' predictions, all blocks one after the other."""

    kl: float
    """Mean Kullback-Leibler divergence of merged from base + adapter, in nats."""
    base_kl: float
    """The same of the base model: what the adapter changed."""
    agreement: float
    """Share of the tokens with the same most likely next token."""


class _Weights:
    """A checkpoint's weights with an adapter's branch beside them, or none."""

    def __init__(self, tensors: Mapping[str, Tensor], updates: Updates) -> None:
        self.tensors, self.updates = tensors, updates

    def linear(self, name: str, x: Tensor) -> Tensor:
        """(T, in) to (T, out) by the matrix of ``name``, some rows at a time."""
        weight, update = self.tensors[f"{name}.weight"], self.updates.get(f"{name}.weight")
        rows = len(weight) if update is None else update.rows(len(weight))
        step = max(1, _CHUNK_VALUES // weight.shape[1])
        parts = []
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if update is None or isinstance(update, LowRank):
                part = x @ weight[start:stop].float().T
            else:
                part = x @ update.apply(weight, start, stop).T
            if isinstance(update, LowRank):
                part += update.scaling * (x @ update.right.float().T) @ update.left[start:stop].float().T
            parts.append(part)
        out = torch.cat(parts, dim=-1)
        return out + self.vector(f"{name}.bias") if f"{name}.bias" in self.tensors else out

    def vector(self, name: str) -> Tensor:
        """A bias or the weight of a norm."""
        weight, update = self.tensors[name], self.updates.get(name)
        return weight.float() if update is None else update.apply(weight, 0, len(weight))

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) token ids to (T, D); tokens that the model does not have count as its last one."""
        weight, update = self.tensors[EMBEDDING], self.updates.get(EMBEDDING)
        if update is None:
            return weight[ids.clamp(max=len(weight) - 1)].float()
        return torch.cat([update.apply(weight, token, token + 1) for token in ids.tolist()])


class _Streamed(nn.Module):
    """A linear layer or an embedding that reads its weight from the files while it computes."""

    def __init__(self, weights: _Weights, name: str, *, embedding: bool) -> None:
        super().__init__()
        self.weights, self.name, self.embedding = weights, name, embedding

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) to (T, out), or (T,) ids to (T, D)."""
        return self.weights.embed(x) if self.embedding else self.weights.linear(self.name, x)


@torch.no_grad()
def prove_blocks(
    plan: MergePlan, merged: Mapping[str, Tensor], ids: Sequence[int], *, dtype: torch.dtype
) -> tuple[list[BlockProof], LogitsProof]:
    """Run ``ids`` through base, base + adapter and merged, and compare.

    Args:
        plan: The merge.
        merged: The merged tensors as they were written.
        ids: Token ids of some text.
        dtype: The coarsest dtype of the result: it sets the tolerance.

    Raises:
        NumericalError: A block differs by more than rounding explains.
    """
    base, adapted, written = (
        _streaming_model(plan.config, weights)
        for weights in (_Weights(plan.base, {}), _Weights(plan.base, plan.updates), _Weights(merged, {}))
    )
    proofs = []

    def compare(index: int, inputs: tuple[Any, ...], output: Any) -> None:
        """The same block of the three models on the same inputs."""
        plain, wanted, got = (
            _stream(out) for out in (base.model.layers[index](*inputs), output, written.model.layers[index](*inputs))
        )
        difference, effect = (got - wanted).norm(), (wanted - plain).norm()
        error = float(difference / wanted.norm())
        proofs.append(BlockProof(index, error, float(difference / effect) if effect else 0.0))
        if not error <= TOLERANCES[dtype]:
            raise NumericalError(
                f"layer {index}: merged and base + adapter differ by {error:.2g} of the output, expected at most "
                f"{TOLERANCES[dtype]:.2g} in {str(dtype).removeprefix('torch.')}; nothing was written"
            )

    for index, layer in enumerate(adapted.model.layers):
        layer.register_forward_hook(lambda _, inputs, output, index=index: compare(index, inputs, output))
    tokens = torch.tensor([list(ids)])
    exact, plain, final = (
        model.lm_head(model.hidden_states(tokens)[0, -_LAST_TOKENS:]) for model in (adapted, base, written)
    )
    return proofs, _compare_logits(plain, exact, final)


def _streaming_model(config: ModelConfig, weights: _Weights) -> CausalLM:
    """A model that streams its matrices; its small vectors are in memory."""
    with torch.device("meta"):
        model = CausalLM(config)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear | nn.Embedding):
            streamed = _Streamed(weights, name, embedding=isinstance(module, nn.Embedding))
            setattr(model.get_submodule(parent), last, streamed)
    for name, _ in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(weights.vector(name), requires_grad=False))
    return model.eval()


def _stream(output: Any) -> Tensor:
    """The residual stream after a block, which may return it in parts that are yet to be added."""
    parts = output if isinstance(output, tuple) else (output,)
    total: Tensor = sum(part for part in parts if isinstance(part, Tensor))  # type: ignore[assignment]
    return total


def _compare_logits(base: Tensor, adapted: Tensor, merged: Tensor) -> LogitsProof:
    shared = base.shape[-1]  # added tokens are unknown to the base
    wanted, got = adapted.log_softmax(-1), merged.log_softmax(-1)
    kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
    known = adapted[..., :shared].log_softmax(-1)
    base_kl = (known.exp() * (known - base.log_softmax(-1))).sum(-1).mean()
    agreement = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return LogitsProof(max(float(kl), 0.0), max(float(base_kl), 0.0), float(agreement))
