"""What every method needs: freeze, find modules by name, replace them, count and collect what trains.

A method is: which modules it wraps, and which parameters then require a gradient. Its parameters live in modules that
derive from :class:`OwnModule`, so they are found by type and never by a substring of their name. The wrapped module
stays untouched as ``base_layer``. Works on any tree of ``nn.Module``.
"""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lit_lora.config import Settings, did_you_mean
from lit_lora.errors import UsageError
from lit_lora.peft.core.updates import Update
from lit_lora.peft.lora.data_inits import Pass
from lit_lora.peft.quantized.decompose import Weights
from lit_lora.quantize import QuantizeConfig, Quantized, QuantizedLinear, Quantizer, count_quantized

__all__ = [
    "AnyConfig",
    "Base",
    "BaseTensors",
    "Decomposer",
    "Kind",
    "MatchedRow",
    "Method",
    "OwnModule",
    "ParameterCount",
    "base_tensors",
    "count_parameters",
    "device_of",
    "freeze",
    "matched_table",
    "matches",
    "model_updates",
    "own_modules",
    "remove",
    "replace_module",
    "select",
    "short_names",
    "trainable_state",
]

AnyConfig = TypeVar("AnyConfig")
Kind = Literal["low-rank", "quantized", "added", "full"]


class Method(Settings):
    """Settings of one finetuning method; ``apply`` changes a model in place into one that trains by it."""

    kind: ClassVar[Kind]
    default_lr: ClassVar[float | None] = None
    """The learning rate where the config gives none; ``None`` for that of the optimizer's settings."""
    own_base: ClassVar[bool] = False
    """The base has codes that the method chose: the run keeps it, the original cannot stand in for it."""
    chooses_types: ClassVar[bool] = False
    """Each layer of the base is quantised in a type that the method chose."""
    groups_tokens: ClassVar[bool] = False
    """Tokens attend within groups in training, so what all documents begin with does not come out the same in each."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Wrap the modules that the method adapts and let its own parameters require a gradient.

        What required one before still does, so a recipe calls :func:`freeze` first.

        Raises:
            UsageError: The settings do not fit this model, such as a target that matches nothing.
        """

    @property
    def steady(self) -> bool:
        """Whether every training step does the same operations, so that a GPU's may be recorded once and repeated."""
        return False

    @property
    def rows_to_start(self) -> int:
        """Rows of the data that the method looks at before it starts."""
        return 0

    def start_from(self, model: nn.Module, passes: Iterable[Pass]) -> Method:
        """As :meth:`apply`, starting from what the model does with the rows that ``rows_to_start`` asks for.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.

        Raises:
            UsageError: The settings do not fit this model or the rows.
        """
        self.apply(model)
        return self

    @property
    def settles(self) -> bool:
        """Whether :meth:`settle` has something to choose, by the loss on validation rows."""
        return False

    def settle(self, model: nn.Module, score: Callable[[], float]) -> Method:
        """Choose, in place, what training has left open.

        Args:
            model: Trained.
            score: The validation loss of the model as it is when called.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.
        """
        return self

    def configure(self, config: AnyConfig) -> AnyConfig:
        """The model's config with what the method changes of it."""
        return config

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""
        return {}

    def over(self, quantize: QuantizeConfig) -> Method:
        """These settings as they are over a base quantised so.

        Raises:
            UsageError: The method needs another base.
        """
        return self

    @property
    def weighing_rows(self) -> int:
        """Rows of the data whose gradients say how much errors of the base matter."""
        return 0

    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether a merged model has the codes of its base, which was quantised so: nothing is lost."""
        return False

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> Decomposer | None:
        """What quantises the base, where the method starts from what the codes lose; ``None`` where it does not.

        Args:
            model: Without values, such as on the meta device, and without an adapter.
            quantize: How the base is quantised.
            read: Gives the weight (out, in) of a linear layer by its name.
            weights: How much errors matter, by layer, where ``weighing_rows`` asks for it.

        Raises:
            UsageError: The settings do not fit this model.
        """
        return None

    def planned(self, model: nn.Module, quantize: QuantizeConfig) -> QuantizeConfig | Quantizer:
        """How large the base will be: what quantises weights without values, of a model without an adapter.

        Raises:
            UsageError: The settings do not fit this model.
        """
        return quantize

    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> Method:
        """These settings with tokens named by text turned into ids; a method without such tokens stays as it is."""
        return self

    def with_text(self, encode: Callable[[str], list[int]]) -> Method:
        """These settings with texts turned into token ids; a method without texts stays as it is."""
        return self

    def on(self, model: nn.Module) -> Method:
        """These settings with the places that are named by default as ``model`` calls them."""
        return self

    def with_whole(self, names: Sequence[str]) -> Method:
        """These settings with modules that train in full beside the method, such as a new head.

        Raises:
            UsageError: The method has no place for them.
        """
        if not names:
            return self
        raise UsageError(
            f"peft.name: {self.model_dump()['name']} trains nothing beside its own modules, and {', '.join(names)} "
            "must train too",
            hint="take lora, another low-rank method, houlsby or full",
        )

    @property
    def about(self) -> str:
        """The method and its main settings in a few words."""
        return str(self.model_dump()["name"])

    @property
    def lr(self) -> float | None:
        """The learning rate of these settings where the config gives none."""
        return self.default_lr

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return str(self.model_dump()["name"]).replace("-", " ").capitalize()


class Decomposer(Protocol):
    """Quantises layer by layer and keeps what the adapter then starts from."""

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantise the weight (out, in) of the layer ``name``."""

    def fill(self, model: nn.Module) -> None:
        """Give the adapter in ``model`` the values it starts from, in place."""


