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
from lit_lora.peft.added import AddedMethod
from lit_lora.peft.added_files import restore_added
from lit_lora.peft.base import Base, base_tensors, device_of, freeze, own_modules, replace_module
from lit_lora.peft.files import Adapter, listed, read_adapter
from lit_lora.peft.fingerprint import differing
from lit_lora.peft.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from lit_lora.peft.trained import TokenEmbedding, TokenHead, TrainedCopy
from lit_lora.peft.updates import LowRank, Replace, Rows, Update, Updates

__all__ = ["AppliedAdapter", "check_base", "load_adapter", "with_tied_head"]

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class AppliedAdapter:
    """What loading an adapter did."""

    adapter: Adapter
    """As it was read."""
    norm: float
    """Frobenius norm of the whole update, or of the tensors of added modules."""

    def __str__(self) -> str:
        checked = "base checked" if self.adapter.fingerprint else "base checked by shapes only"
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
    updates = check_base(adapter, base, tied=_is_tied(model), force=force)
    if adapter.added:
        assert isinstance(adapter.config, AddedMethod)
        freeze(model)
        restore_added(model, adapter.folder, adapter.config, adapter.added)
        return AppliedAdapter(adapter, math.hypot(*(float(tensor.norm()) for tensor in adapter.added.values())))
    norm = math.hypot(*(update.norm(base[name]) for name, update in updates.items()))
    if norm == 0:
        log.warn(f"{folder}: no effect, every update in it is zero: was it saved before its first training step?")
    freeze(model)
    assert isinstance(adapter.config, LoRAConfig)
    _attach(model, updates, adapter.config.dropout)
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
    updates = with_tied_head(adapter.updates, base, tied=tied)
    missing = [name for name in updates if name not in base]
    if missing:
        raise InputError(
            f"{adapter.folder}: {listed(missing)} of {len(updates)} have no place in this model",
            hint=f"the adapter was made for {adapter.base or 'another model'}",
        )
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight") and name not in updates]
    lacking = [module for module in adapter.lacking(modules) if len(base.shape(f"{module}.weight")) == 2]
    if lacking:
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
    return updates


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
    if isinstance(update, LowRank):
        shape: tuple[int, ...] = (update.left.shape[0], update.right.shape[1])
        fits = shape == base
    elif isinstance(update, Rows):
        shape = (update.rows(base[0]), *update.values.shape[1:])
        known = sum(token < base[0] for token in update.ids)
        fits = shape[1:] == base[1:] and shape[0] - base[0] == len(update.ids) - known
    else:
        shape = tuple(update.tensor.shape)
        grows = name.endswith((_EMBEDDING, _HEAD)) and shape[:1] > base[:1]
        fits = shape == base or (grows and shape[1:] == base[1:])
    return None if fits else f"{name} is for shape {list(shape)}, this model has {list(base)}"


def _check_values(adapter: Adapter, base: Base) -> None:
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


def _attach(model: nn.Module, updates: Updates, dropout: float) -> None:
    """Wrap the modules that the updates are for, with the updates' values."""
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
    if isinstance(weight, LowRank):
        assert isinstance(base, nn.Linear)
        bias = parts.get("bias")
        linear = LoRALinear(base, weight.right.shape[0], weight.scaling, dropout, train_bias=bias is not None)
        _fill(linear.lora_A, weight.right)
        _fill(linear.lora_B, weight.left)
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
