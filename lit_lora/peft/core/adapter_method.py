"""Methods that put modules of their own into a model and are saved as an adapter: the contents of their files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import InputError
from lit_lora.peft.core.method import Method

__all__ = ["CONFIG", "OWN", "WEIGHTS", "AdapterMethod"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN = "LIT_LORA_"
"""Prefix of our own values of ``peft_type``, which PEFT does not know and therefore refuses."""


class AdapterMethod(Method):
    """A method whose modules are saved separately from the model, and loaded in three steps.

    The settings are read from the folder, :meth:`apply` puts the modules in, and the tensors of :meth:`file_tensors`
    get the file's values.
    """

    init_adapter: Path | None = Field(
        None,
        description="Adapter folder to start from; its settings are used for those omitted. Only its values are taken: "
        "steps, optimizer and schedule start anew.",
    )
    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method, or one of ours; ``None`` where it follows from the method's name."""
    as_written: ClassVar[bool] = True
    """Whether the settings saved in ``lit_lora.json`` describe the file. If not, because the file contains less than
    was trained, such as only the output of a network, it is loaded by PEFT's config."""

    @abstractmethod
    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` of the adapter in ``model``, under PEFT's keys, without the base model's name."""

    @abstractmethod
    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors by their names in its file, each once and detached.

        For settings from :meth:`from_peft` they are views of the parameters, so that copying a file's values into them
        loads the adapter.
        """

    @classmethod
    def filler(cls, name: str) -> bool:
        """Whether a tensor of this name in a file is filler, which carries no information and is not loaded."""
        return False

    @classmethod
    def normalized(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors, the prefix of their names removed, with the names and layout of :meth:`file_tensors`.

        Raises:
            InputError: ``raw``, its ``adapter_config.json``, does not fit them; the message begins with the file name.
        """
        return dict(tensors)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterMethod:
        """The settings of an adapter that PEFT wrote, possibly of a simpler method that computes the same.

        Args:
            raw: ``adapter_config.json``.
            tensors: The file's, as from :meth:`normalized`.

        Raises:
            InputError: It is inconsistent or needs an unsupported feature; the message begins with the file name.
            UsageError: A value is not valid for the settings.
        """
        raise InputError(f"{CONFIG}: peft_type {raw.get('peft_type')!r} without lit_lora.json", hint="copy the folder")
