"""Open a finetuned encoder or encoder-decoder from whatever the user names: a run, an adapter, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lit_lora.classify.checkpoint import Pretrained, load_with_head, read_pretrained
from lit_lora.classify.task import Task
from lit_lora.errors import InputError
from lit_lora.open.folders import find_folders
from lit_lora.peft import Adapter, load_adapter, read_adapter
from lit_lora.peft.core.modules import own_modules
from lit_lora.train.device import choose_device, choose_dtype, reuse_memory

__all__ = ["OpenedClassifier", "open_classifier"]


@dataclass(frozen=True)
class OpenedClassifier:
    """A model ready to use."""

    model: nn.Module
    shape: Pretrained
    task: Task
    description: str
    """One line: what it is, on which device, in which dtype."""


def open_classifier(
    folder: Path, *, adapter: Path | None = None, dtype: str | None = None, device: str = "auto"
) -> OpenedClassifier:
    """Open a model for use.

    Args:
        folder: A run folder, an adapter folder, or the folder of a whole model with a trained head.
        adapter: An adapter folder, or a run folder with one, on the model in ``folder``.
        dtype: ``fp32``, ``bf16`` or ``fp16``; what the device computes fastest when omitted.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        InputError: A folder holds no model or adapter, the adapter is of another base, or there is no trained head.
        UsageError: The base of a run or adapter is not on this machine, no such device or dtype.
    """
    base, beside = find_folders(folder, adapter=adapter)
    place = choose_device(device)
    precision = choose_dtype(dtype or "auto", place)
    reuse_memory()
    shape = read_pretrained(base)
    task = _task_of_adapter(read_adapter(beside), shape) if beside is not None else _task_of_model(shape)
    model, fresh = load_with_head(shape, task, dtype=precision, device=place)
    about = [str(base)]
    if beside is not None:
        about.append(f"adapter {load_adapter(model, beside)}")
    untrained = [name for name in fresh if name not in own_modules(model)]
    if untrained and task.kind != "seq2seq":
        raise InputError(
            f"{beside or base}: has no trained head ({', '.join(untrained)})",
            hint="lit-lora finetune --config classify trains one",
        )
    about += [str(task), f"{str(precision).removeprefix('torch.')} on {place}"]
    return OpenedClassifier(model.eval(), shape, task, ", ".join(about))


def _task_of_model(shape: Pretrained) -> Task:
    """What a whole model predicts."""
    kind = shape.kind("auto")
    names = tuple(str(shape.config.id2label[number]) for number in sorted(shape.config.id2label))
    return Task(kind, names if kind == "classification" else ())


def _task_of_adapter(adapter: Adapter, shape: Pretrained) -> Task:
    """What an adapter predicts: as lit-lora wrote it, else by the size of the head in its file.

    Raises:
        InputError: It has no head.
    """
    noted = Task.from_json(adapter.task) if adapter.task is not None else None
    if noted is not None:
        return noted
    if shape.writes_text:
        return Task("seq2seq")
    ends = ("classifier.weight", "classifier.out_proj.weight", "score.weight", "classification_head.out_proj.weight")
    sizes = [len(tensor) for name, tensor in adapter.values.items() if name.endswith(ends)]
    if not sizes:
        raise InputError(f"{adapter.folder}: has no classification head", hint="it is an adapter for another task")
    if sizes[0] == 1:
        return Task("regression")
    labels = shape.labels
    if len(labels) != sizes[0]:
        labels = tuple(f"LABEL_{number}" for number in range(sizes[0]))
    return Task("classification", labels)
