"""An adapter onto a model: does it belong to this base, and then every module it adapts wrapped with its values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_lora import log
from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.base_tensors import Base, base_tensors
from lit_lora.peft.core.modules import device_of, freeze, model_updates, own_modules, remove, replace_module
from lit_lora.peft.core.modules_to_save import TokenEmbedding, TokenHead, TrainedCopy
from lit_lora.peft.core.targeted import TargetedMethod
from lit_lora.peft.core.updates import LowRank, Magnitude, Replace, Rows, Scaled, Update, Updates
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.added import restore_added
from lit_lora.peft.files.fingerprint import differing
from lit_lora.peft.files.lora import listed
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.conv import Conv, LoRAConv
from lit_lora.peft.lora.dora import DoRALinear
from lit_lora.peft.lora.embedding import LoRAEmbedding
from lit_lora.peft.lora.linear import LoRALinear

__all__ = ["AppliedAdapter", "attach", "check_base", "load_adapter", "with_tied_head"]

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class AppliedAdapter:
    """What loading an adapter did."""

    adapter: Adapter
    """As it was read."""
    norm: float
    """Frobenius norm of the whole update, or of the tensors of added modules."""

    def __str__(self) -> str:
        made_on = f", it was trained on {self.adapter.base}" if self.adapter.base else ""
        checked = "base checked" if self.adapter.fingerprint else f"base checked by shapes only{made_on}"
        return f"{self.adapter.folder}: {self.adapter.tensors} tensors applied, update norm {self.norm:.4g}, {checked}"


def load_adapter(model: nn.Module, folder: Path, *, force: bool = False) -> AppliedAdapter:
    """Read an adapter folder, PEFT's or ours, and put it into ``model`` in place.

    The base is frozen; the adapter can be trained on.

    Args:
        model: The base model, without an adapter.
        folder: The adapter folder.
        force: Take a base of the right shapes even if it is not the one the adapter was trained on.

    Raises:
        InputError: The folder is not a readable adapter, or not one for this model.
        UsageError: The model has an adapter already.
    """
    if own_modules(model):
        raise UsageError(f"{folder}: the model has an adapter already", hint="take it out first")
    adapter = read_adapter(folder)
    base = base_tensors(model)
    if isinstance(adapter.config, AddedMethod):
        _check(adapter, {}, base, force=force)
        freeze(model)
        restore_added(model, adapter.folder, adapter.config, adapter.values)
        return AppliedAdapter(adapter, math.hypot(*(float(tensor.norm()) for tensor in adapter.values.values())))
    if adapter.updates is None:
        freeze(model)
        updates = _fill_modules(model, adapter)
        try:
            _check(adapter, updates, base, force=force)
        except InputError:
            remove(model)
            raise
    else:
        updates = check_base(adapter, base, tied=_is_tied(model), force=force)
        assert isinstance(adapter.config, LoRAConfig)
        freeze(model)
        attach(model, updates, adapter.config.dropout)
    norm = math.hypot(*(update.norm(base[name]) for name, update in updates.items()))
    if norm == 0:
        log.warn(f"{folder}: no effect, every update in it is zero: was it saved before its first training step?")
    return AppliedAdapter(adapter, norm)


def check_base(adapter: Adapter, base: Base, *, tied: bool, force: bool = False) -> dict[str, Update]:
    """Check that an adapter fits a base model, and return its updates with tied tokens under both names.

    Args:
        adapter: The adapter.
        base: The base's tensors by name; only those asked for are touched.
        tied: The head is the embedding.
        force: Take another base of the same shapes.

    Raises:
        InputError: It does not fit; names and counts say where.
    """
    updates = _fill_modules(_skeleton(base), adapter) if adapter.updates is None else adapter.updates
    updates = with_tied_head(updates, base, tied=tied)
    _check(adapter, updates, base, force=force)
    return updates


def _check(adapter: Adapter, updates: Updates, base: Base, *, force: bool) -> None:
    """Compare names, shapes and, unless forced, values.

    Raises:
        InputError: The updates do not fit the base, or another base is meant.
    """
    missing = [name for name in updates if name not in base]
    if missing:
        raise InputError(
            f"{adapter.folder}: {listed(missing)} of {len(updates)} have no place in this model",
            hint=f"the adapter was made for {adapter.base or 'another model'}",
        )
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight") and name not in updates]
    lacking = [module for module in adapter.lacking(modules) if len(base.shape(f"{module}.weight")) > 1]
    if lacking and adapter.updates is not None:
        raise InputError(
            f"{adapter.folder}: lacks {listed(lacking, 'module')}, which its adapter_config.json lists as targets",
            hint="the file is incomplete: copy or save it again",
        )
    wrong = [problem for name, update in updates.items() if (problem := _misfit(name, update, base.shape(name)))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"{adapter.folder}: {wrong[0]}{more}", hint=f"the adapter was made for {adapter.base or 'another model'}"
        )
    if not force:
        _check_values(adapter, base)


def _fill_modules(model: nn.Module, adapter: Adapter) -> dict[str, Update]:
    """Apply the adapter's method to ``model`` in place, put in the file's values, and return its updates.

    Raises:
        InputError: Names or shapes do not fit; the model is as it was.
    """
    assert isinstance(adapter.config, TargetedMethod)
    adapted = f"the adapter was made for {adapter.base or 'another model'}"
    try:
        adapter.config.apply(model)
    except UsageError as error:
        raise InputError(f"{adapter.folder}: does not fit this model: {error}", hint=adapted) from error
    places = adapter.config.file_tensors(model)
    places = {name: place for name, place in places.items() if not adapter.config.filler(name)}
    missing = [name for name in places if name not in adapter.values]
    unknown = [name for name in adapter.values if name not in places and not adapter.config.filler(name)]
    shapes = [
        f"{name} has shape {list(adapter.values[name].shape)}, expected {list(place.shape)}"
        for name, place in places.items()
        if name in adapter.values and adapter.values[name].shape != place.shape
    ]
    if missing or unknown or shapes:
        remove(model)
        problem = f"{listed(missing)} missing" if missing else f"{listed(unknown)} with no place in this model"
        raise InputError(f"{adapter.folder}: {shapes[0] if shapes else problem}", hint=adapted)
    for name, place in places.items():
        place.copy_(adapter.values[name])
    return model_updates(model)


def _skeleton(base: Base) -> nn.Module:
    """A tree of modules around the tensors of a base, for a method to wrap; it computes nothing."""
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for name, tensor in base.items():
        place, _, last = name.rpartition(".")
        parts = place.split(".")
        for depth, part in enumerate(parts, 1):
            here = ".".join(parts[:depth])
            if here not in modules:
                modules[here] = _leaf(here, base)
                modules[".".join(parts[: depth - 1])].add_module(part, modules[here])
        setattr(modules[place], last, nn.Parameter(tensor, requires_grad=False))
    return modules[""]


def _leaf(name: str, base: Base) -> nn.Module:
    """An embedding or a linear layer where there is a matrix of this name, yet without it."""
    weight = f"{name}.weight"
    if weight not in base or len(base.shape(weight)) != 2:
        return nn.Module()
    rows, columns = base.shape(weight)
    if weight.endswith(_EMBEDDING):
        return nn.Embedding(rows, columns, device="meta")
    return nn.Linear(columns, rows, bias=False, device="meta")


def with_tied_head(updates: Updates, base: Iterable[str], *, tied: bool) -> dict[str, Update]:
    """Updates in which trained tokens of a tied embedding hold for the head too: they share their rows."""
    found = dict(updates)
    if not tied:
        return found
    embedding = next((name for name in updates if name.endswith(_EMBEDDING)), None)
    head = next((name for name in base if name.endswith(_HEAD)), _HEAD)
    if embedding is not None and head not in updates and isinstance(updates[embedding], Rows):
        found[head] = updates[embedding]
    return found


def _misfit(name: str, update: Update, base: tuple[int, ...]) -> str | None:
    """How an update does not fit its tensor, in words."""
    low = update.low if isinstance(update, Magnitude) else update
    if isinstance(update, Scaled):
        return None  # made for this base by the method itself
    if isinstance(low, LowRank):
        shape: tuple[int, ...] = (low.left.shape[0], low.right.shape[1])
        fits = shape == (base[0], math.prod(base[1:]))
        if fits and isinstance(update, Magnitude):
            shape = tuple(update.lengths.shape)
            fits = shape == base[:1]
    elif isinstance(update, Rows):
        shape = (update.rows(base[0]), *update.values.shape[1:])
        known = sum(token < base[0] for token in update.ids)
        fits = shape[1:] == base[1:] and shape[0] - base[0] == len(update.ids) - known
    else:
        assert isinstance(update, Replace)
        shape = tuple(update.tensor.shape)
        grows = name.endswith((_EMBEDDING, _HEAD)) and shape[:1] > base[:1]
        fits = shape == base or (grows and shape[1:] == base[1:])
    return None if fits else f"{name} is for shape {list(shape)}, this model has {list(base)}"


def _check_values(adapter: Adapter, base: Base) -> None:
    if adapter.own_base and not any(base.quantized(name) for name in base):
        raise InputError(
            f"{adapter.folder}: was trained on codes that its method chose, this base is not quantised",
            hint="give the folder base/ of its run",
        )
    other = [name for name, tensor in adapter.base_copies.items() if not _same(tensor, base.get(name))]
    other += differing(adapter.fingerprint or {}, base)
    if other:
        raise InputError(
            f"{adapter.folder}: trained on another base model ({adapter.base}): {listed(other)} with other values",
            hint="give the base it was trained on, or force it if you know that they fit",
        )


def _same(tensor: Tensor, base: Tensor | None) -> bool:
    if base is None or tensor.shape != base.shape:
        return False
    return torch.allclose(tensor.float(), base.float().to(tensor.device), rtol=1e-2, atol=1e-6)


def _is_tied(model: nn.Module) -> bool:
    base = base_tensors(model)
    embedding = next((base[name] for name in base if name.endswith(_EMBEDDING)), None)
    head = next((base[name] for name in base if name.endswith(_HEAD)), None)
    return embedding is not None and head is not None and embedding.data_ptr() == head.data_ptr()


def attach(model: nn.Module, updates: Updates, dropout: float) -> None:
    """Wrap the modules that low-rank updates and whole tensors are for, in place, with their values.

    Args:
        model: Frozen, without an adapter.
        updates: By the names of the base tensors.
        dropout: Of the branches, in training.
    """
    modules: dict[str, dict[str, Update]] = {}
    for name, update in updates.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = update
    shared: dict[int, nn.Parameter] = {}
    for name, parts in modules.items():
        base = model.get_submodule(name)
        device = device_of(base)
        replace_module(model, name, _wrap(base, parts, dropout, shared).to(device))


def _wrap(base: nn.Module, parts: dict[str, Update], dropout: float, shared: dict[int, nn.Parameter]) -> nn.Module:
    weight = parts.get("weight")
    if isinstance(weight, Rows):
        rows = shared.setdefault(id(weight), nn.Parameter(weight.values.float().clone()))
        if isinstance(base, nn.Embedding):
            return TokenEmbedding(base, weight.ids, rows)
        assert isinstance(base, nn.Linear)
        return TokenHead(base, weight.ids, rows)
    if isinstance(weight, LowRank) and isinstance(base, nn.Embedding):
        embedding = LoRAEmbedding(base, weight.right.shape[0], weight.scaling)
        _fill(embedding.lora_A, weight.left.T)
        _fill(embedding.lora_B, weight.right.T)
        return embedding
    if isinstance(weight, LowRank) and isinstance(base, Conv):
        conv = LoRAConv(base, weight.right.shape[0], weight.scaling, dropout)
        _fill(conv.lora_A, weight.right.view_as(conv.lora_A))
        _fill(conv.lora_B, weight.left)
        return conv
    low = weight.low if isinstance(weight, Magnitude) else weight
    if isinstance(low, LowRank):
        assert isinstance(base, nn.Linear)
        bias = parts.get("bias")
        kind = DoRALinear if isinstance(weight, Magnitude) else LoRALinear
        linear = kind(base, low.right.shape[0], low.scaling, dropout, train_bias=bias is not None)
        _fill(linear.lora_A, low.right)
        _fill(linear.lora_B, low.left)
        if isinstance(weight, Magnitude) and isinstance(linear, DoRALinear):
            _fill(linear.lora_magnitude_vector, weight.lengths)
        if isinstance(bias, Replace) and linear.trained_bias is not None:
            _fill(linear.trained_bias, bias.tensor)
        return linear
    copy = TrainedCopy(base, parts)
    for name, update in parts.items():
        assert isinstance(update, Replace)
        copy.trained[name] = nn.Parameter(update.tensor.float().clone())
    return copy


def _fill(parameter: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
