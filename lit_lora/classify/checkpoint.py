"""Checkpoints of transformers' encoders and encoder-decoders: tokenizer, weights and head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_lora.classify.task import Kind, Task
from lit_lora.data.labeled import Tokens
from lit_lora.data.padded import Layout
from lit_lora.errors import InputError, UsageError, first_line
from lit_lora.files import read_json
from lit_lora.hf import is_decoder, quiet

__all__ = ["Pretrained", "head_of", "is_encoder", "load_with_head", "read_pretrained"]

# Types that number positions from the padding token's id + 1, so that fewer tokens fit than there are positions.
_COUNTED_FROM_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm"}
_DEFAULT_ROW_TOKENS = 512  # of a model with relative positions, which has no limit of its own


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint folder before its weights are read."""

    folder: Path
    config: Any
    """transformers' configuration."""
    tokenizer: Any
    """transformers' tokenizer."""

    @property
    def writes_text(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(self.config.is_encoder_decoder)

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens in a row, of input or target; ``None`` if positions are relative."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None:
            return None
        unused = self.config.pad_token_id + 1 if self.config.model_type in _COUNTED_FROM_PADDING else 0
        return min(int(positions) - unused, int(self.tokenizer.model_max_length))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that its config names, by id; empty if it has only transformers' placeholders."""
        names = [str(self.config.id2label[number]) for number in sorted(self.config.id2label)]
        placeholders = [f"LABEL_{number}" for number in range(len(names))]
        return () if names == placeholders else tuple(names)

    def kind(self, asked: str) -> Kind:
        """What the model can be trained to predict, if ``asked`` is ``auto``; else what was asked.

        Raises:
            UsageError: The model cannot do what was asked.
        """
        if (asked == "seq2seq") != self.writes_text and asked != "auto":
            what = "writes texts: it needs seq2seq" if self.writes_text else "is an encoder: it cannot write texts"
            raise UsageError(f"data.task: {asked}, but {self.folder} ({self.config.model_type}) {what}")
        if self.writes_text:
            return "seq2seq"
        if asked == "regression":
            return "regression"
        predicts_number = self.config.problem_type == "regression" or self.config.num_labels == 1
        return "regression" if asked == "auto" and predicts_number else "classification"

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_tokens: int | None) -> list[Tokens]:
        """Ids and token types of each text, or of each pair of texts.

        Args:
            texts: The texts.
            pairs: The second text of each, or ``None``.
            max_tokens: Where to cut a row, from the longer text of a pair; never when omitted.
        """
        cut = {"truncation": "longest_first", "max_length": max_tokens} if max_tokens else {"truncation": False}
        with quiet():
            encoded = self.tokenizer(
                list(texts),
                None if pairs is None else list(pairs),
                return_attention_mask=False,
                return_token_type_ids=True,
                **cut,
            )
        return [
            (np.array(ids, dtype=np.int32), np.array(types, dtype=np.int32))
            for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        ]

    def row_tokens(self, asked: int | None) -> int:
        """Maximum number of tokens in a row: as asked for, else as many as the model has positions.

        Raises:
            UsageError: More are asked for than the model has positions.
        """
        positions = self.positions
        if asked is not None and positions is not None and asked > positions:
            raise UsageError(f"data.max_seq_length: {asked}, but {self.folder} has positions for {positions} tokens")
        return asked or positions or _DEFAULT_ROW_TOKENS

    def target_tokens(self, asked: int) -> int:
        """Maximum number of tokens in a text that the model writes: as asked for, but at most as many as positions."""
        return min(asked, self.positions or asked)

    @property
    def layout(self) -> Layout:
        """How rows are padded for this model.

        Raises:
            InputError: The tokenizer has no padding token, or the decoder no first token.
        """
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise InputError(
                f"{self.folder}: the tokenizer has no padding token", hint="set pad_token in its tokenizer_config.json"
            )
        if self.writes_text and self.config.decoder_start_token_id is None:
            raise InputError(
                f"{self.folder}: config.json has no decoder_start_token_id, the first token of the decoder",
                hint="add it: the end-of-text token for mBART and NLLB, the padding token for T5 and Pegasus",
            )
        has_types = getattr(self.config, "type_vocab_size", 0) > 1
        return Layout(pad, has_types, self.config.decoder_start_token_id if self.writes_text else None)


def read_pretrained(folder: Path) -> Pretrained:
    """Read the configuration and the tokenizer of a checkpoint folder.

    Raises:
        InputError: The folder is not that of an encoder or encoder-decoder that transformers knows.
    """
    folder = Path(folder)
    config = _read_config(folder)
    transformers = _transformers()
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a dozen tokenizer formats raise almost anything
        reason = first_line(error)[:160]
        if "contains custom code" in reason or "references custom code" in reason:
            raise _needs_code(f"{folder}: its tokenizer") from error
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason}") from error
    return Pretrained(folder, config, tokenizer)


