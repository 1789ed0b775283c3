"""Which modules a method adapts: by kind, name and layer, the same settings for every method."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.adapter_method import AdapterMethod
from lit_lora.peft.core.capabilities import TrainsModulesInFull
from lit_lora.peft.core.matching import matches, select, short_names
from lit_lora.peft.core.method import Kind, Method
from lit_lora.peft.core.module_names import default_names, same_parts, with_names_of
from lit_lora.peft.core.modules import OwnModule, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy, find_head
from lit_lora.quantize import QuantizedLinear

__all__ = ["TargetedMethod", "check_rank", "layer_number", "whole_modules", "with_parameters"]

# What transformers calls heads of a task: "all-linear" leaves them alone, like the output head.
_TASK_HEADS = {"score", "classifier", "qa_outputs"}
_PRESETS = ("q,v",)


class TargetedMethod(AdapterMethod, TrainsModulesInFull):
    """A method that wraps modules chosen by name: a subclass says by what.

    A name is matched by its last parts (``q_proj``, ``mlp.up_proj``) or in full, with ``*`` for anything; a name that
    matches nothing is an error.
    """

    kind: ClassVar[Kind] = "mergeable"
    peft_type: ClassVar[str]
    peft_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of PEFT's ``adapter_config.json`` that :meth:`from_peft` reads, or that may be ignored."""
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """Kinds of modules that can be named; without names, the linear ones are meant."""

    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), q,v (the LoRA paper's "
        "choice), or a list of names such as q_proj, mlp.up_proj or model.layers.*.v_proj.",
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    layers: list[int] | None = Field(None, description="Adapt these layers only, counted from 0; all when omitted.")
    modules_to_save: list[str] = Field([], description="Modules trained in full and saved with the adapter.")

    @property
    def graph_safe(self) -> bool:
        """What wraps a module computes the same with it in every step."""
        return True

    def with_modules_to_save(self, names: Sequence[str]) -> Method:
        """These settings with ``names`` among the modules that train in full."""
        return self.model_copy(update={"modules_to_save": list(dict.fromkeys([*self.modules_to_save, *names]))})

    @property
    def about(self) -> str:
        """The method and its size in a few words."""
        rank = getattr(self, "rank", None)
        return self.title if rank is None else f"{self.title}, rank {rank}"

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of every module that the method put in; a shared one once."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, module in own_modules(model).items():
            for key, tensor in module.file_tensors().items():
                if tensor.data_ptr() not in seen:
                    tensors[key if key.startswith("base_model.") else f"{name}.{key}"] = tensor.detach()
                seen.add(tensor.data_ptr())
        return tensors

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` but for the base model's name, in PEFT's words."""
        own = own_modules(model).items()
        targets = [name for name, module in own if not (isinstance(module, TrainedCopy) and _is_whole(module))]
        return {
            "peft_type": self.peft_type,
            "target_modules": short_names(model, targets),
            "modules_to_save": whole_modules(model) or None,
        }

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A text that is no preset is names with commas between."""
        if isinstance(value, str) and value not in ("all-linear", *_PRESETS):
            return [name.strip() for name in value.split(",")]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError(f"expected all-linear, {', '.join(_PRESETS)} or a list of names, got {value!r}")

    @abstractmethod
    def wrapped(self, targets: Mapping[str, Any]) -> Mapping[str, OwnModule]:
        """The modules that take the places of ``targets``, which are of the kinds in ``adapts``, by the same names.

        Raises:
            UsageError: The settings do not fit one.
        """

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, two settings want the same module, or there is an adapter already.
        """
        if own_modules(model):
            raise UsageError("peft: the model has an adapter already", hint="load the base model again")
        method = with_names_of(self, model)
        copies = with_parameters(model, method.modules_to_save)
        targets = {name: model.get_submodule(name) for name in method.targets(model, copies)}
        for name, module in method.wrapped(targets).items():
            replace_module(model, name, module)
        for name in copies:
            replace_module(model, name, TrainedCopy(model.get_submodule(name)))

    def adaptable(self, module: nn.Module) -> bool:
        """Whether a module can be wrapped."""
        return isinstance(module, self.adapts)

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """Names of the modules to wrap, in the model's order.

        Args:
            model: Without an adapter.
            copies: Modules that train in full, which are not wrapped; those of ``modules_to_save`` when omitted.

        Raises:
            UsageError: A name matches nothing that can be adapted, or nothing is left.
        """
        method = with_names_of(self, model)
        copies = with_parameters(model, method.modules_to_save) if copies is None else copies
        known = {name: module for name, module in model.named_modules() if name and self.adaptable(module)}
        if isinstance(method.target_modules, list):
            method._check_names(model, known)
            targets = select(method.target_modules, known, key="peft.target_modules")
            named = [pattern for pattern in method.target_modules if "*" not in pattern]
            both = [name for name in targets if name in copies and any(matches(pattern, name) for pattern in named)]
            if both:
                raise UsageError(f"peft: {both[0]} is in target_modules and in modules_to_save, expected it in one")
        else:
            linears = [name for name, module in known.items() if isinstance(module, nn.Linear)]
            if method.target_modules == "q,v":
                patterns = same_parts(default_names("query", "value"), model)
                targets = select(patterns, linears, key="peft.target_modules")
            else:
                head = find_head(model)
                targets = [n for n in linears if n != head and n.rpartition(".")[2] not in _TASK_HEADS]
        targets = [name for name in targets if name not in copies]
        excluded = select(self.exclude_modules, targets, key="peft.exclude_modules")
        targets = self._in_layers([name for name in targets if name not in excluded])
        if not targets:
            raise UsageError("peft.target_modules: no linear layer is left to adapt")
        return targets

    def _check_names(self, model: nn.Module, known: dict[str, nn.Module]) -> None:
        """Every name of ``target_modules`` must match something in ``known``, what can be adapted.

        Raises:
            UsageError: With a line for each that does not; one that matches other modules tells their kind.
        """
        kinds = ", ".join(kind.__name__ for kind in self.adapts)
        problems = []
        for pattern in self.target_modules:
            try:
                select([pattern], known, key="peft.target_modules")
            except UsageError as error:
                found = [(name, m) for name, m in model.named_modules() if name and matches(pattern, name)]
                leaves = [(name, type(m).__name__) for name, m in found if not any(True for _ in m.children())]
                problems.append(
                    f"peft.target_modules: {pattern!r} is of the wrong kind: {leaves[0][0]} is {leaves[0][1]}, "
                    f"{self.name} adapts {kinds}"
                    if leaves
                    else str(error)
                )
        if problems:
            fitting = {name: m for name, m in known.items() if any(matches(p, name) for p in self.target_modules)}
            raise UsageError("\n".join([*problems, *self.misfits(fitting)]))

    def misfits(self, targets: Mapping[str, Any]) -> list[str]:
        """What is wrong with the settings for these modules, to be told together with names that match nothing."""
        return []

    def _in_layers(self, targets: list[str]) -> list[str]:
        """The targets within the chosen layers, and those that are in no numbered layer."""
        if self.layers is None:
            return targets
        layer = {name: layer_number(name) for name in targets}
        there = sorted({number for number in layer.values() if number is not None})
        missing = [number for number in self.layers if number not in there]
        if missing:
            span = f"{there[0]} to {there[-1]}" if there else "no numbered layers"
            raise UsageError(f"peft.layers: there is no layer {missing[0]} with a target, the model has {span}")
        return [name for name in targets if layer[name] is None or layer[name] in self.layers]


def with_parameters(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules with parameters of their own that are, or lie in, a module that a pattern names.

    Raises:
        UsageError: One of them is quantised, or a pattern matches nothing.
    """
    known = dict(model.named_modules())
    roots = select(patterns, [name for name in known if name], key="peft.modules_to_save")
    inside = tuple(f"{root}." for root in roots)
    for name, module in known.items():
        if f"{name}.".startswith(inside) and isinstance(module, QuantizedLinear):
            raise UsageError(
                f"peft.modules_to_save: {name} is quantised ({module.quantized.config}), its codes cannot train; "
                "expected modules in full precision, such as lm_head or a norm"
            )
    return [
        name
        for name, module in known.items()
        if f"{name}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]


def whole_modules(model: nn.Module) -> list[str]:
    """The modules that train in full, each by the highest name under which nothing else is."""
    own = own_modules(model)
    copies = [n for n, m in own.items() if isinstance(m, TrainedCopy) and _is_whole(m)]
    found: dict[str, None] = {}
    for name in copies:
        parts = name.split(".")
        roots = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        found[next(root for root in roots if _only(model, root, copies))] = None
    return list(found)


def _is_whole(copy: TrainedCopy) -> bool:
    return set(copy.trained) == {name for name, _ in copy.base_layer.named_parameters(recurse=False)}


def _only(model: nn.Module, root: str, copies: Sequence[str]) -> bool:
    """Whether all parameters below ``root`` belong to some of the copies."""
    inside = tuple(f"{name}." for name in copies)
    return all(f"{root}.{name}".startswith(inside) for name, _ in model.get_submodule(root).named_parameters())


def layer_number(name: str) -> int | None:
    """The layer that a module lies in: the first number in its dotted name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def check_rank(rank: int, name: str, shape: Sequence[int]) -> None:
    """An update of a matrix has at most the rank of the matrix.

    Raises:
        UsageError: ``rank`` is larger than that of a matrix of this shape.
    """
    most = min(shape[0], math.prod(shape[1:]))
    if rank > most:
        sizes = "×".join(str(size) for size in shape)
        raise UsageError(f"peft.rank: {rank} is too large for {name} ({sizes}), expected at most {most}")
