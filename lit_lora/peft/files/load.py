"""Loading an adapter into a model: apply its settings, fill in its tensors, and check that it belongs to this base."""

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

__all__ = ["AppliedAdapter", "check_base", "load_adapter", "put_in"]


@dataclass(frozen=True)
class AppliedAdapter:
    """The result of loading an adapter."""

    adapter: Adapter
    """The adapter as read."""
    norm: float
    """Frobenius norm of the whole update, or of the tensors of added modules."""

    def __str__(self) -> str:
        if self.adapter.fingerprint:
            checked = "base checked"
        elif self.adapter.base:
            checked = f"base checked by shapes only, it was trained on {self.adapter.base}"
        else:
            checked = "base checked by shapes only"
        applied = "1 tensor" if self.adapter.tensors == 1 else f"{self.adapter.tensors} tensors"
        return f"{self.adapter.folder}: {applied} applied, update norm {self.norm:.4g}, {checked}"


def load_adapter(model: nn.Module, folder: Path, *, force: bool = False) -> AppliedAdapter:
    """Read an adapter folder, PEFT's or ours, and load it into ``model`` in place.

    The base is frozen; the adapter can be trained further.

    Args:
        model: The base model, without an adapter; unchanged if an error is raised.
        folder: The adapter folder.
        force: Accept any base of the right shapes, even if the adapter was trained on another.

    Raises:
        InputError: The folder is not a readable adapter, or not one for this model.
        UsageError: The model already has an adapter.
    """
    if own_modules(model):
        raise UsageError(f"{folder}: the model already has an adapter", hint="remove it first")
    adapter = read_adapter(folder)
    base = base_tensors(model)
    base_parameters = list(model.parameters())
    put_in(model, adapter, base, force=force)
    for parameter in base_parameters:  # only these: the method decides which of its own parameters train
        parameter.requires_grad_(False)
        parameter.grad = None

    if isinstance(adapter.config, AddedMethod):
        norms = [float(tensor.norm()) for tensor in adapter.values.values()]
        return AppliedAdapter(adapter, math.hypot(*norms))
    norms = [update.norm(base[name]) for name, update in model_updates(model).items()]
    norm = math.hypot(*norms)
    if norm == 0:
        log.warn(f"{folder}: all updates are zero, so the adapter has no effect; was it saved before training?")
    return AppliedAdapter(adapter, norm)


def check_base(adapter: Adapter, base: Base, model: nn.Module, *, force: bool = False) -> dict[str, Update]:
    """Check that an adapter fits a base that is not loaded, and return its updates.

    Needs memory for the adapter, and for one tensor of the base at a time.

    Args:
        adapter: The adapter.
        base: The base's tensors by name; only those needed are read.
        model: The base's modules, best on the meta device; its values are replaced by stand-ins.
        force: Accept any base of the right shapes.

    Returns:
        Updates by the names of the base's tensors; trained tokens of a tied embedding are one update under both names.

    Raises:
        InputError: It does not fit; the message names the tensors or modules.
    """
    stand_in(model, base)
    put_in(model, adapter, base, force=force)
    return model_updates(model)


def put_in(model: nn.Module, adapter: Adapter, base: Base, *, force: bool) -> None:
    """Apply the adapter's settings to ``model`` in place, fill in its tensors, and check the base.

    Raises:
        InputError: The adapter is not for this model, from which it is removed again.
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
    except BaseException:  # such as Ctrl-C: the model must not keep half of an adapter
        remove(model)
        raise


def _fill(model: nn.Module, adapter: Adapter) -> None:
    """Copy the file's values into the adapter's tensors in ``model``.

    Raises:
        InputError: Names or shapes differ.
    """
    is_filler = adapter.config.filler
    # Views of the parameters, under the file's names.
    targets = {name: target for name, target in adapter.config.file_tensors(model).items() if not is_filler(name)}
    values = {name: value for name, value in adapter.values.items() if not is_filler(name)}

    missing = [name for name in targets if name not in values]
    unknown = [name for name in values if name not in targets]
    if missing:
        raise InputError(f"{adapter.folder}: {listed(missing)} missing", hint=_made_for(adapter))
    if unknown:
        raise InputError(f"{adapter.folder}: {listed(unknown)} not expected for this model", hint=_made_for(adapter))
    wrong = [name for name, target in targets.items() if values[name].shape != target.shape]
    if wrong:
        name = wrong[0]
        got, expected = list(values[name].shape), list(targets[name].shape)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"{adapter.folder}: {name} has shape {got}, expected {expected}{more}", hint=_made_for(adapter)
        )
    for name, target in targets.items():
        target.copy_(values[name])


def _check_targets(model: nn.Module, adapter: Adapter, base: Base) -> None:
    """Check that all modules that the config lists as targets are adapted.

    Raises:
        InputError: One is listed in ``adapter_config.json``, but the file has no tensors for it.
    """
    own = own_modules(model)
    with_matrix = [
        name.removesuffix(".weight") for name in base if name.endswith(".weight") and len(base.shape(name)) > 1
    ]
    missing = [name for name in adapter.listed_targets(with_matrix) if name not in own]
    if missing:
        raise InputError(
            f"{adapter.folder}: no tensors for {listed(missing, 'module')}, which {CONFIG} lists as targets",
            hint="the file is incomplete: copy or save it again",
        )


def _made_for(adapter: Adapter) -> str:
    return f"the adapter was made for {adapter.base or 'another model'}"


def _check_values(adapter: Adapter, base: Base) -> None:
    """Compare this base with the values that the adapter has of the one it was trained on.

    Raises:
        InputError: They differ.
    """
    if adapter.own_base and not any(base.quantized(name) for name in base):
        raise InputError(
            f"{adapter.folder}: trained on a base quantized by its method, but this base is not quantized",
            hint="give the folder base/ of its run",
        )
    different = [name for name, tensor in adapter.base_copies.items() if not _same(tensor, base.get(name))]
    different += differing(adapter.fingerprint or {}, base)
    if different:
        raise InputError(
            f"{adapter.folder}: trained on another base model ({adapter.base}): {listed(different)} with other values",
            hint="give the base it was trained on; lit-lora merge accepts another one with --force",
        )


def _same(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether they are equal up to the rounding of another dtype."""
    if base is None or tensor.shape != base.shape:
        return False
    return torch.allclose(tensor.float(), base.float().to(tensor.device), rtol=1e-2, atol=1e-6)
