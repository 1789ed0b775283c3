"""The test of a hosted model when it is opened: how it computes packed documents, and what generation may cache.

Attention that ignores where documents begin, or a recurrent layer that carries its state across them, would leak from
one row of a dataset into the next without a sign. So a few tokens go through the model, alone and packed, and the
fastest way with the same results is chosen; likewise with the caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.errors import InputError, first_line
from lit_lora.hf.causal import Caching, HostedLM
from lit_lora.hf.quiet import quiet
from lit_lora.hf.rows import Way
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.packed import PackedAttention

__all__ = ["Sample", "choose", "problem_with"]

_LENGTHS = [6, 4, 7]
_SHARED_PREFIX = 2
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.1}
"""The largest relative difference of a token's hidden state between two ways of computing it. Where documents see each
other, it is 0.2 to 1."""

_CACHINGS: dict[Way, list[Caching]] = {
    "own attention": ["ours"],
    "position ids": ["always", "single tokens", "never"],
    "padded rows": ["always", "single tokens", "never"],
}


@torch.no_grad()
@quiet()
def choose(model: HostedLM) -> None:
    """Choose, in place, how ``model`` computes packed documents and what it caches, by trying it on a few tokens.

    On the meta device there are no values to compare: the model's structure decides, and nothing is refused, since
    some code of models needs values.

    Raises:
        InputError: No way gives what the model computes for one document at a time.
    """
    on_paper = next(model.parameters()).is_meta
    try:
        sample = Sample.of(model)
    except Exception as error:  # see below
        if on_paper:
            return
        raise _refusal(model, [f"a single document: {first_line(error)[:120]}"]) from error
    problems = []
    for way in _possible_ways(model, sample):
        try:
            model.attend_by(way)
            problem = problem_with(model, sample)
            if problem is None:
                model.caching = _caching(model, sample)
                return
        except Exception as error:  # a model that was not made for it may fail in any way
            problem = first_line(error)[:120]
        problems.append(f"{way}: {problem}")
    if on_paper:
        return
    raise _refusal(model, problems)


def _refusal(model: HostedLM, problems: list[str]) -> InputError:
    return InputError(
        f"model_type {model.config.model_type!r} cannot be trained: {'; '.join(problems)}",
        hint="this is how the installed transformers computes it; another version may do",
    )


@dataclass
class Sample:
    """Documents that begin alike, and what the model computes for each alone."""

    documents: list[Tensor]
    alone: list[Tensor]
    """(T, D) each."""

    @staticmethod
    def of(model: HostedLM) -> Sample:
        """Random tokens; notes in ``model`` the layers that it does not call."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        first, *others = (torch.randint(model.config.vocab_size, (n,), generator=generator) for n in _LENGTHS)
        for other in others:
            other[:_SHARED_PREFIX] = first[:_SHARED_PREFIX]
        documents = [document.to(device) for document in (first, *others)]

        model.attend_by("padded rows")  # a single document has no padding: this is transformers' own arithmetic
        with _Calls(model) as calls:
            alone = [model.hidden_states(document[None])[0] for document in documents]
        model.not_wrappable = calls.passed_over()
        return Sample(documents, alone)

    def row(self) -> Tensor:
        """(T,) the documents packed, with the tokens that all begin with once."""
        return torch.cat([self.documents[0], *(document[_SHARED_PREFIX:] for document in self.documents[1:])])

    def expected(self) -> Tensor:
        """(T, D) the hidden states of :meth:`row`."""
        return torch.cat([self.alone[0], *(hidden[_SHARED_PREFIX:] for hidden in self.alone[1:])])


def _possible_ways(model: HostedLM, sample: Sample) -> list[Way]:
    """The ways that the model's structure allows, the fastest first."""
    if not model.net._can_set_attn_implementation():  # it attends, but not by a function that can be chosen
        return ["padded rows"] if sample.row().is_meta else ["position ids", "padded rows"]
    watch = _Watch(PackedAttention(model.config, _LENGTHS, sample.row().device, shared_prefix=_SHARED_PREFIX))
    try:
        model.attend_by("own attention")
        model.hidden_states(sample.row()[None], attend=watch)
    except Exception:  # see `choose`
        return ["position ids", "padded rows"]
    if _serves_every_layer(model, watch):
        return ["own attention", "position ids", "padded rows"]
    return ["padded rows"]  # layers of another kind carry a state from token to token


