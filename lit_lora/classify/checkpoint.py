"""Checkpoints of transformers' encoders and encoder-decoders: their tokenizer, their weights, their head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_lora.classify.task import Kind, Task
from lit_lora.data.labelled import Tokens
from lit_lora.data.padded import Layout
from lit_lora.errors import InputError, UsageError
from lit_lora.files import read_json
from lit_lora.model.families import FAMILIES

__all__ = ["Pretrained", "head_of", "is_encoder", "load_with_head", "read_pretrained"]

# Whose positions are counted from behind the padding token's id: so many fewer tokens fit than there are positions.
_COUNTED_FROM_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm"}
_UNLIMITED = 512  # tokens of a row where positions are relative: no limit, but a habit


@dataclass(frozen=True)
class Pretrained:
    """What a checkpoint folder says before its weights are read."""

    folder: Path
    config: Any
    """transformers' configuration."""
    tokenizer: Any
    """transformers' tokenizer."""

    @property
    def writes_text(self) -> bool:
        """An encoder-decoder."""
        return bool(self.config.is_encoder_decoder)

    @property
    def positions(self) -> int | None:
        """The most tokens of a row; ``None`` where positions are relative."""
        given = getattr(self.config, "max_position_embeddings", None)
        if given is None or self.writes_text:
            return None
        offset = self.config.pad_token_id + 1 if self.config.model_type in _COUNTED_FROM_PADDING else 0
        return min(int(given) - offset, int(self.tokenizer.model_max_length))

    @property
    def known_labels(self) -> tuple[str, ...]:
        """The labels of its config, if it names any."""
        names = [str(self.config.id2label[number]) for number in sorted(self.config.id2label)]
        return () if names == [f"LABEL_{number}" for number in range(len(names))] else tuple(names)

    def kind(self, asked: str) -> Kind:
        """What the model can be trained to say, where ``asked`` leaves it open.

        Raises:
            UsageError: The model cannot do what was asked.
        """
        if (asked == "seq2seq") != self.writes_text and asked != "auto":
            what = "writes texts: it needs seq2seq" if self.writes_text else "is an encoder: it cannot write texts"
            raise UsageError(f"data.task: {asked}, but {self.folder} ({self.config.model_type}) {what}")
        if self.writes_text:
            return "seq2seq"
        number = self.config.problem_type == "regression" or self.config.num_labels == 1
        return "regression" if asked == "regression" or (asked == "auto" and number) else "classification"

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, longest: int | None) -> list[Tokens]:
        """Tokens of each text, or of each pair; the longer of the two is cut where there are more than ``longest``."""
        cut = {"truncation": "longest_first", "max_length": longest} if longest else {"truncation": False}
        with _quiet():
            encoded = self.tokenizer(
                list(texts),
                None if pairs is None else list(pairs),
                return_attention_mask=False,
                return_token_type_ids=True,
                **cut,
            )
        types = encoded["token_type_ids"]
        return [
            (np.array(ids, dtype=np.int32), np.array(of, dtype=np.int32))
            for ids, of in zip(encoded["input_ids"], types, strict=True)
        ]

    def row_tokens(self, asked: int | None) -> int:
        """The most tokens of a row.

        Raises:
            UsageError: More are asked for than the model has positions.
        """
        most = self.positions
        if asked is not None and most is not None and asked > most:
            raise UsageError(f"data.max_seq_length: {asked}, but {self.folder} has positions for {most} tokens")
        return asked or most or _UNLIMITED

    @property
    def layout(self) -> Layout:
        """How it wants its rows.

        Raises:
            InputError: It names no token to pad with.
        """
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise InputError(f"{self.folder}: the tokenizer names no padding token", hint="tokenizer_config.json does")
        types = getattr(self.config, "type_vocab_size", 0) > 1
        return Layout(pad, types, self.config.decoder_start_token_id if self.writes_text else None)


def read_pretrained(folder: Path) -> Pretrained:
    """Read the configuration and the tokenizer of a checkpoint folder.

    Raises:
        InputError: The folder is not one of an encoder or encoder-decoder that transformers knows.
    """
    folder = Path(folder)
    config = _read_config(folder)
    transformers = _transformers()
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # of the file formats of a dozen tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "contains custom code" in reason or "references custom code" in reason:
            raise _needs_code(f"{folder}: its tokenizer") from error
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason[:160]}") from error
    return Pretrained(folder, config, tokenizer)


def is_encoder(folder: Path) -> bool:
    """Whether a checkpoint's config.json is of an encoder or encoder-decoder: one for recipe classify."""
    try:
        config = _read_config(folder)
    except InputError:
        return False
    masked = _transformers().models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    return bool(config.is_encoder_decoder) or type(config) in masked


