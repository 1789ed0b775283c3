"""Full finetuning: all parameters train, or those of named modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import TrainsModulesInFull
from lit_lora.peft.core.matching import select
from lit_lora.peft.core.method import Kind, Method
from lit_lora.quantize import found_config

__all__ = ["FullConfig"]


class FullConfig(Method, TrainsModulesInFull):
    """Full finetuning: the model's own weights train and are saved as a whole model."""

    kind: ClassVar[Kind] = "full"
    name: Literal["full"] = Field("full", description="The method.")
    train: Literal["all"] | list[str] = Field(
        "all", description="Modules to train: all, or a list of names such as mlp, lm_head or model.layers.29.*."
    )

    def with_modules_to_save(self, names: Sequence[str]) -> FullConfig:
        """These settings with ``names`` among the modules that train."""
        if self.train == "all":
            return self
        return self.model_copy(update={"train": list(dict.fromkeys([*self.train, *names]))})

    def apply(self, model: nn.Module) -> None:
        """Let the parameters of the chosen modules require a gradient, in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, or the base is quantized: codes have no gradient.
        """
        quantized = found_config(model)
        if quantized is not None:
            raise UsageError(
                f"peft: full finetuning changes every weight, but the base is quantized ({quantized})",
                hint="start from the original 16-bit checkpoint, or train an adapter: recipe=qlora",
            )
        if self.train == "all":
            model.requires_grad_(True)
            return
        with_parameters = {
            name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
        }
        for name in select(self.train, with_parameters, key="peft.train"):
            with_parameters[name].requires_grad_(True)
