"""The merged checkpoint against base + adapter, block by block, reading weights from the files some rows at a time.

Three models run the same decoder code: the base, the base with the adapter's branch beside it (``x A^T B^T``, not the
merged matrix), and the merged files as they were written. All compute in float32, so the only difference is the
rounding of the merged weights. No model is in memory: a large parameter is read whenever the code uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.checkpoint.load import AnyModel, empty_model, stored_shapes
from lit_lora.errors import NumericalError
from lit_lora.hf import HostedLM, fill_buffers
from lit_lora.merge.plan import MergePlan
from lit_lora.model import ModelConfig
from lit_lora.model.layers import Linear
from lit_lora.peft.core.updates import LowRank, Update, Updates

__all__ = ["BlockProof", "LogitsProof", "Proof", "prove"]

# Allowed norm of the difference of a block's outputs, relative to the outputs. Rounding gives a third of it or less; a
# wrong scaling, a swapped factor or a missing tensor gives far more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_CHUNK_VALUES = 1 << 22
_LAST_TOKENS = 16
# A parameter of at most this many values, such as a norm, stays in memory.
_SMALL = 1 << 16


@dataclass(frozen=True)
class BlockProof:
    """A decoder layer, the embedding or the head, on the same inputs."""

    place: str
    """Which one, in words."""
    output: float
    """Norm of the output of base + adapter."""
    effect: float
    """Norm of what the adapter changes in the output."""
    difference: float
    """Norm of merged minus base + adapter."""

    @property
    def error(self) -> float:
        """The difference relative to the output."""
        return self.difference / self.output if self.output else 0.0

    @property
    def lost(self) -> float:
        """The difference relative to the adapter's effect; 0 where it has none."""
        return self.difference / self.effect if self.effect else 0.0


@dataclass(frozen=True)
class LogitsProof:
    """The predictions after the last tokens, with every model running on its own from the embedding to the head."""

    kl: float
    """Mean Kullback-Leibler divergence of merged from base + adapter, in nats."""
    base_kl: float
    """The same for the base model, which is what the adapter changed."""
    worst: float
    """Largest difference of a logit."""
    agreement: float
    """Share of the tokens with the same most likely next token."""


@dataclass(frozen=True)
class Proof:
    """Merged against base + adapter."""

    blocks: list[BlockProof]
    """Decoder layers."""
    ends: list[BlockProof]
    """Embedding and head."""
    logits: LogitsProof
    """End to end."""

    @property
    def lost(self) -> float:
        """Share of the adapter's effect that is lost: over all layers, or at the embedding or the head if more.

        The rounding error of the weights overstates the loss several times: it is noise in all directions, of which few
        matter. Measured on a trained adapter scaled down step by step (SmolLM2-135M, bfloat16): weights off by 34 %,
        this 10 %, 0.1 % of the gain in loss gone; then 53 %, 13 %, 2 %; then 72 %, 23 %, 18 %.
        """
        effect = math.hypot(*(block.effect for block in self.blocks))
        difference = math.hypot(*(block.difference for block in self.blocks))
        of_layers = difference / effect if effect else 0.0
        return max([of_layers, *(end.lost for end in self.ends)])


