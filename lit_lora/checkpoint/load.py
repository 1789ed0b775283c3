"""A model from a Hugging Face folder: built without memory, then filled tensor by tensor from mapped files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lit_lora.checkpoint.tensors import TensorReader, open_tensors
from lit_lora.errors import InputError
from lit_lora.model import CausalLM, ModelConfig

__all__ = ["load_model"]


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CausalLM:
    """Load a checkpoint for inference or finetuning.

    On the CPU, tensors that are stored in ``dtype`` stay pages of the mapped file until something writes to them, so
    loading takes no memory of its own; other tensors are copied one at a time.

    Args:
        folder: A Hugging Face folder.
        dtype: Of all weights; as stored when omitted.
        device: Where they go.

    Raises:
        InputError: Files are missing or broken, or the tensors are not those that ``config.json`` describes.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    reader = open_tensors(folder)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check(folder, reader, expected, tied=config.tie_word_embeddings)
    for name in expected:
        tensor = reader.read(name).to(device=device, dtype=dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(tensor))
    if config.tie_word_embeddings:
        model.tie_weights()
    if dtype is not None:
        model.config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return model.eval()


def _check(folder: Path, reader: TensorReader, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        InputError: Something is missing, unexpected or of another shape.
    """
    stored = set(reader.names())
    missing = [name for name in expected if name not in stored]
    harmless = {name for name in stored if name.endswith("rotary_emb.inv_freq")} | (
        {"lm_head.weight"} if tied else set()
    )
    unexpected = sorted(stored - set(expected) - harmless)
    for what, names in (("is missing", missing), ("is not part of this model", unexpected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{folder}: tensor {names[0]} {what}{more}, config.json describes {len(expected)} tensors")
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise InputError(f"{folder}: tensor {name} has shape {list(reader.shape(name))}, expected {list(shape)}")
