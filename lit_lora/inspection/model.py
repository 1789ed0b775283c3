"""The model that a ``config.json`` describes, and whether the stored tensors are its."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_lora.checkpoint.headers import Header
from lit_lora.checkpoint.load import empty_model, stored_shapes
from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.checkpoint.tensors import Tensors, check_tensors
from lit_lora.classify import read_pretrained
from lit_lora.hf import HostedConfig, config_from_hf
from lit_lora.hf.config import UNLIMITED
from lit_lora.inspection.parts import parts, targets
from lit_lora.inspection.report import Inspection, ModelFacts
from lit_lora.model import ModelConfig
from lit_lora.model.config import text_part
from lit_lora.model.quantization import quantization_method

__all__ = ["inspect_encoder", "inspect_model"]

# Rows of a stored head that are compared with the embedding's: few, to read no more than a page of each.
_COMPARED_ROWS = 8
# Keys of the number of experts per layer, by family.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
        config = config_from_hf(data, name=name)
        report.model = _facts(config)
        model = empty_model(config)
        report.targets = targets(model)
        report.parts = parts(model, {}, {})  # until the stored tensors have turned out to be the model's
        if tensors is None:
            return
        if isinstance(tensors, StoredTensors):
            stored = StoredParameters(Path(name).parent, model, tensors)
            parameter_of = {tensor: each.parameters[0] for each in stored.conversions for tensor in each.stored}
            report.parts = parts(model, headers, parameter_of)
            tensors = stored
        check_tensors(Path(report.path), tensors, stored_shapes(model), head=config.names.head)
        _check_head(report, config, tensors)


def inspect_encoder(report: Inspection, folder: Path, headers: Mapping[str, Header]) -> None:
    """Describe an encoder or encoder-decoder, which transformers implements.

    Raises:
        InputError: transformers cannot read its config or tokenizer.
    """
    import transformers  # noqa: PLC0415 - takes seconds, and decoders of our own do not need it

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
    text = text_part(source)
    hosted = isinstance(config, HostedConfig)
    layer_types = Counter(map(str, text.get("layer_types") or []))
    unlimited = hosted and config.max_position_embeddings == UNLIMITED
    return ModelFacts(
        model_type=config.model_type,
        architecture=(source.get("architectures") or [None])[0],
        runs_by="transformers' model, hosted by lit-lora" if hosted else "lit-lora's decoder",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        rows=config.vocab_size,
        context=None if unlimited else config.max_position_embeddings,
        window=text.get("sliding_window") if hosted else config.sliding_window,
        layer_types=dict(layer_types) if len(layer_types) > 1 else {},
        rope=_stored_rope(text) if hosted else _rope(config),
        experts=next((text[key] for key in _EXPERTS if text.get(key)), None),
        tied=config.tie_word_embeddings,
        quantization=quantization_method(source),
    )


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Type and base of the rotary embedding, and the settings of its type."""
    rope = config.rope.model_dump(exclude_unset=True, exclude_none=True)
    if config.rope.rope_type == "default":
        rope = {"rope_type": "default", "rope_theta": config.rope.rope_theta}
    return rope


def _stored_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of the rotary embedding, in transformers' newer or older keys."""
    older = {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
    rope = text.get("rope_parameters") or older
    return {key: value for key, value in rope.items() if value is not None}


def _check_head(report: Inspection, config: ModelConfig, tensors: Tensors) -> None:
    """Note a stored head that is not the embedding, though the config ties the two."""
    head, embedding = f"{config.names.head}.weight", f"{config.names.embedding}.weight"
    if not config.tie_word_embeddings or not {head, embedding} <= set(tensors.names()):
        return
    # Pages of mapped files: only those of the compared rows are read.
    first, second = (tensors.read(name)[:_COMPARED_ROWS] for name in (head, embedding))
    if not torch.equal(first, second):
        report.warn(
            "config.json ties the head to the embedding, but the stored head differs: it is used, untied",
            hint='set "tie_word_embeddings": false in config.json, which some programs go by',
        )
