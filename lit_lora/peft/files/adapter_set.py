"""Several adapters of one loaded model at once; one of them at a time is in it, or none."""

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
    """Adapters that take turns in a model. A switch moves modules and no values, so each comes back as it was.

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
        """The one that is in the model."""
        self._modules: dict[str, dict[str, OwnModule]] = {}

    @property
    def names(self) -> list[str]:
        """Those that are loaded."""
        return list(self._modules)

    def load(self, name: str, folder: Path, *, force: bool = False) -> AppliedAdapter:
        """Load one more from its folder, and put it into the model in the place of the present one.

        Raises:
            InputError: It cannot be read or is not for this model; the present one stays.
            UsageError: The name is taken.
        """
        if name in self._modules:
            raise UsageError(f"an adapter called {name!r} is loaded already")
        before = self.active
        self.use(None)
        try:
            applied = load_adapter(self.model, folder, force=force)
        except BaseException:
            remove(self.model)
            self.use(before)
            raise
        self._modules[name], self.active = own_modules(self.model), name
        return applied

    def use(self, name: str | None) -> None:
        """Put a loaded adapter into the model, in the place of the present one; ``None`` leaves the base.

        Raises:
            UsageError: None of that name is loaded.
        """
        if name is not None and name not in self._modules:
            known = f"loaded: {', '.join(self._modules) or 'none'}"
            raise UsageError(f"no adapter {name!r} is loaded{did_you_mean(name, self._modules)}, {known}")
        if self.active is not None:
            remove(self.model)
        self.active = name
        for place, module in self._modules.get(name or "", {}).items():
            if module.wraps:
                replace_module(self.model, place, module)
            elif isinstance(module, AddedModule):
                module.join(self.model.get_submodule(place.rpartition(".")[0]))
