"""GGUF files as a source of tensors and config: undoes llama.cpp's names, row order and quantization.

The header is parsed in this module instead of by ``gguf.GGUFReader``, which keeps several numpy arrays per vocabulary
entry (a gigabyte for 128k tokens); ``gguf`` does the dequantization.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from lit_lora.errors import InputError
from lit_lora.model.families import FAMILIES

__all__ = ["ARCHITECTURES", "GGUFReader", "part_number"]

# Supported values of general.architecture. llama.cpp stores Mistral, SmolLM2 and TinyLlama as llama too.
ARCHITECTURES = ("llama",)

# Codes of value types in the metadata; scalars with their format in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# What llama.cpp calls a part -> the part. Its names are the same for all architectures.
_PARTS = {"token_embd": "embedding", "output_norm": "norm", "output": "head"}
_LAYER_PARTS = {
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "attention_out",
    "ffn_gate": "mlp_gate",
    "ffn_up": "mlp_in",
    "ffn_down": "mlp_out",
}
# Computed from the config, so not part of a checkpoint. rope_freqs becomes rope_scaling, see `_rope_scaling`.
_DERIVED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")

# The name of one part of a split file: stem, number of the part, number of parts.
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# Values dequantized at a time, in float32: bounds the memory that a huge tensor needs beyond its result.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class _Stored:
    """Where one tensor is stored: file, offset, quantization and shape (outermost dimension first)."""

    file: Path
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]


class GGUFReader:
    """A GGUF file (or all parts of a split one) as Hugging Face tensors, dequantized on ``read``.

    Args:
        path: The file; of a split file, any part.

    Raises:
        InputError: Not GGUF, truncated, a missing part, or an unsupported architecture or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.files = _parts(self.path)
        self.metadata, stored = _read_header(self.files[0])
        for file in self.files[1:]:
            _, more = _read_header(file)
            stored.update(more)
        self.architecture = str(self.metadata.get("general.architecture", "not named"))
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{self.path}: architecture {self.architecture!r} is not supported, expected one of "
                + ", ".join(map(repr, ARCHITECTURES)),
                hint="Llama 1 to 3.x, Mistral, SmolLM2 and TinyLlama are 'llama'",
            )
        if self.metadata.get("llama.expert_count", 0):
            raise InputError(f"{self.path}: mixtures of experts are not supported")
        self._names = FAMILIES["llama"].names  # Mistral's are the same
        self._rope_factors = stored.get("rope_freqs.weight")
        self._stored = {
            self._hf_name(name): location for name, location in stored.items() if not _DERIVED.fullmatch(name)
        }

    def names(self) -> list[str]:
        """Hugging Face names of all tensors."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds a tensor's values without loss: float16 or bfloat16 as stored, else float32."""
        unquantized = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
        return unquantized.get(self._stored[name].kind, torch.float32)

    def quantizations(self) -> dict[str, int]:
        """Number of tensors by quantization, in alphabetical order."""
        counts = Counter(location.kind.name for location in self._stored.values())
        return dict(sorted(counts.items()))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantized in float32 and rounded once to ``dtype``, in Hugging Face row order.

        Memory: the result (twice for q and k) and about 0.1 GB of temporaries.
        """
        tensor = _dequantize(self._stored[name], dtype or self.dtype(name))
        module = name.rpartition(".")[0]
        if module.endswith(self._names.query):
            return _unpermute(tensor, self._number("attention.head_count"))
        if module.endswith(self._names.key):
            return _unpermute(tensor, self._kv_heads())
        return tensor

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``.

        Raises:
            InputError: A key that a Llama model needs is missing, or its rope scaling is not supported.
        """
        heads = self._number("attention.head_count")
        width = self._number("embedding_length")
        embedding = self._stored.get(f"{self._names.embedding}.weight")
        if embedding is None:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        window = self.metadata.get("llama.attention.sliding_window") and self._number("attention.sliding_window")
        config: dict[str, Any] = {
            "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
            "model_type": "mistral" if window else "llama",
            "vocab_size": embedding.shape[0],
            "hidden_size": width,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads(),
            "head_dim": self._number("attention.key_length", width // heads),
            "hidden_act": "silu",
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._decimal("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": self._number("context_length"),
            "attention_bias": f"{self._names.layers}.0.{self._names.query}.bias" in self._stored,
            "mlp_bias": f"{self._names.layers}.0.{self._names.mlp_gate}.bias" in self._stored,
            "tie_word_embeddings": f"{self._names.head}.weight" not in self._stored,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if window:
            config["sliding_window"] = window
        if "tokenizer.ggml.padding_token_id" in self.metadata:
            config["pad_token_id"] = self.metadata["tokenizer.ggml.padding_token_id"]
        return config

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int) or value < 1:
            what = "is missing" if value is None else f"is {value!r}, expected a number above 0"
            raise InputError(f"{self.path}: metadata key llama.{key} {what}")
        return value

    def _decimal(self, key: str, default: float | None = None) -> float:
        """A float32 of the metadata as the decimal that was meant: 9.999999747378752e-06 is 1e-05."""
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, float):
            what = "is missing" if value is None else f"is {value!r}, expected a decimal number"
            raise InputError(f"{self.path}: metadata key llama.{key} {what}")
        return _shortest(value)

    def _kv_heads(self) -> int:
        return self._number("attention.head_count_kv", self._number("attention.head_count"))

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, module, kind = match.groups() if match else (None, None, None)
        parts = _PARTS if layer is None else _LAYER_PARTS
        if module not in parts:
            raise InputError(f"{self.path}: tensor {name} is not part of a Llama model, so it would be lost")
        prefix = "" if layer is None else f"{self._names.layers}.{layer}."
        return f"{prefix}{getattr(self._names, parts[module])}.{kind}"

    def _rope_scaling(self) -> dict[str, Any] | None:
        if self._rope_factors is not None:
            factors = _dequantize(self._rope_factors, torch.float32).double().numpy()
            return _llama3_scaling(self.path, factors, self._decimal("rope.freq_base", 10000.0))
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        factor = self._decimal("rope.scaling.factor", self._decimal("rope.scale_linear", 1.0))
        if kind == "none" and factor in (0.0, 1.0):
            return None
        if kind in ("linear", "none"):  # old files give a factor without a type
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise InputError(f"{self.path}: rope scaling {kind!r} is not supported, expected none, linear or yarn")
        return self._yarn_scaling(factor)

    def _yarn_scaling(self, factor: float) -> dict[str, Any]:
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if "llama.rope.scaling.original_context_length" in self.metadata:
            scaling["original_max_position_embeddings"] = self._number("rope.scaling.original_context_length")
        if "llama.rope.scaling.attn_factor" in self.metadata:
            # llama.cpp multiplies YaRN's default factor by this one; in Hugging Face it replaces the default.
            default = 0.1 * math.log(factor) + 1
            scaling["attention_factor"] = self._decimal("rope.scaling.attn_factor") * default
        return scaling


def _parts(path: Path) -> list[Path]:
    """All parts of a split file in order, or the file itself."""
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None:
        return [path]
    stem, count = split[1], int(split[3])
    parts = [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(f"{path.parent}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}")
    return parts


def part_number(path: Path) -> int | None:
    """Which part of a split file this is, from 1; ``None`` for a whole file."""
    split = _SPLIT_NAME.fullmatch(path.name)
    return None if split is None else int(split[2])


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _Header(path, file, size).read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


class _Header:
    """The header of one GGUF file, every length checked against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size

    def read(self) -> tuple[dict[str, Any], dict[str, _Stored]]:
        """Metadata by key, and tensors by llama.cpp's name."""
        magic = self.file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file, it starts with {magic!r} and not with b'GGUF'")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported, expected 2 or 3 (little endian)")
        tensor_count = self._scalar("<Q")
        key_count = self._scalar("<Q")
        metadata = {}
        for _ in range(key_count):
            key = self._text()
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]

        # The data begins at the next multiple of the alignment; offsets of tensors count from there.
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise InputError(f"{self.path}: general.alignment is {alignment!r}, expected a number above 0")
        start = -(-self.file.tell() // alignment) * alignment
        stored = {}
        for name, shape, type_number, offset in infos:
            stored[name] = self._located(name, shape, type_number, start + offset)
        return metadata, stored

    def _located(self, name: str, shape: tuple[int, ...], type_number: int, offset: int) -> _Stored:
        """A tensor whose type can be dequantized and whose data is within the file."""
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name}: unknown quantization type {type_number}") from None
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) and kind not in quants._type_traits:
            raise InputError(f"{self.path}: tensor {name}: {kind.name} cannot be dequantized")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise InputError(f"{self.path}: tensor {name}: shape {shape} does not fit {kind.name} blocks of {block}")
        end = offset + math.prod(shape) // block * block_bytes
        if end > self.size:
            raise InputError(
                f"{self.path}: truncated: {self.size} bytes, tensor {name} ends at byte {end}", hint="download it again"
            )
        return _Stored(self.path, offset, kind, shape)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the quantization type, and offset."""
        name = self._text()
        dimensions = min(self._scalar("<I"), 8)  # GGUF allows 4; a damaged number shall not read on for ever
        innermost_first = [self._scalar("<Q") for _ in range(dimensions)]
        type_number = self._scalar("<I")
        offset = self._scalar("<Q")
        return name, tuple(reversed(innermost_first)), type_number, offset

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise InputError(f"{self.path}: truncated or damaged metadata", hint="download it again")
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _text(self) -> str:
        return self._bytes(self._scalar("<Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise InputError(f"{self.path}: damaged metadata: unknown value type {kind}")
        item = self._scalar("<I")
        count = self._scalar("<Q")
        if item in _SCALARS:  # read at once: vocabularies have 100,000 scores
            code = _SCALARS[item].lstrip("<")
            return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(f"<{code}"))))
        return [self._value(item) for _ in range(count)]


def _dequantize(stored: _Stored, dtype: torch.dtype) -> Tensor:
    """A stored tensor's values, dequantized some rows at a time, in llama.cpp's row order."""
    block, block_bytes = GGML_QUANT_SIZES[stored.kind]
    columns = stored.shape[-1]
    rows = math.prod(stored.shape[:-1])
    row_bytes = columns // block * block_bytes
    result = torch.empty((rows, columns), dtype=dtype)
    step = max(1, _CHUNK_VALUES // columns)
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
            with np.errstate(all="ignore"):  # a damaged file may overflow; whoever converts checks the result
                result[start : start + count] = torch.from_numpy(quants.dequantize(data, stored.kind).copy())
    return result.reshape(stored.shape)


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection from llama.cpp's rotary order (pairs side by side) to Hugging Face's (two halves).

    Rotary embedding turns pairs of rows. llama.cpp pairs rows 0 and 1, 2 and 3, …; Hugging Face pairs row i with row
    i + H / 2 of each head.

    Args:
        tensor: Shape (heads * H, …).
        heads: Number of heads in it.
    """
    pairs = tensor.shape[0] // heads // 2
    rows = tensor.reshape(heads, pairs, 2, *tensor.shape[1:])  # (heads, H / 2, 2, …)
    return rows.transpose(1, 2).reshape(tensor.shape)


