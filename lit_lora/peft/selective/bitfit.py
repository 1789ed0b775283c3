"""BitFit: only the biases train. Source: Ben Zaken et al. 2022, "BitFit", section 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import OwnModule
from lit_lora.peft.core.modules_to_save import TrainedCopy
from lit_lora.peft.core.targeted import TargetedMethod

__all__ = ["BitFitConfig"]


class BitFitConfig(TargetedMethod):
    """BitFit: the biases train, of every layer or of some; for models that have biases."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    default_lr: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "LIT_LORA_BITFIT"

    name: Literal["bitfit"] = Field("bitfit", description="The method.")
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        ["*"], description="Modules whose bias trains: all-linear, q,v or names, by default all that have a bias."
    )

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "BitFit"

    def adaptable(self, module: nn.Module) -> bool:
        """Whether a module has a bias."""
        return isinstance(getattr(module, "bias", None), nn.Parameter)

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """Names of the modules with a bias that are meant.

        Raises:
            UsageError: The model has no bias, or a name matches none.
        """
        if not any(self.adaptable(module) for module in model.modules()):
            raise UsageError("peft: bitfit trains biases, and this model has none", hint="take lora or ia3")
        return super().targets(model, copies)

    def wrapped(self, targets: Mapping[str, nn.Module]) -> dict[str, OwnModule]:
        """A trained copy of the bias of each target."""
        return {name: TrainedCopy(base, ["bias"]) for name, base in targets.items()}