class OwnModule(nn.Module):
    """Base of the modules that a method puts in; all parameters outside its ``base_layer`` are the method's own.

    One without a ``base_layer`` wraps nothing: it stands in the module that it acts on, and has ``leave``.
    """

    base_layer: nn.Module
    owner: str = ""
    """Which method put it in, where several can be in one model."""

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it for its dtype."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @abstractmethod
    def updates(self) -> dict[str, Update]:
        """What merging does to the parameters of ``base_layer``, by their names in it."""

    def file_tensors(self) -> dict[str, Tensor]:
        """Its parameters by the ends of their names in an adapter file, as views in the file's shapes."""
        return dict(self.named_parameters(recurse=False))

    def leave(self, host: nn.Module) -> None:
        """Take the module out of its host, where it wraps nothing."""
        raise NotImplementedError


@dataclass(frozen=True)
class MatchedRow:
    """Modules of one shape that train, such as all ``q_proj``: one row of the table printed before training."""

    pattern: str
    """Their name with every number replaced by ``*``."""
    count: int
    """How many there are."""
    shape: str
    """The shape of the weight that is adapted, and the rank where there is one."""
    trainable: int
    """Trainable parameters of all of them together."""


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers train, of how many."""

    trainable: int
    """Numbers that require a gradient."""
    total: int
    """All numbers of the model, shared ones once."""

    @property
    def share(self) -> float:
        """Trainable share, 0 to 1."""
        return self.trainable / max(self.total, 1)


def freeze(model: nn.Module) -> None:
    """Let no parameter require a gradient; gradients that are there are dropped."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, detached; a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the numbers that train and all of them."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters) + count_quantized(model))


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()))
    return tensor.device


def own_modules(model: nn.Module) -> dict[str, OwnModule]:
    """The modules that a method put in, by the name that the module they wrap had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OwnModule)}


def model_updates(model: nn.Module) -> dict[str, Update]:
    """What the adapter in ``model`` does to the base tensors, by their names in the base model."""
    return {
        f"{name}.{parameter}": update
        for name, module in own_modules(model).items()
        for parameter, update in module.updates().items()
    }


class Base(Mapping[str, Tensor]):
    """A base model's tensors by name; reading one may cost time and memory."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, at no cost."""

    @abstractmethod
    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised, so that its values are not those of the original model."""


class BaseTensors(Base):
    """The parameters of the base model under the names they have without an adapter; tied ones under every name.

    A quantised weight is dequantised each time it is read, and never kept.

    Args:
        model: With or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._there = dict(_base_tensors(model, ""))

    def __getitem__(self, name: str) -> Tensor:
        found = self._there[name]
        return found.dequantize() if isinstance(found, QuantizedLinear) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def stored(self) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
        """Name and values of each as the model holds them: in the place of a quantised weight, its layer."""
        yield from self._there.items()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, at no cost."""
        found = self._there[name]
        return (found.out_features, found.in_features) if isinstance(found, QuantizedLinear) else tuple(found.shape)

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised."""
        return isinstance(self._there[name], QuantizedLinear)


