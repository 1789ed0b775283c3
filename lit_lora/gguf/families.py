"""The table of families: what llama.cpp calls each architecture, its tensors and its settings, in both directions.

Tensor names come from the ``gguf`` library, :func:`gguf.get_tensor_name_map`; a family lists only the tensors that are
renamed otherwise or stored in another form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap

from lit_lora.errors import InputError
from lit_lora.gguf.file import GGUFFile
from lit_lora.gguf.ops import ONE_ADDED, SAME, TensorOp, in_pairs
from lit_lora.gguf.settings import Fixed, HeadSize, HeldBy, Layers, Number, Rope, Setting, number_of_heads

__all__ = ["FAMILIES", "Family", "Place", "Rule", "family_of"]


@dataclass(frozen=True)
class Rule:
    """How the tensors with some names are stored.

    Attributes:
        pattern: Of whole Hugging Face names. A group ``index`` says which entry of a stacked tensor it is.
        op: What becomes of the tensor.
        names: Names to look up in its place, with the groups of ``pattern``; those that begin with ``blk.`` are
            llama.cpp's own.
    """

    pattern: str
    op: TensorOp = SAME
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where GGUF keeps one Hugging Face tensor.

    Attributes:
        names: llama.cpp's names of the tensors that hold it.
        op: What became of it.
        index: The entry of the outermost dimension of a stacked tensor.
    """

    names: tuple[str, ...]
    op: TensorOp = SAME
    index: int | None = None


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers in GGUF.

    Attributes:
        model_type: As in ``config.json``.
        arch: llama.cpp's architecture.
        settings: The config, part by part.
        rules: Tensors that are not stored under the library's name as they are. The first that fits counts.
        fits: Whether a file of this architecture is of this family, where several share it.
    """

    model_type: str
    arch: MODEL_ARCH
    settings: tuple[Setting, ...]
    rules: tuple[Rule, ...] = ()
    fits: Callable[[GGUFFile], bool] = lambda _: True

    def config(self, file: GGUFFile) -> dict[str, Any]:
        """The settings of a file."""
        config: dict[str, Any] = {"model_type": self.model_type}
        for setting in self.settings:
            setting.read(file, config)
        return config

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a config, with complete keys: the inverse of :meth:`config`."""
        metadata: dict[str, Any] = {}
        for setting in self.settings:
            setting.write(config, metadata)
        name = MODEL_ARCH_NAMES[self.arch]
        return {f"{name}.{key}": value for key, value in metadata.items()}

    def place(self, name: str, layers: int) -> Place | None:
        """Where a tensor is kept; ``None`` if llama.cpp has no place for it."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                names = [self._gguf_name(match.expand(new), layers) for new in rule.names or (r"\g<0>",)]
                index = match.groupdict().get("index")
                return _place(names, rule.op, None if index is None else int(index))
        return _place([self._gguf_name(name, layers)], SAME, None)

    def _gguf_name(self, name: str, layers: int) -> str | None:
        if name.startswith("blk."):
            return name
        return _name_map(self.arch, layers).get_name(name, try_suffixes=(".weight", ".bias"))


@cache
def _name_map(arch: MODEL_ARCH, layers: int) -> TensorNameMap:
    return gguf.get_tensor_name_map(arch, layers)


def _place(names: list[str | None], op: TensorOp, index: int | None) -> Place | None:
    known = tuple(name for name in names if name is not None)
    return Place(known, op, index) if len(known) == len(names) else None


def family_of(file: GGUFFile) -> Family:
    """The family of a file.

    Raises:
        InputError: Its architecture is not in the table.
    """
    for family in FAMILIES:
        if MODEL_ARCH_NAMES[family.arch] == file.architecture and family.fits(file):
            return family
    known = ", ".join(sorted({MODEL_ARCH_NAMES[family.arch] for family in FAMILIES}))
    raise InputError(f"{file.path}: architecture {file.architecture!r} is not supported", hint=f"known are {known}")


def _sizes(**renamed: str) -> tuple[Setting, ...]:
    """The counts that all decoders have, under the config's usual keys unless ``renamed``."""
    keys = {
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
    }
    return tuple(Number(renamed.get(name, name), key) for name, key in keys.items())


_GROUPED_HEADS = Number("num_key_value_heads", "attention.head_count_kv", default=number_of_heads)
_RMS_EPS = Number("rms_norm_eps", "attention.layer_norm_rms_epsilon", float)
_SILU = Fixed("hidden_act", "silu")
_USUAL: tuple[Setting, ...] = (*_sizes(), _GROUPED_HEADS, _RMS_EPS)

_QK_IN_PAIRS = (
    Rule(r".*\.q_proj\.(weight|bias)", in_pairs("num_attention_heads")),
    Rule(r".*\.k_proj\.(weight|bias)", in_pairs("num_key_value_heads")),
)
_NORMS_WITH_ONE = (Rule(r".*norm\.weight", ONE_ADDED),)


@dataclass(frozen=True)
class _GemmaQueryScale:
    """``query_pre_attn_scalar``: llama.cpp knows it by the number of layers, the 27B model's is not the head size."""

    layers_of_27b: int

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        config["query_pre_attn_scalar"] = self._scalar(config)

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        Fixed("query_pre_attn_scalar", self._scalar(config)).write(config, metadata)

    def _scalar(self, config: Mapping[str, Any]) -> int:
        if config["num_hidden_layers"] == self.layers_of_27b:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return int(config["head_dim"])


_LLAMA: tuple[Setting, ...] = (*_USUAL, _SILU, HeadSize(), Rope())

FAMILIES: tuple[Family, ...] = (
    Family(
        "mistral",
        MODEL_ARCH.LLAMA,
        (*_LLAMA, Number("sliding_window", "attention.sliding_window")),
        _QK_IN_PAIRS,
        fits=lambda file: bool(file.get("attention.sliding_window")) and not file.get("expert_count"),
    ),
    Family(
        "llama",
        MODEL_ARCH.LLAMA,
        (*_LLAMA, HeldBy("attention_bias", "attn_q.bias"), HeldBy("mlp_bias", "ffn_gate.bias")),
        _QK_IN_PAIRS,
        fits=lambda file: not file.get("expert_count"),
    ),
    Family(
        "gemma3_text",
        MODEL_ARCH.GEMMA3,
        (
            *_USUAL,
            HeadSize(),
            Fixed("hidden_activation", "gelu_pytorch_tanh"),
            _GemmaQueryScale(layers_of_27b=62),
            Number("final_logit_softcapping", "final_logit_softcapping", float, default=None),
            Layers(6),
            Rope(local_base=10000.0),
        ),
        _NORMS_WITH_ONE,
    ),
)
"""Of several families with one architecture, the first that fits counts."""