def problem_with(model: HostedLM, sample: Sample) -> str | None:
    """What is wrong with documents packed into one row, if anything."""
    row = sample.row()
    packed = model.hidden_states(row[None], lengths=_LENGTHS, shared_prefix=_SHARED_PREFIX)[0]
    tolerance = _TOLERANCES.get(packed.dtype, 1e-3)
    error = _difference(packed, sample.expected())
    if error > tolerance:
        return f"hidden states of packed documents differ from those alone by {error:.0%}"

    # In 16 bits rounding could hide a small leak. But with other tokens in the first document, nothing else may change.
    first = slice(_SHARED_PREFIX, _LENGTHS[0])
    row[first] = row[first].flip(0)
    changed = model.hidden_states(row[None], lengths=_LENGTHS, shared_prefix=_SHARED_PREFIX)[0]
    leak = _difference(changed[_LENGTHS[0] :], packed[_LENGTHS[0] :])
    if leak > tolerance / 5:
        return f"a document changes the hidden states of the next by {leak:.0%}"
    return None


def _caching(model: HostedLM, sample: Sample) -> Caching:
    """The best caching with which the last document, read in pieces, comes out as it does alone.

    Raises:
        ValueError: None does.
    """
    document, expected = sample.documents[-1], sample.alone[-1]
    if expected.is_meta:
        return _CACHINGS[model.way][0]
    rows = torch.stack([torch.cat([document[:1], document]), torch.cat([document, document[:1]])])
    padding = torch.tensor([1, 0], device=rows.device)
    for caching in _CACHINGS[model.way]:
        model.caching = caching
        try:
            cache = model.new_cache(2, rows.shape[1], padding=padding)
            pieces = [model.hidden_states(piece, cache=cache)[0] for piece in torch.split(rows, [4, 1, 1, 2], dim=1)]
            if _difference(torch.cat(pieces)[1:], expected) <= _TOLERANCES.get(expected.dtype, 1e-3):
                return caching
        except Exception:  # see `choose`
            continue
    raise ValueError("hidden states with a cache differ from those without")


def _difference(hidden: Tensor, expected: Tensor) -> float:
    """The largest relative difference of a token's hidden state; 0 without values."""
    if hidden.is_meta:
        return 0.0
    difference = (hidden - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
    return float(difference.max().nan_to_num(nan=float("inf")))


class _Watch:
    """Attention that notes what the layers ask of it."""

    prefix_length = 0

    def __init__(self, attend: PackedAttention) -> None:
        self.attend = attend
        self.rotate = attend.rotate
        self.token_positions = attend.token_positions
        self.with_prefix = attend.with_prefix
        self.layers: dict[int, LayerAttention] = {}

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers[layer.index] = layer
        return self.attend(layer, query, key, value)


def _serves_every_layer(model: HostedLM, watch: _Watch) -> bool:
    """Whether every layer attends by our function, with the window that the model's config gives it.

    A layer that does not may mix tokens in another way. A mask of another shape than a window would not reach us.
    """
    config = model.net.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(
        model.blocks()
    )
    windows = {"full_attention": None, "attention": None, "sliding_attention": window}
    return all(
        kind in windows and index in watch.layers and watch.layers[index].window == windows[kind]
        for index, kind in enumerate(kinds)
    )


@dataclass
class _Calls:
    """The modules that a pass inside the block calls."""

    model: nn.Module
    called: set[nn.Module] = field(default_factory=set)

    def __enter__(self) -> _Calls:
        self._hooks = [module.register_forward_hook(self._note) for module in self.model.modules()]
        return self

    def _note(self, module: nn.Module, _: Any, output: Any) -> None:
        # Routers of some mixtures of experts are linear layers by class, but return more than a product.
        if isinstance(output, Tensor) or not isinstance(module, nn.Linear):
            self.called.add(module)

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def passed_over(self) -> frozenset[str]:
        """Linear layers that were not called as such although their parent was: it reads their weights itself."""
        return frozenset(
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and module not in self.called
            and self.model.get_submodule(name.rpartition(".")[0]) in self.called
        )
