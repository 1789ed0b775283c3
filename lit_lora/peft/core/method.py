"""The base class of finetuning methods: name, kind, how it is applied to a model, and how to describe it.

A method decides which modules it wraps, and which parameters then require a gradient. Its parameters live in modules
derived from :class:`~lit_lora.peft.core.modules.OwnModule`, so they are found by type and never by a substring of their
name. The wrapped module stays unchanged as ``base_layer``. A method works on any tree of ``nn.Module``. Capabilities of
some methods are in :mod:`lit_lora.peft.core.capabilities`.
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
    """The settings of a finetuning method; ``apply`` prepares a model for training with it, in place."""

    kind: ClassVar[Kind]
    name: str = Field("", description="The method.")
    default_lr: ClassVar[float | None] = None
    """The learning rate if the config gives none; ``None`` for the optimizer's default."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Put the method's modules into the model, in place; their parameters require a gradient.

        Other parameters stay as they are, so a recipe calls :func:`~lit_lora.peft.core.modules.freeze` first.

        Raises:
            UsageError: The settings do not fit this model, such as a target that matches nothing.
        """

    @property
    def graph_safe(self) -> bool:
        """Whether every training step runs the same operations, so that a GPU may replay them as a CUDA graph."""
        return False

    @property
    def lr(self) -> float | None:
        """The learning rate for these settings if the config gives none."""
        return self.default_lr

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return self.name.replace("-", " ").capitalize()

    @property
    def about(self) -> str:
        """A few words on the method and its main settings."""
        return self.name