def load_with_head(
    shape: Pretrained, task: Task, *, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """The model with a head for the task; a head that the checkpoint lacks, or has for others, starts at random.

    Returns:
        The model, and the names of the modules that started at random.

    Raises:
        InputError: The weights cannot be read, or lack more than a head.
    """
    config = type(shape.config).from_dict({**shape.config.to_dict(), **task.config})
    try:
        with _quiet():
            model, found = _class(config).from_pretrained(
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{shape.folder}: its weights cannot be read: {reason[:160]}",
            hint="safetensors are read; lit-lora download takes the model from the Hub with them",
        ) from error
    lacking = [*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])]
    fresh = sorted({name.rpartition(".")[0] for name in lacking})
    head = {*_outside(model), *(name for name in fresh if "pooler" in name)} if task.kind != "seq2seq" else set()
    broken = [name for name in fresh if not any(f"{name}.".startswith(f"{root}.") for root in head)]
    if broken:
        raise InputError(
            f"{shape.folder}: weights are missing or of another shape: {len(broken)} modules, such as {broken[0]}",
            hint="the checkpoint is incomplete, or its config.json is of another model",
        )
    model.to(device).eval()
    return model, fresh


def head_of(model: nn.Module, fresh: Sequence[str], task: Task) -> list[str]:
    """The modules that must train whole with whatever else trains: those behind the encoder, and what is new in it."""
    if task.kind == "seq2seq":
        return []
    roots = _outside(model)
    inside = [name for name in fresh if not any(f"{name}.".startswith(f"{root}.") for root in roots)]
    return [*dict.fromkeys([*inside, *roots])]


def _outside(model: Any) -> list[str]:
    """The children with parameters beside the encoder."""
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _class(config: Any) -> Any:
    """Transformers' class with the head for a configuration; ``None`` without one."""
    auto = _transformers().models.auto.modeling_auto
    table = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder
        else auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    return table.get(type(config), None)


def _read_config(folder: Path) -> Any:
    """Transformers' configuration of a checkpoint folder.

    Raises:
        InputError: The folder is not one of an encoder or encoder-decoder that transformers knows.
    """
    if not (folder / "config.json").is_file():
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}, expected a checkpoint folder", hint="lit-lora download fetches a model")
    data = read_json(folder / "config.json")
    if "model_type" not in data:
        raise InputError(f"{folder / 'config.json'}: names no model_type")
    kind = str(data["model_type"])
    if kind in FAMILIES:
        raise InputError(
            f"{folder}: a decoder ({kind}); recipe classify is for encoders and encoder-decoders",
            hint="recipe: lora learns the label as an answer: columns: {prompt: …, completion: label}",
        )
    transformers = _transformers()
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in data:
            raise _needs_code(f"{folder}: model_type {kind!r}")
        raise InputError(f"{folder}: model_type {kind!r} is not known to transformers {transformers.__version__}")
    try:
        with _quiet():
            config = transformers.CONFIG_MAPPING[kind].from_dict(_without_code(data), name_or_path=str(folder))
    except Exception as error:  # of the checks of a hundred models
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / 'config.json'}: cannot be read: {reason[:160]}") from error
    if _class(config) is None:
        raise InputError(
            f"{folder}: transformers has no classification head for model_type {kind!r}, nor is it an encoder-decoder "
            "of texts",
            hint="BERT, RoBERTa, DeBERTa, ELECTRA, DistilBERT, T5 and many others have one",
        )
    return config


def _without_code(data: Any) -> Any:
    """A config.json without the keys by which it names Python code or kernels to fetch and run.

    At every depth: a model made of others opens these by AutoModel, which then asks about their code again.
    """
    if isinstance(data, dict):
        return {
            key: _without_code(value)
            for key, value in data.items()
            if key != "auto_map" and not key.endswith("_implementation")
        }
    return [_without_code(value) for value in data] if isinstance(data, list) else data


def _needs_code(what: str) -> InputError:
    return InputError(
        f"{what} needs Python code from the checkpoint (auto_map), which lit-lora never runs",
        hint="use a checkpoint of a type built into transformers, such as bert, roberta, deberta-v2 or t5",
    )


def _transformers() -> Any:
    """The library, which takes seconds to import: only once a model of it is opened."""
    import transformers  # noqa: PLC0415
    import transformers.models.auto.modeling_auto  # noqa: PLC0415

    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own messages and bars: what matters of them is said here."""
    logging = _transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
