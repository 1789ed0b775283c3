"""The choice of modules that a method adapts: by kind, name and layer, with the same settings for every method."""

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
from lit_lora.peft.core.matching import listed, matches, select, short_names
from lit_lora.peft.core.method import Kind, Method
from lit_lora.peft.core.mixtures import Mixtures, find_mixtures, short_name
from lit_lora.peft.core.module_names import default_names, is_known_part, same_parts, with_names_of
from lit_lora.peft.core.modules import OwnModule, not_wrappable, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy, find_head
from lit_lora.quantize import QuantizedLinear, QuantizedStack

__all__ = ["TargetedMethod", "check_rank", "layer_number", "whole_modules", "with_parameters"]

# Names of task heads in transformers: "all-linear" leaves them out, like the output head.
_TASK_HEADS = {"score", "classifier", "qa_outputs"}
_PRESETS = ("q,v",)


class TargetedMethod(AdapterMethod, TrainsModulesInFull):
    """A method that wraps modules chosen by name; a subclass supplies the wrappers.

    A name is matched by its last parts (``q_proj``, ``mlp.up_proj``) or in full, with ``*`` for any characters; a name
    that matches nothing is an error.
    """

    kind: ClassVar[Kind] = "mergeable"
    peft_type: ClassVar[str]
    peft_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of PEFT's ``adapter_config.json`` that :meth:`from_peft` reads or may ignore."""
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """Kinds of modules that can be adapted by name; all-linear and q,v choose among linear layers only."""

    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer except the output head and gates narrower than "
        "the rank), q,v (the LoRA paper's choice), or a list of names such as q_proj, mlp.up_proj or "
        "model.layers.*.v_proj.",
    )
    exclude_modules: list[str] = Field([], description="Modules to leave out of target_modules, by name.")
    layers: list[int] | None = Field(None, description="Layers to adapt, counted from 0; all if omitted.")
    modules_to_save: list[str] = Field([], description="Modules to train in full and save with the adapter.")

    @property
    def graph_safe(self) -> bool:
        """Wrappers run the same operations in every step."""
        return True

    def with_modules_to_save(self, names: Sequence[str]) -> Method:
        """These settings with ``names`` among the modules that train in full."""
        return self.model_copy(update={"modules_to_save": list(dict.fromkeys([*self.modules_to_save, *names]))})

    @property
    def about(self) -> str:
        """The method and its rank, if it has one."""
        rank = getattr(self, "rank", None)
        return self.title if rank is None else f"{self.title}, rank {rank}"

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of every module that the method put in; a shared one once."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()  # addresses: modules may share a parameter, and return different views of it
        for name, module in own_modules(model).items():
            for key, tensor in module.file_tensors().items():
                if tensor.data_ptr() not in seen:
                    # A tensor that all modules share has a full name in the file, under none of them.
                    full_name = key if key.startswith("base_model.") else f"{name}.{key}"
                    tensors[full_name] = tensor.detach()
                seen.add(tensor.data_ptr())
        return tensors

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` under PEFT's keys, without the base model's name."""
        whole = whole_modules(model)
        targets = [
            name
            for name, module in own_modules(model).items()
            if not (isinstance(module, TrainedCopy) and _is_whole(module))
        ]
        return {
            "peft_type": self.peft_type,
            "target_modules": short_names(model, targets),
            "modules_to_save": whole or None,
        }

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Split text that is not a preset at its commas, as ``peft.target_modules=q_proj,v_proj`` is written."""
        if isinstance(value, str):
            is_preset = value in ("all-linear", *_PRESETS)
            return value if is_preset else [name.strip() for name in value.split(",")]
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return value
        raise ValueError(f"expected all-linear, {', '.join(_PRESETS)} or a list of names, got {value!r}")

    @abstractmethod
    def wrapped(self, targets: Mapping[str, Any]) -> Mapping[str, OwnModule]:
        """Wrappers of ``targets``, which are of the kinds in ``adapts``, by the same names.

        Raises:
            UsageError: The settings do not fit a target.
        """

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, two settings name the same module, or the model already has an
                adapter.
        """
        if own_modules(model):
            raise UsageError("peft: the model already has an adapter", hint="load the base model again")
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
            copies: Modules that train in full and are therefore not wrapped; those of ``modules_to_save`` if omitted.

        Raises:
            UsageError: A name matches nothing that can be adapted, or nothing is left.
        """
        method = with_names_of(self, model)
        if copies is None:
            copies = with_parameters(model, method.modules_to_save)
        passed_over = not_wrappable(model)
        adaptable = {
            name: module
            for name, module in model.named_modules()
            if name and name not in passed_over and self.adaptable(module)
        }
        if isinstance(method.target_modules, list):
            targets = method._named_targets(model, adaptable, copies)
        else:
            linears = [name for name, module in adaptable.items() if isinstance(module, nn.Linear)]
            targets = method._preset_targets(model, linears)

        targets = [name for name in targets if name not in copies]
        excluded = select(self.exclude_modules, targets, key="peft.exclude_modules")
        targets = [name for name in targets if name not in excluded]
        targets = self._in_layers(targets)
        if not targets:
            raise UsageError("peft.target_modules: no module is left to adapt")
        return targets

    def _named_targets(self, model: nn.Module, adaptable: Mapping[str, nn.Module], copies: Sequence[str]) -> list[str]:
        """The modules that names in ``target_modules`` match.

        Raises:
            UsageError: A name matches nothing that can be adapted, or a module that trains in full.
        """
        self._check_names(model, adaptable)
        targets = select(self.target_modules, adaptable, key="peft.target_modules")
        # A pattern with * may cover a module that trains in full, which is then left out; a plain name means it.
        plain_names = [pattern for pattern in self.target_modules if "*" not in pattern]
        for name in targets:
            if name in copies and any(matches(pattern, name) for pattern in plain_names):
                raise UsageError(f"peft: {name} is in both target_modules and modules_to_save, expected only one")
        return targets

    def _preset_targets(self, model: nn.Module, linears: Sequence[str]) -> list[str]:
        """Those of the linear layers that q,v or all-linear chooses."""
        if self.target_modules == "q,v":
            patterns = same_parts(default_names("query", "value"), model)
            return select(patterns, linears, key="peft.target_modules")
        head = find_head(model)
        linears = [name for name in linears if name != head and name.rpartition(".")[2] not in _TASK_HEADS]
        # If even the projections are narrower than the rank, it is the rank that is wrong, which `wrapped` says.
        return [name for name in linears if not self._is_narrow_gate(name, model)] or linears

    def rank_of(self, name: str) -> int:
        """The rank that the update of a layer is to have, which has at least as many inputs and outputs."""
        return 1

    def _is_narrow_gate(self, name: str, model: nn.Module) -> bool:
        """Whether a layer has one output, or is too narrow for the rank and none of the usual projections.

        Such are gates of recurrent layers, one output per head, and the coefficients of Gemma 3n's streams.
        """
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.out_features == 1:
            return True
        too_narrow = min(layer.out_features, layer.in_features) < self.rank_of(name)
        return too_narrow and not is_known_part(name, model)

    def _check_names(self, model: nn.Module, adaptable: Mapping[str, nn.Module]) -> None:
        """Check that every name in ``target_modules`` matches a module that can be adapted.

        Raises:
            UsageError: With one line per name that does not; the line says if it matches modules of another kind.
        """
        problems = []
        mixtures = find_mixtures(model)
        for pattern in self.target_modules:
            try:
                select([pattern], adaptable, key="peft.target_modules")
            except UsageError as error:
                problems.append(_of_mixture(mixtures, pattern) or self._wrong_kind(model, pattern) or str(error))
        if problems:
            fitting = {
                name: module
                for name, module in adaptable.items()
                if any(matches(pattern, name) for pattern in self.target_modules)
            }
            hint = None
            if mixtures.experts:
                meant = [name for pattern in self.target_modules for name in mixtures.matching(pattern)]
                named = ", ".join(dict.fromkeys(short_name(name) for name in meant or mixtures.experts))
                hint = f"experts and routers are no linear layers: lora adapts them by target_parameters: [{named}]"
            raise UsageError("\n".join([*problems, *self.misfits(fitting)]), hint=hint)

    def _wrong_kind(self, model: nn.Module, pattern: str) -> str | None:
        """The message for a name that matches modules, but of a kind that this method does not adapt."""
        for name, module in model.named_modules():
            is_leaf = not any(True for _ in module.children())
            if name and is_leaf and matches(pattern, name):
                if name in not_wrappable(model):
                    return (
                        f"peft.target_modules: {pattern!r} cannot be adapted: the model reads the weight of {name} "
                        "itself, so that a module in its place would have no effect"
                    )
                kinds = ", ".join(kind.__name__ for kind in self.adapts)
                return (
                    f"peft.target_modules: {pattern!r} is of the wrong kind: {name} is {type(module).__name__}, "
                    f"{self.name} adapts {kinds}"
                )
        return None

    def misfits(self, targets: Mapping[str, Any]) -> list[str]:
        """Problems of other settings with these modules, to be reported together with names that match nothing."""
        return []

    def _in_layers(self, targets: list[str]) -> list[str]:
        """The targets in the chosen layers, and those outside all numbered layers."""
        if self.layers is None:
            return targets

        layer_of = {name: layer_number(name) for name in targets}
        existing = sorted({number for number in layer_of.values() if number is not None})
        for number in self.layers:
            if number not in existing:
                span = f"layers {existing[0]} to {existing[-1]}" if existing else "no numbered layer"
                raise UsageError(f"peft.layers: layer {number} has no target; targets are in {span}")
        return [name for name, number in layer_of.items() if number is None or number in self.layers]


def _of_mixture(mixtures: Mixtures, pattern: str) -> str | None:
    """The message for a name that matches only weights of a mixture of experts."""
    names = mixtures.matching(pattern)
    if not names:
        return None
    return f"peft.target_modules: {pattern!r} matches no linear layer, only {listed(names, 'weight')} of a mixture"


def with_parameters(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules that have parameters themselves and match a pattern or are inside a module that does.

    Raises:
        UsageError: One of them is quantized, or a pattern matches nothing.
    """
    modules = dict(model.named_modules())
    roots = select(patterns, [name for name in modules if name], key="peft.modules_to_save")
    inside = tuple(f"{root}." for root in roots)
    chosen = []
    for name, module in modules.items():
        if not f"{name}.".startswith(inside):
            continue
        if isinstance(module, QuantizedLinear | QuantizedStack):
            raise UsageError(
                f"peft.modules_to_save: {name} is quantized ({module.quantized.config}), its codes cannot train; "
                "expected modules in full precision, such as lm_head or a norm"
            )
        if any(True for _ in module.parameters(recurse=False)):
            chosen.append(name)
    return chosen


def whole_modules(model: nn.Module) -> list[str]:
    """The modules that train in full, each by its highest ancestor that contains nothing else."""
    copies = [
        name for name, module in own_modules(model).items() if isinstance(module, TrainedCopy) and _is_whole(module)
    ]
    roots = [_highest_root(model, name, copies) for name in copies]
    return list(dict.fromkeys(roots))


def _is_whole(copy: TrainedCopy) -> bool:
    return set(copy.trained) == {name for name, _ in copy.base_layer.named_parameters(recurse=False)}


def _highest_root(model: nn.Module, name: str, copies: Sequence[str]) -> str:
    """The highest ancestor of a trained module, or itself, all of whose parameters belong to trained modules."""
    inside = tuple(f"{copy}." for copy in copies)
    parts = name.split(".")
    for end in range(1, len(parts)):
        root = ".".join(parts[:end])
        parameters = model.get_submodule(root).named_parameters()
        if all(f"{root}.{parameter}".startswith(inside) for parameter, _ in parameters):
            return root
    return name


def layer_number(name: str) -> int | None:
    """The layer that a module is in: the first number in its dotted name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def check_rank(rank: int, name: str, shape: Sequence[int]) -> None:
    """Check that an update's rank is at most that of its matrix; a convolution's weight is one with ``out`` rows.

    Raises:
        UsageError: ``rank`` is too large for a weight of this shape.
    """
    largest = min(shape[0], math.prod(shape[1:]))
    if rank > largest:
        sizes = "×".join(str(size) for size in shape)
        raise UsageError(f"peft.rank: {rank} is too large for {name} ({sizes}), expected at most {largest}")