class _Weights:
    """A checkpoint's weights: with an adapter's branch beside them, or merged and rounded, or as they are.

    Args:
        tensors: The checkpoint's.
        updates: Those of the adapter; empty to leave the weights as they are.
        rounded: Merge the updates and round to this dtype, instead of computing low-rank ones beside the weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], updates: Updates, rounded: torch.dtype | None = None) -> None:
        self.tensors = tensors
        self.updates = updates
        self.rounded = rounded
        # Layers of experts use their two stacks alternately.
        self.whole = lru_cache(maxsize=2)(self._whole)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """(T, in) to (T, out) by the matrix of ``name``, some rows at a time."""
        weight = self.tensors[f"{name}.weight"]
        update = self.updates.get(f"{name}.weight")
        rows = len(weight) if update is None else update.rows(len(weight))
        branch = update if isinstance(update, LowRank) and self.rounded is None else None

        step = max(1, _CHUNK_VALUES // weight.shape[1])
        parts = []
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if branch is None:
                part = x @ self._rows(weight, update, start, stop).T
            else:
                part = x @ weight[start:stop].float().T
                part += branch.scaling * (x @ branch.right.float().T) @ branch.left[start:stop].float().T
            parts.append(part)
        out = torch.cat(parts, dim=-1)
        return out + self._whole(f"{name}.bias") if f"{name}.bias" in self.tensors else out

    def _whole(self, name: str) -> Tensor:
        """All values of a tensor."""
        weight = self.tensors[name]
        if weight.ndim == 0:
            return weight.float()
        update = self.updates.get(name)
        return self._rows(weight, update, 0, len(weight) if update is None else update.rows(len(weight)))

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """(T,) token ids to (T, D) by the matrix of ``name``; ids beyond the vocabulary count as its last one."""
        weight = self.tensors[f"{name}.weight"]
        update = self.updates.get(f"{name}.weight")
        last = (len(weight) if update is None else update.rows(len(weight))) - 1
        return torch.cat([self._rows(weight, update, token, token + 1) for token in ids.clamp(max=last).tolist()])

    def _rows(self, weight: Tensor, update: Update | None, start: int, stop: int) -> Tensor:
        """Rows with the update merged in, float32, and rounded in between if asked for.

        The caller looks ``weight`` up once: a tensor of a base that is quantized on reading is quantized each time.
        """
        rows = weight[start:stop].float() if update is None else update.apply(weight, start, stop)
        return rows if self.rounded is None else rows.to(self.rounded).float()


class _Streamed(nn.Module):
    """A linear layer or an embedding that reads its weight from the files while it computes, some rows at a time."""

    def __init__(self, weights: _Weights, name: str, *, embedding: bool) -> None:
        super().__init__()
        self.weights = weights
        self.name = name
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), or (...,) ids to (..., D)."""
        if self.embedding:
            embedded = self.weights.embed(self.name, x.reshape(-1))
            return embedded.view(*x.shape, -1)
        return self.weights.linear(self.name, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @property
    def weight(self) -> Tensor:
        """The whole weight, for models that compute with it themselves."""
        return self.weights.whole(f"{self.name}.weight")

    @property
    def bias(self) -> Tensor | None:
        """The whole bias."""
        name = f"{self.name}.bias"
        return self.weights.whole(name) if name in self.weights.tensors else None


@torch.no_grad()
def prove(
    plan: MergePlan, ids: Sequence[int], *, dtype: torch.dtype, merged: Mapping[str, Tensor] | None = None
) -> Proof:
    """Run ``ids`` through base, base + adapter and merged, and compare.

    Args:
        plan: The merge.
        ids: Token ids of some text.
        dtype: The coarsest dtype of the result, which sets the tolerance.
        merged: The merged tensors as they were written; without them, what rounding to ``dtype`` would give is proved.

    Raises:
        NumericalError: A block differs by more than rounding explains, and the plan is not for a lossy merge.
    """
    written = _Weights(plan.base, plan.updates, dtype) if merged is None else _Weights(merged, {})
    all_weights = [_Weights(plan.trained, {}), _Weights(plan.trained, plan.updates), written]
    base, adapted, final = (_streaming_model(plan.config, weights) for weights in all_weights)
    proofs: dict[str, BlockProof] = {}
    inputs: dict[str, tuple[Any, Any]] = {}

    def forget() -> None:
        """Drop the tensors that one model has read before another reads as many."""
        for weights in all_weights:
            weights.whole.cache_clear()

    def keep_inputs(name: str, args: Any, kwargs: Any) -> None:
        """Keep what a block is called with, before it changes any of it in place."""
        forget()
        inputs[name] = _copy(args), _copy(kwargs)

    def compare(name: str, output: Any) -> None:
        """Run the same block of the other two models on the inputs that ``adapted`` has."""
        args, kwargs = inputs.pop(name)
        expected = _total(output)
        outputs = []
        for model in (base, final):
            forget()
            outputs.append(_total(model.get_submodule(name)(*_copy(args), **_copy(kwargs))))
        plain, merged_output = outputs
        # The adapter may add tokens, whose logits the base does not have: they count as its effect in full.
        base_size = plain.shape[-1]
        effect = torch.hypot((expected[..., :base_size] - plain).norm(), expected[..., base_size:].norm())
        place = f"layer {layers.index(name)}" if name in layers else name
        proof = BlockProof(place, float(expected.norm()), float(effect), float((merged_output - expected).norm()))
        if not (proof.error <= TOLERANCES[dtype] or plan.lossy):
            raise NumericalError(
                f"{place}: merged and base + adapter differ by {proof.error:.2g} of the output, expected at most "
                f"{TOLERANCES[dtype]:.2g} in {str(dtype).removeprefix('torch.')}; nothing was written"
            )
        proofs[name] = proof

    layers = list(adapted.blocks())
    ends = [name.removesuffix(".weight") for name in (plan.base.embedding, plan.base.head)]
    for name in [*layers, *ends]:
        block = adapted.get_submodule(name)
        block.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: keep_inputs(name, args, kwargs), with_kwargs=True
        )
        block.register_forward_hook(lambda _, args, output, name=name: compare(name, output))
    tokens = torch.tensor([list(ids)])
    adapted_logits, base_logits, merged_logits = (
        model.logits(model.hidden_states(tokens)[0, -_LAST_TOKENS:]) for model in (adapted, base, final)
    )
    return Proof(
        [proofs[name] for name in layers],
        [proofs[name] for name in ends],
        _compare_logits(base_logits, adapted_logits, merged_logits),
    )


