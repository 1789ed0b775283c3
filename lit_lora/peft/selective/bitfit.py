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
    """BitFit: only biases train, of all layers or some; for models that have biases."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    default_lr: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "LIT_LORA_BITFIT"

    name: Literal["bitfit"] = Field("bitfit", description="The method.")
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        ["*"], description="Modules whose bias trains: all-linear, q,v or a list of names; * for all that have a bias."
    )

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "BitFit"

    def adaptable(self, module: nn.Module) -> bool:
        """Whether a module has a bias."""
        return isinstance(getattr(module, "bias", None), nn.Parameter)

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """Names of the chosen modules with a bias.

        Raises:
            UsageError: The model has no bias, or a name matches no module with one.
        """
        if not any(self.adaptable(module) for module in model.modules()):
            raise UsageError("peft: bitfit trains biases, but this model has none", hint="use lora or ia3")
        return super().targets(model, copies)

    def wrapped(self, targets: Mapping[str, nn.Module]) -> dict[str, OwnModule]:
        """The wrappers of the targets, with a trained copy of each bias."""
        return {name: TrainedCopy(base, ["bias"]) for name, base in targets.items()}
