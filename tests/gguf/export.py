"""A model of transformers as GGUF, by the table that the reader uses in the other direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lit_lora.gguf.families import FAMILIES, Family
from lit_lora.gguf.settings import rope_tensors, values_of
from tests.checkpoint.makers import write_gguf


def family_by_type(model_type: str) -> Family:
    """The family of a ``model_type``; of several, the first."""
    return next(family for family in FAMILIES if family.model_type == model_type)


def disk_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors as ``save_pretrained`` writes them, without the copy of a tied head."""
    state = revert_weight_conversion(model, model.state_dict())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = ("lm_head.weight", "embed_out.weight") if tied else ()
    return {name: tensor for name, tensor in state.items() if name not in heads}


def gguf_state(family: Family, config: dict[str, Any], state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors under llama.cpp's names and in its form."""
    single: dict[str, Tensor] = {}
    stacked: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        place = family.places(name, layers)[0]
        for gguf_name, part in zip(place.names, place.op.to_gguf(tensor, config), strict=True):
            if place.index is None:
                assert gguf_name not in single, f"{name} goes where another tensor is"
                single[gguf_name] = part
            else:
                stacked.setdefault(gguf_name, {})[place.index] = part
    for name, parts in stacked.items():
        single[name] = torch.stack([parts[index] for index in range(len(parts))])
    return single


def export(
    model: PreTrainedModel,
    path: Path,
    *,
    family: Family | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """Write a model to a GGUF file."""
    family = family or family_by_type(model.config.model_type)
    config = values_of(model.config)
    metadata = family.metadata(config)
    arch = MODEL_ARCH_NAMES[family.arch]
    metadata[f"{arch}.vocab_size"] = config["vocab_size"]
    layers = metadata[f"{arch}.block_count"]
    tensors = gguf_state(family, config, disk_state(model), layers) | rope_tensors(config)
    arrays = {name: tensor.contiguous().float().numpy() for name, tensor in tensors.items()}
    tokenizer = tokenizer if tokenizer is not None else {"tokenizer.ggml.model": "no_vocab"}
    return write_gguf(path, metadata | tokenizer, arrays, kind=kind, architecture=arch)
