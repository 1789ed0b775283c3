"""The parts of a model that has no values: their sizes, and the modules that a finetuning method can adapt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from lit_lora.checkpoint.headers import Header
from lit_lora.inspection.report import Part, Target
from lit_lora.peft import methods
from lit_lora.peft.core.modules import not_wrappable
from lit_lora.peft.core.targeted import TargetedMethod
from lit_lora.peft.lora.parameters import adaptable_parameters

__all__ = ["matrices", "parts", "targets"]

# The part that a class of modules is, by its name in transformers or here; the first that matches, in this order.
_CLASSES = {
    "norms": r"Norm(Gated|1P)?$",
    "attention": r"Attention|SelfOutput",
    "recurrence": r"Mamba|DeltaNet|ShortConv|Recurrent|Rwkv|SSM|Mixer$",
    "experts": r"Experts$|SparseMoe|MoE$|Router$",
    "MLP": r"MLP|FeedForward|FFN|DenseReluDense|DenseGatedAct|Intermediate$|Output$",
    "embedding": r"Embedding",
}
_ORDER = ["embedding", "attention", "recurrence", "MLP", "experts", "norms", "head", "other"]
_UNUSED = "unused by the text model"
# A module of a list, in which modules are numbered: a layer, or an expert within a layer.
_NUMBER = re.compile(r"\b\d+\b")


def parts(model: nn.Module, stored: Mapping[str, Header], parameter_of: Mapping[str, str]) -> list[Part]:
    """The size of every part, in memory and in the files.

    Args:
        model: On the meta device.
        stored: Tensors in the files by name.
        parameter_of: Name of a stored tensor -> the parameter that it becomes, or is a part of.
    """
    kinds = _kinds(model)
    found: dict[str, Part] = {}

    def part(name: str) -> Part:
        return found.setdefault(name, Part(name))

    for name, parameter in model.named_parameters():
        part(kinds[_module(name)]).parameters += parameter.numel()

    # Scales and the like lie in the module of their codes.
    kind_of_stored = {_module(name): kinds.get(_module(parameter), "") for name, parameter in parameter_of.items()}
    for name, header in stored.items():
        module = _module(name)
        while module and module not in kind_of_stored:
            module = _module(module)
        part(kind_of_stored.get(module) or _UNUSED).add(header.dtype, header.bytes)
    order = [*_ORDER, _UNUSED]
    return sorted(found.values(), key=lambda each: order.index(each.name))


def targets(model: nn.Module) -> list[Target]:
    """The modules and parameters that a method can name, one row per kind, in the model's order."""
    lora = methods()["lora"]()
    assert isinstance(lora, TargetedMethod)
    all_linear = set(lora.targets(model))
    passed_over = not_wrappable(model)
    names_by_row: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        in_groups = getattr(module, "groups", 1) > 1  # a convolution that no method adapts
        if name and name not in passed_over and lora.adaptable(module) and weight is not None and not in_groups:
            names_by_row.setdefault((_in_layer(name), tuple(weight.shape)), []).append(name)
    rows = [
        Target(name, shape, len(names), not all_linear.isdisjoint(names), "target_modules")
        for (name, shape), names in names_by_row.items()
    ]
    stacks = Counter((_in_layer(name), tuple(model.get_parameter(name).shape)) for name in adaptable_parameters(model))
    rows += [Target(name, shape, count, False, "target_parameters") for (name, shape), count in stacks.items()]
    return rows


def matrices(stored: Mapping[str, Header]) -> list[Target]:
    """Tensors of at least two dimensions, of a model of which nothing is known: one row per kind."""
    rows: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, header in stored.items():
        if len(header.shape) > 1:
            rows[_in_layer(name.removesuffix(".weight")), header.shape] += 1
    return [Target(name, shape, count, all_linear=None, setting=None) for (name, shape), count in rows.items()]


def _kinds(model: nn.Module) -> dict[str, str]:
    """The part that every module belongs to, by name."""
    layers = _layers(name for name, _ in model.named_modules())
    special = {}
    for part, getter in (("head", "get_output_embeddings"), ("embedding", "get_input_embeddings")):
        module = getattr(model, getter, lambda: None)()
        special[id(module)] = part
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():  # parents before children
        inherited = kinds.get(_module(name), "other") if name else "other"
        if inherited == "other" and name.startswith(layers):
            inherited = "MLP"  # some families have its linear layers in the block itself
        by_class = next((part for part, names in _CLASSES.items() if re.search(names, type(module).__name__)), None)
        kinds[name] = special.get(id(module)) or by_class or inherited
    return kinds


def _layers(names: Iterable[str]) -> tuple[str, ...]:
    """The starts of the names within numbered layers, such as ``model.layers.0.``."""
    starts = {name[: match.end()] + "." for name in names if (match := _NUMBER.search(name))}
    return tuple(starts)


def _in_layer(name: str) -> str:
    """A module's name within its layer, with further numbers replaced by ``*``; outside of layers, its full name."""
    match = _NUMBER.search(name)
    inner = name[match.end() + 1 :] if match else name
    return _NUMBER.sub("*", inner or name)  # a numbered module is no layer where it is the end of a name


def _module(name: str) -> str:
    return name.rpartition(".")[0]