def _streaming_model(config: ModelConfig, weights: _Weights) -> AnyModel:
    """A model that reads its large parameters from the files when it uses them."""
    model = empty_model(config.model_copy(update={"dtype": "float32"}))
    if isinstance(model, HostedLM):
        fill_buffers(model, "cpu")
        model.attend_by("padded rows")  # blocks are compared by what transformers itself calls them with
    for name, module in list(model.named_modules()):
        # Other kinds of linear layers and embeddings, such as scaled ones, do more than multiply and look up.
        if type(module) in (nn.Linear, Linear, nn.Embedding):
            parent, _, last = name.rpartition(".")
            streamed = _Streamed(weights, name, embedding=isinstance(module, nn.Embedding))
            setattr(model.get_submodule(parent), last, streamed)
    for name, shape in stored_shapes(model).items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if math.prod(shape) > _SMALL:
            _read_on_use(module, last, name, weights)
        elif last in module._parameters:
            setattr(module, last, nn.Parameter(weights.whole(name), requires_grad=False))
        else:
            setattr(module, last, weights.whole(name))
    return model.eval()


def _read_on_use(module: nn.Module, attribute: str, name: str, weights: _Weights) -> None:
    """Turn a parameter of ``module`` into a property of its class that reads the tensor called ``name``, in place."""
    shape = module.get_parameter(attribute).shape
    # A stand-in of four bytes stays among the parameters, for code that asks them for their device.
    module._parameters[attribute] = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {attribute: property(lambda _: weights.whole(name))})


def _copy(value: Any) -> Any:
    """A copy of a block's arguments, of which it may change the tensors and dictionaries."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return tuple(map(_copy, value)) if type(value) is tuple else value


def _total(output: Any) -> Tensor:
    """A block's output. Our layers return it in two parts of one shape, those of transformers may add other results."""
    if isinstance(output, Tensor):
        return output
    first: Tensor = output[0]
    return sum((part for part in output[1:] if isinstance(part, Tensor) and part.shape == first.shape), first)


def _compare_logits(base: Tensor, adapted: Tensor, merged: Tensor) -> LogitsProof:
    """Compare (T, V) logits; those of the base lack the tokens that the adapter added."""
    shared = adapted[..., : base.shape[-1]]
    agreement = (adapted.argmax(-1) == merged.argmax(-1)).float().mean()
    return LogitsProof(
        kl=_kl(adapted, merged),
        base_kl=_kl(shared, base),
        worst=float((merged - adapted).abs().max()),
        agreement=float(agreement),
    )


def _kl(expected: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of predictions, from (T, V) logits, in nats; never below 0 by rounding."""
    expected, other = expected.log_softmax(-1), other.log_softmax(-1)
    return max(float((expected.exp() * (expected - other)).sum(-1).mean()), 0.0)
