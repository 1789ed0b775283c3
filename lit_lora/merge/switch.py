"""Task switching on a loaded model: take one task's merged update out and put another's in, without any drift."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_lora.checkpoint.load import AnyModel, empty_model
from lit_lora.errors import UsageError
from lit_lora.merge.plan import BaseTensors
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.core.updates import Update
from lit_lora.peft.files.adapter import read_adapter
from lit_lora.peft.files.load import check_base
from lit_lora.quantize import found_config

__all__ = ["TaskSwitcher"]


class TaskSwitcher:
    """Puts one adapter at a time into the weights of a loaded model.

    Each switch computes the tensors that the old or the new task changes from the base's mapped files, in float32 and
    rounded once, so the hundredth switch gives the same bits as the first. Other tensors are left alone.

    Args:
        model: As loaded from ``base``, without an adapter.
        base: The base model's folder.

    Raises:
        UsageError: The model has an adapter beside its weights.
    """

    def __init__(self, model: AnyModel, base: Path) -> None:
        if own_modules(model):
            raise UsageError(f"{base}: the model has an adapter beside its weights", hint="load it without an adapter")
        quantization = found_config(model)
        if quantization is not None:
            raise UsageError(
                f"{base}: switching tasks needs full weights, but the model's are {quantization}",
                hint="load it in 16 bits",
            )
        self.model = model
        self.config = model.config
        self.tensors = BaseTensors(base)
        self.updates: dict[str, Update] = {}

    @torch.no_grad()
    def switch(self, adapter: Path | None) -> None:
        """Take the present task out and put ``adapter`` in; ``None`` gives the base.

        Raises:
            InputError: The adapter is broken or belongs to another base; the model keeps the present task.
        """
        tied, embedding, head = self.tensors.tied, self.tensors.embedding, self.tensors.head
        updates: dict[str, Update] = {}
        if adapter is not None:
            task = read_adapter(adapter)
            task.require_updates()
            updates = check_base(task, self.tensors, empty_model(self.config))
        touched = dict.fromkeys([*self.updates, *updates])
        untied = tied and updates.get(embedding) is not updates.get(head)
        if untied:
            touched |= {head: None}
        self._set_tie(tied and not untied)
        for name in touched:
            if not (name == head and tied and not untied):  # a tied head follows its embedding
                # Assigned, never written in place: the old values may be pages of the base's files.
                self.model.get_parameter(name).data = self._merged(name, updates.get(name))
        if tied and not untied:
            self.model.tie_weights()
        rows = len(self.model.get_parameter(embedding))
        self.model.config = self.config.model_copy(
            update={"vocab_size": rows, "tie_word_embeddings": tied and not untied}
        )
        self.updates = updates

    def _merged(self, name: str, update: Update | None) -> Tensor:
        """The base's tensor with an update in it, on the device and in the dtype of the model's."""
        weight = self.tensors[name]
        parameter = self.model.get_parameter(name)
        values = weight if update is None else update.apply(weight, 0, update.rows(len(weight)))
        return values.to(device=parameter.device, dtype=parameter.dtype)

    def _set_tie(self, tied: bool) -> None:
        """Give the head a parameter of its own where it is to be untied; ``switch`` ties it again after writing."""
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings().get_parameter("weight")
        if not tied and head.weight is embedding:
            head.weight = nn.Parameter(embedding.detach(), requires_grad=False)