def is_encoder(folder: Path) -> bool:
    """Whether a folder is a checkpoint for recipe classify: an encoder or encoder-decoder, by its config.json."""
    try:
        config = _read_config(folder)
    except InputError:
        return False
    masked = _transformers().models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    return bool(config.is_encoder_decoder) or type(config) in masked


def load_with_head(
    shape: Pretrained, task: Task, *, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """The model with a head for the task, initialized at random unless the checkpoint has that very head.

    Returns:
        The model, and the names of the modules that were initialized at random.

    Raises:
        InputError: The weights cannot be read, or more than a head is missing.
    """
    config = type(shape.config).from_dict({**shape.config.to_dict(), **task.config})
    try:
        with quiet():
            model, loading_info = _class(config).from_pretrained(
                shape.folder,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{shape.folder}: its weights cannot be read: {first_line(error)[:160]}",
            hint="only safetensors are read; lit-lora download fetches models with them",
        ) from error

    missing = [*loading_info["missing_keys"], *(entry[0] for entry in loading_info["mismatched_keys"])]
    initialized = sorted({name.rpartition(".")[0] for name in missing})
    # Only a head, and the pooler before it, may be missing: pretraining did not need them.
    replaceable: set[str] = set()
    if task.kind != "seq2seq":
        replaceable = {*_outside_encoder(model), *(name for name in initialized if "pooler" in name)}
    broken = [name for name in initialized if not _within(name, replaceable)]
    if broken:
        raise InputError(
            f"{shape.folder}: weights are missing or of another shape: {len(broken)} modules, such as {broken[0]}",
            hint="the checkpoint is incomplete, or its config.json belongs to another model",
        )
    model.to(device).eval()
    return model, initialized


def head_of(model: nn.Module, initialized: Sequence[str], task: Task) -> list[str]:
    """Names of the modules to train in full beside any method: those after the encoder, and new ones within it."""
    if task.kind == "seq2seq":
        return []
    outside = _outside_encoder(model)
    inside = [name for name in initialized if not _within(name, outside)]
    return list(dict.fromkeys([*inside, *outside]))


def _outside_encoder(model: Any) -> list[str]:
    """Names of the model's children with parameters, other than the encoder."""
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _class(config: Any) -> Any:
    """The class of transformers that has the head for a configuration; ``None`` if there is none."""
    auto = _transformers().models.auto.modeling_auto
    if config.is_encoder_decoder:
        return auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    return auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)


def _read_config(folder: Path) -> Any:
    """Transformers' configuration of a checkpoint folder.

    Raises:
        InputError: The folder is not that of an encoder or encoder-decoder that transformers knows.
    """
    if not (folder / "config.json").is_file():
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}, expected a checkpoint folder", hint="lit-lora download fetches a model")
    data = read_json(folder / "config.json")
    if "model_type" not in data:
        raise InputError(f"{folder / 'config.json'}: names no model_type")
    kind = str(data["model_type"])
    transformers = _transformers()
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in data:
            raise _needs_code(f"{folder}: model_type {kind!r}")
        raise InputError(f"{folder}: model_type {kind!r} is not known to transformers {transformers.__version__}")
    try:
        with quiet():
            config = transformers.CONFIG_MAPPING[kind].from_dict(_without_code(data), name_or_path=str(folder))
    except Exception as error:  # every model type has checks of its own, which raise almost anything
        raise InputError(f"{folder / 'config.json'}: cannot be read: {first_line(error)[:160]}") from error
    if is_decoder(config):
        raise InputError(
            f"{folder}: a decoder ({kind}), but recipe classify is for encoders and encoder-decoders",
            hint="with recipe lora a decoder learns the label as its answer: columns: {prompt: …, completion: label}",
        )
    if _class(config) is None:
        raise InputError(
            f"{folder}: transformers has no classification head for model_type {kind!r}, and it is not an "
            "encoder-decoder of texts",
            hint="use a model such as BERT, RoBERTa, DeBERTa, ELECTRA, DistilBERT or T5",
        )
    return config


def _without_code(data: Any) -> Any:
    """A config.json without the keys that name Python code or kernels to download and run.

    At every depth, because a model made of others opens these by AutoModel, which asks about their code again.
    """
    if isinstance(data, dict):
        return {
            key: _without_code(value)
            for key, value in data.items()
            if key != "auto_map" and not key.endswith("_implementation")
        }
    if isinstance(data, list):
        return [_without_code(value) for value in data]
    return data


def _needs_code(what: str) -> InputError:
    return InputError(
        f"{what} needs Python code from the checkpoint (auto_map), which lit-lora never runs",
        hint="use a checkpoint of a type that is built into transformers, such as bert, roberta, deberta-v2 or t5",
    )


def _transformers() -> Any:
    """The library, which takes seconds to import: only when a model of its is opened."""
    import transformers  # noqa: PLC0415
    import transformers.models.auto.modeling_auto  # noqa: PLC0415

    return transformers