def _shortest(value: float) -> float:
    """The decimal with the fewest digits that rounds to this float32."""
    return float(str(np.float32(value)))


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3's rope scaling, from the frequency divisors that llama.cpp stores.

    The divisor of a frequency is 1 up to one wavelength, ``factor`` beyond another, and blends between the two:
    ``1 / divisor = (1 - s) / factor + s``, with ``s = (original / wavelength - low) / (high - low)``.
    Scaling ``original``, ``low`` and ``high`` together changes nothing, so ``low`` is taken as 1.
    """
    factor = _shortest(float(factors.max()))
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    candidates = [(8192, 4.0)]  # original and high, as Llama 3 itself has them
    between = (factors > 1 + 1e-4) & (factors < factor - 1e-4)
    if between.sum() >= 2:
        # Where the divisor blends, s is a straight line over 1 / wavelength: its slope is original / (high - 1), its
        # intercept -1 / (high - 1).
        blend = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(1 / wavelength[between], blend, 1)
        high = 1 - 1 / intercept
        candidates.append((round(float(slope * (high - 1))), _shortest(round(float(high), 3))))

    for original, high in candidates:
        blend = np.clip((original / wavelength - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise InputError(f"{path}: the rope factors in rope_freqs.weight are not those of Llama 3, which is not supported")
