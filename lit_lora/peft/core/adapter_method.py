"""Methods that put modules of their own into a model and are saved as an adapter: what their files hold."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_lora.errors import InputError
from lit_lora.peft.core.method import Method

__all__ = ["CONFIG", "OWN", "WEIGHTS", "AdapterMethod"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN = "LIT_LORA_"
"""Before a ``peft_type`` of ours, which PEFT does not know and therefore refuses."""


class AdapterMethod(Method):
    """A method whose modules are saved apart from the model, and loaded by three steps.

    Settings are read from the folder, :meth:`apply` puts the modules in, and the tensors of :meth:`file_tensors` are
    given the file's values.
    """

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method, or one of ours; ``None`` where it follows from the method's name."""
    as_written: ClassVar[bool] = True
    """The settings that lit-lora noted describe the file. Not where the file holds less than was trained, such as the
    output of a network: then PEFT's config does."""

    @abstractmethod
    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` of the adapter in ``model``, but for the base model's name, in PEFT's words."""

    @abstractmethod
    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors by their names in its file, each once and detached.

        They are views of the parameters, to fill as well, for settings that :meth:`from_peft` gave.
        """

    @classmethod
    def filler(cls, name: str) -> bool:
        """Whether a tensor of this name in a file says nothing."""
        return False

    @classmethod
    def normalized(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors, without the prefix of their names, as :meth:`file_tensors` names and orders them.

        Raises:
            InputError: ``raw``, its ``adapter_config.json``, does not fit them; begins with the name of the file.
        """
        return dict(tensors)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterMethod:
        """Settings of an adapter that PEFT wrote, perhaps of a plainer method that computes the same.

        Args:
            raw: ``adapter_config.json``.
            tensors: The file's, as :meth:`normalized`.

        Raises:
            InputError: It is inconsistent, or asks for what is not done here; begins with the name of the file.
            UsageError: A value is none that the settings take.
        """
        raise InputError(f"{CONFIG}: peft_type {raw.get('peft_type')!r} without lit_lora.json", hint="copy the folder")
