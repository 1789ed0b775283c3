"""A model from a Hugging Face folder: built without memory, then filled tensor by tensor from mapped files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lit_lora.checkpoint.tensors import check_tensors, open_tensors
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
    check_tensors(folder, reader, expected)
    for name in expected:
        tensor = reader.read(name).to(device=device, dtype=dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(tensor))
    if config.tie_word_embeddings:
        model.tie_weights()
    if dtype is not None:
        model.config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return model.eval()
