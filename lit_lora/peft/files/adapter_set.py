"""Several adapters for one loaded model, of which at most one is in it at a time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lit_lora.config import did_you_mean
from lit_lora.errors import UsageError
from lit_lora.peft.core.added import AddedModule
from lit_lora.peft.core.modules import OwnModule, own_modules, remove, replace_module
from lit_lora.peft.files.load import AppliedAdapter, load_adapter

__all__ = ["Adapters"]


class Adapters:
    """Adapters that take turns in a model. Switching moves modules, not values, so each stays exactly as it was.

    Args:
        model: The base, loaded, without an adapter.

    Raises:
        UsageError: It already has an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        if own_modules(model):
            raise UsageError("the model already has an adapter", hint="remove it first")
        self.model = model
        self.active: str | None = None
        """Name of the adapter that is in the model."""
        self._modules: dict[str, dict[str, OwnModule]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._modules)

    def load(self, name: str, folder: Path, *, force: bool = False) -> AppliedAdapter:
        """Load another adapter from its folder, and put it into the model instead of the active one.

        Raises:
            InputError: It cannot be read or is not for this model; the active one stays.
            UsageError: The name is taken.
        """
        if name in self._modules:
            raise UsageError(f"an adapter named {name!r} is already loaded")
        active_before = self.active
        self.use(None)
        try:
            applied = load_adapter(self.model, folder, force=force)
        except BaseException:
            remove(self.model)
            self.use(active_before)
            raise
        self._modules[name] = own_modules(self.model)
        self.active = name
        return applied

    def use(self, name: str | None) -> None:
        """Put a loaded adapter into the model instead of the active one; ``None`` for the base alone.

        Raises:
            UsageError: No adapter of this name is loaded.
        """
        if name is not None and name not in self._modules:
            suggestion = did_you_mean(name, self._modules)
            loaded = ", ".join(self._modules) or "none"
            raise UsageError(f"no adapter {name!r} is loaded{suggestion}, loaded: {loaded}")
        if self.active is not None:
            remove(self.model)
        self.active = name
        if name is None:
            return
        for place, module in self._modules[name].items():
            if module.wraps:
                replace_module(self.model, place, module)
            elif isinstance(module, AddedModule):
                module.join(self.model.get_submodule(place.rpartition(".")[0]))