def base_tensors(model: nn.Module) -> BaseTensors:
    """The parameters of the base model; see :class:`BaseTensors`."""
    return BaseTensors(model)


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    if isinstance(module, OwnModule):
        if "base_layer" in module._modules:
            yield from _base_tensors(module.base_layer, prefix)
        return
    if isinstance(module, QuantizedLinear):
        yield f"{prefix}weight", module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter.detach()
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")


def remove(model: nn.Module) -> None:
    """Take the adapter out: every wrapped module goes back to its place, as it was."""
    for name, module in own_modules(model).items():
        if "base_layer" in module._modules:
            replace_module(model, name, module.base_layer)
        else:
            module.leave(model.get_submodule(name.rpartition(".")[0]))


def matched_table(model: nn.Module) -> list[MatchedRow]:
    """What trains, one row per kind of module, in the model's order."""
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(parameter) for parameter in own)
        if own:
            key = (re.sub(r"\b\d+\b", "*", name), _shape(module))
            rows.setdefault(key, []).append(sum(parameter.numel() for parameter in own))
    return [MatchedRow(pattern, len(counts), shape, sum(counts)) for (pattern, shape), counts in rows.items()]


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module: its whole dotted name or whole last parts of it, ``*`` standing for any.

    ``q_proj``, ``self_attn.q_proj``, ``model.layers.*.q_proj`` and ``*_proj`` all match
    ``model.layers.0.self_attn.q_proj``; ``proj`` does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select(patterns: Iterable[str], names: Iterable[str], *, key: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    Args:
        patterns: As in :func:`matches`.
        names: Dotted names to choose from.
        key: The settings key that the patterns come from, for the message.

    Raises:
        UsageError: A pattern matches nothing.
    """
    names, patterns = list(names), list(patterns)
    problems = [_no_match(pattern, names, key) for pattern in patterns if not any(matches(pattern, n) for n in names)]
    if problems:
        raise UsageError("\n".join(problems))
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``, with the same training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names of modules where they mean exactly these, else the names in full."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    own = own_modules(model)
    inside = tuple(f"{name}." for name in own)
    known = [n for n, m in model.named_modules() if n in own or (_has_own(m) and not n.startswith(inside))]
    meant = [name for name in known if name.rpartition(".")[2] in ends]
    return sorted(ends) if sorted(meant) == sorted(names) else sorted(names)


def _has_own(module: nn.Module) -> bool:
    """Whether a module has weights of its own, not only in its children."""
    return isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(recurse=False))


def _no_match(pattern: str, names: Sequence[str], key: str) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    there = ", ".join(ends[:20]) + (", …" if len(ends) > 20 else "")
    return f"{key}: {pattern!r} matches no module{did_you_mean(pattern, ends)}, there are: {there or 'none'}"


def _shape(module: nn.Module) -> str:
    if isinstance(module, OwnModule) and "base_layer" not in module._modules:
        return module.extra_repr()
    base = module.base_layer if isinstance(module, OwnModule) else module
    if isinstance(base, QuantizedLinear):
        shape = f"{base.out_features}×{base.in_features} {base.quantized.config}"
    else:
        weight = getattr(base, "weight", None)
        shape = "×".join(str(size) for size in weight.shape) if isinstance(weight, Tensor) else ""
    rank = getattr(module, "rank", None)
    return f"{shape}, rank {rank}" if rank is not None else shape
