"""The model that a ``config.json`` describes, and whether the stored tensors are its."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_lora.checkpoint.headers import Header
from lit_lora.checkpoint.load import empty_model
from lit_lora.checkpoint.tensors import Tensors, check_tensors
from lit_lora.classify import read_pretrained
from lit_lora.inspection.parts import parts, targets
from lit_lora.inspection.report import Inspection, ModelFacts
from lit_lora.model import ModelConfig
from lit_lora.model.quantization import quantization_method

__all__ = ["inspect_encoder", "inspect_model"]

# Rows of a stored head that are compared with the embedding's: few, to read no more than a page of each.
_COMPARED_ROWS = 8


def inspect_model(
    report: Inspection, data: dict[str, Any], name: str, tensors: Tensors | None, headers: Mapping[str, Header]
) -> None:
    """Describe the model, its parts and its modules, and what is wrong with it.

    Args:
        report: Where to put it.
        data: The contents of ``config.json``.
        name: Its path, for messages.
        tensors: The stored tensors, without values if they are not on this machine; ``None`` if they are broken.
        headers: The stored tensors as the files have them; empty if the format has no such headers.
    """
    with report.noting_errors():
        config = ModelConfig.from_hf(data, name=name)
        report.model = _facts(config)
        model = empty_model(config)
        report.targets = targets(model)
        stored = tensors.names() if tensors is not None else []
        report.parts = parts(model, headers, {tensor: tensor for tensor in stored})
        if tensors is not None:
            expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            check_tensors(Path(report.path), tensors, expected, head=config.names.head)
            _check_head(report, config, tensors)


def inspect_encoder(report: Inspection, folder: Path, headers: Mapping[str, Header]) -> None:
    """Describe an encoder or encoder-decoder, which transformers implements.

    Raises:
        InputError: transformers cannot read its config or tokenizer.
    """
    pretrained = read_pretrained(folder)
    config = pretrained.config
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    report.model = ModelFacts(
        model_type=config.model_type,
        architecture=(config.architectures or [None])[0],
        runs_by="transformers, by recipe classify",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        rows=config.vocab_size,
        context=pretrained.positions,
        window=None,
        layer_types={},
        rope={},
        experts=None,
        tied=bool(config.tie_word_embeddings),
        quantization=None,
    )
    report.targets = targets(model)
    # A model with a head has the encoder under a name, such as `bert`.
    parameters = {name for name, _ in model.named_parameters()}
    inner = {name: name.partition(".")[2] for name in headers}
    report.parts = parts(model, headers, {name: name if name in parameters else inner[name] for name in headers})


def _facts(config: ModelConfig) -> ModelFacts:
    source = config.source
    text = source["text_config"] if isinstance(source.get("text_config"), dict) else source
    kinds = Counter(map(str, text.get("layer_types") or []))
    architectures = source.get("architectures") or [None]
    experts = next(
        (text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None
    )
    return ModelFacts(
        model_type=config.model_type,
        architecture=architectures[0],
        runs_by="lit-lora's decoder",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        rows=config.vocab_size,
        context=config.max_position_embeddings,
        window=config.sliding_window,
        layer_types=dict(kinds) if len(kinds) > 1 else {},
        rope=_rope(config),
        experts=experts,
        tied=config.tie_word_embeddings,
        quantization=quantization_method(source),
    )


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Type and base of the rotary embedding, and the settings of its type."""
    rope = config.rope.model_dump(exclude_unset=True, exclude_none=True)
    if config.rope.rope_type == "default":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    return rope


def _check_head(report: Inspection, config: ModelConfig, tensors: Tensors) -> None:
    """Note a stored head that is not the embedding, though the config ties the two."""
    head, embedding = f"{config.names.head}.weight", f"{config.names.embedding}.weight"
    if not config.tie_word_embeddings or head not in tensors.names():
        return
    # Pages of mapped files: only those of the compared rows are read.
    first, second = (tensors.read(name)[:_COMPARED_ROWS] for name in (head, embedding))
    if not torch.equal(first, second):
        report.warn(
            "config.json ties the head to the embedding, but the stored head differs and is ignored",
            hint="lit-lora convert keeps both, untied",
        )
