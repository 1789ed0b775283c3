"""What every finetuning method answers: its name and kind, how it is put on a model, and what to call it.

A method is: which modules it wraps, and which parameters then require a gradient. Its parameters live in modules that
derive from :class:`~lit_lora.peft.core.modules.OwnModule`, so they are found by type and never by a substring of their
name. The wrapped module stays untouched as ``base_layer``. Works on any tree of ``nn.Module``. What only some methods
do is in :mod:`lit_lora.peft.core.capabilities`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from lit_lora.config import Settings

__all__ = ["Kind", "Method"]

Kind = Literal["mergeable", "quantized", "added", "full"]


class Method(Settings):
    """Settings of one finetuning method; ``apply`` changes a model in place into one that trains by it."""

    kind: ClassVar[Kind]
    name: str = Field("", description="The method.")
    default_lr: ClassVar[float | None] = None
    """The learning rate where the config gives none; ``None`` for that of the optimizer's settings."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Wrap the modules that the method adapts and let its own parameters require a gradient.

        What required one before still does, so a recipe calls :func:`~lit_lora.peft.core.modules.freeze` first.

        Raises:
            UsageError: The settings do not fit this model, such as a target that matches nothing.
        """

    @property
    def graph_safe(self) -> bool:
        """Whether every training step does the same operations, so that a GPU's may be recorded once and repeated."""
        return False

    @property
    def lr(self) -> float | None:
        """The learning rate of these settings where the config gives none."""
        return self.default_lr

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return self.name.replace("-", " ").capitalize()

    @property
    def about(self) -> str:
        """The method and its main settings in a few words."""
        return self.name
