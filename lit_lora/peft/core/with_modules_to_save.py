"""Modules that train in full in addition to added ones, such as a new head, and are saved with them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.capabilities import TrainsModulesInFull
from lit_lora.peft.core.modules import OwnModule, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy
from lit_lora.peft.core.targeted import with_parameters

__all__ = ["WithModulesToSave"]


class WithModulesToSave(AddedMethod, TrainsModulesInFull):
    """An added method that can train other modules too; its ``add`` ends with :meth:`train_modules_to_save`."""

    modules_to_save: list[str] = Field([], description="Modules to train in full and save with the adapter.")

    def with_modules_to_save(self, names: Sequence[str]) -> WithModulesToSave:
        """These settings with ``names`` among the modules that train in full."""
        return self.model_copy(update={"modules_to_save": list(dict.fromkeys([*self.modules_to_save, *names]))})

    def train_modules_to_save(self, model: nn.Module) -> None:
        """Let the named modules train in full, in place, except those that already train, such as norms.

        Raises:
            UsageError: A name matches nothing, or a module that has an adapter.
        """
        if not self.modules_to_save:
            return
        own = own_modules(model)
        inside = tuple(f"{name}." for name in own)
        for name in with_parameters(model, self.modules_to_save):
            module = model.get_submodule(name)
            if isinstance(module, OwnModule) or name.startswith(inside):
                continue
            if any(isinstance(child, OwnModule) for child in module.children()):
                raise UsageError(f"peft.modules_to_save: {name} contains an adapter, expected modules without one")
            replace_module(model, name, TrainedCopy(module))
