"""An adapter onto a model: its settings applied, its tensors filled in, and a check that it belongs to this base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_lora import log
from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.adapter_method import CONFIG
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.base_tensors import Base, base_tensors
from lit_lora.peft.core.matching import listed
from lit_lora.peft.core.modules import model_updates, own_modules, remove
from lit_lora.peft.core.updates import Update
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.fingerprint import differing
from lit_lora.peft.files.stand_in import stand_in

__all__ = ["AppliedAdapter", "check_base", "load_adapter"]


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
        model: The base model, without an adapter; left as it was where an error is raised.
        folder: The adapter folder.
        force: Take a base of the right shapes even if it is not the one the adapter was trained on.

    Raises:
        InputError: The folder is not a readable adapter, or not one for this model.
        UsageError: The model already has an adapter.
    """
    if own_modules(model):
        raise UsageError(f"{folder}: the model already has an adapter", hint="remove it first")
    adapter = read_adapter(folder)
    base, parameters = base_tensors(model), list(model.parameters())
    _put_in(model, adapter, base, force=force)
    for parameter in parameters:  # the base's: what the adapter put in trains or not as its method says
        parameter.requires_grad_(False)
        parameter.grad = None
    if isinstance(adapter.config, AddedMethod):
        return AppliedAdapter(adapter, math.hypot(*(float(tensor.norm()) for tensor in adapter.values.values())))
    norm = math.hypot(*(update.norm(base[name]) for name, update in model_updates(model).items()))
    if norm == 0:
        log.warn(f"{folder}: no effect, every update in it is zero: was it saved before its first training step?")
    return AppliedAdapter(adapter, norm)


def check_base(adapter: Adapter, base: Base, model: nn.Module, *, force: bool = False) -> dict[str, Update]:
    """Check that an adapter fits a base of which nobody needs the whole model, and return its updates.

    Needs the memory of the adapter, and of one tensor of the base at a time.

    Args:
        adapter: The adapter.
        base: The base's tensors by name; only those asked for are touched.
        model: The base as modules, best without values, on the meta device; what it holds is lost.
        force: Take another base of the same shapes.

    Returns:
        Updates by the names of the base's tensors; trained tokens of a tied embedding are one update under both names.

    Raises:
        InputError: It does not fit; names and counts say where.
    """
    stand_in(model, base)
    _put_in(model, adapter, base, force=force)
    return model_updates(model)


def _put_in(model: nn.Module, adapter: Adapter, base: Base, *, force: bool) -> None:
    """Apply the adapter's settings to ``model`` in place, fill in its tensors, and check the base.

    Raises:
        InputError: The adapter is not for this model, which is then as it was.
    """
    try:
        adapter.config.apply(model)
        _fill(model, adapter)
        _check_targets(model, adapter, base)
        if not force:
            _check_values(adapter, base)
    except UsageError as error:
        remove(model)
        raise InputError(f"{adapter.folder}: does not fit this model: {error}", hint=_made_for(adapter)) from error
    except BaseException:
        remove(model)
        raise


def _fill(model: nn.Module, adapter: Adapter) -> None:
    """Give the adapter's tensors in ``model`` the file's values, in place.

    Raises:
        InputError: Names or shapes differ.
    """
    filler = adapter.config.filler
    places = {name: place for name, place in adapter.config.file_tensors(model).items() if not filler(name)}
    values = {name: value for name, value in adapter.values.items() if not filler(name)}
    shapes = [
        f"{name} has shape {list(values[name].shape)}, expected {list(place.shape)}"
        for name, place in places.items()
        if name in values and values[name].shape != place.shape
    ]
    missing = [name for name in places if name not in values]
    unknown = [name for name in values if name not in places]
    if missing or unknown:
        problem = f"{listed(missing)} missing" if missing else f"{listed(unknown)} with no place in this model"
        raise InputError(f"{adapter.folder}: {problem}", hint=_made_for(adapter))
    if shapes:
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        raise InputError(f"{adapter.folder}: {shapes[0]}{more}", hint=_made_for(adapter))
    for name, place in places.items():
        place.copy_(values[name])


def _check_targets(model: nn.Module, adapter: Adapter, base: Base) -> None:
    """Look for modules that should have a part of the adapter.

    Raises:
        InputError: One is listed in ``adapter_config.json``, and the file has nothing for it.
    """
    own = own_modules(model)
    matrices = [name.removesuffix(".weight") for name in base if name.endswith(".weight") and len(base.shape(name)) > 1]
    lacking = [name for name in adapter.listed_targets(matrices) if name not in own]
    if lacking:
        raise InputError(
            f"{adapter.folder}: lacks {listed(lacking, 'module')}, which its {CONFIG} lists as targets",
            hint="the file is incomplete: copy or save it again",
        )


def _made_for(adapter: Adapter) -> str:
    return f"the adapter was made for {adapter.base or 'another model'}"


def _check_values(adapter: Adapter, base: Base) -> None:
    """Compare what is known of the base that the adapter was trained on with this one.

    Raises:
        InputError: It is another one.
    """
    if adapter.own_base and not any(base.quantized(name) for name in base):
        raise InputError(
            f"{adapter.folder}: was trained on codes that its method chose, this base is not quantized",
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
