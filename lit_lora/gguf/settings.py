"""How parts of ``config.json`` are stored in GGUF's metadata, each with its inverse.

Every class here reads its part out of a :class:`GGUFFile` into a config, and writes it from a config into metadata. A
config is the dictionary that transformers makes of its own class: rope settings are in ``rope_parameters``. Metadata
keys are without the architecture's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from lit_lora.errors import InputError
from lit_lora.gguf.file import GGUFFile, dequantize, shortest

__all__ = [
    "Constant",
    "Fixed",
    "HeadSize",
    "HeldBy",
    "Layers",
    "Number",
    "Rope",
    "Setting",
    "number_of_heads",
    "rope_tensors",
    "values_of",
]

Config = dict[str, Any]

_NO_DEFAULT: Any = object()

_YARN_LOG = 0.1  # YaRN scales attention by 1 + 0.1 · ln(factor)


class Setting(Protocol):
    """A part of the config."""

    def read(self, file: GGUFFile, config: Config) -> None:
        """Add this part to ``config``, which has those before it.

        Raises:
            InputError: The metadata lacks it, or has it in a form that cannot be represented.
        """

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """Add this part of ``config`` to ``metadata``.

        Raises:
            InputError: llama.cpp cannot represent it.
        """


@dataclass(frozen=True)
class Number:
    """A number, or another single value, under a metadata key.

    Attributes:
        name: The config's key; ``outer.inner`` for a key of a nested object.
        key: The metadata key.
        kind: int, float or bool.
        default: The value where the file has no such key, or a function of the config that gives it. Without a
            default, the key must be there.
        zero_is_none: Whether 0 in the file stands for ``None``.
    """

    name: str
    key: str
    kind: type = int
    default: Any = _NO_DEFAULT
    zero_is_none: bool = False

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        if self.zero_is_none and not file.get(self.key):
            _put(config, self.name, None)
        elif file.get(self.key) is None and self.default is not _NO_DEFAULT:
            _put(config, self.name, _default(self.default, config))
        elif self.kind is int:
            _put(config, self.name, file.number(self.key))
        elif self.kind is float:
            _put(config, self.name, file.decimal(self.key))
        elif isinstance(file.get(self.key), self.kind):
            _put(config, self.name, file.get(self.key))
        else:
            raise file.wrong(self.key, f"a {self.kind.__name__}")

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        value = _find(config, self.name)
        if value is None:
            value = None if self.default is _NO_DEFAULT else _default(self.default, config)
        if value is None and self.zero_is_none:
            value = 0
        if value is not None:
            metadata[self.key] = self.kind(value)


def _default(default: Any, config: Mapping[str, Any]) -> Any:
    return default(config) if callable(default) else default


def _put(config: Config, name: str, value: Any) -> None:
    """Set ``name``, or ``outer.inner`` within a nested object."""
    outer, _, inner = name.rpartition(".")
    (config.setdefault(outer, {}) if outer else config)[inner] = value


def _find(config: Mapping[str, Any], name: str) -> Any:
    outer, _, inner = name.rpartition(".")
    return (config[outer] if outer else config).get(inner)


@dataclass(frozen=True)
class Fixed:
    """A value that the architecture implies, so that the metadata does not mention it."""

    name: str
    value: Any

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        _put(config, self.name, self.value)

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        value = _find(config, self.name)
        if value != self.value:
            raise InputError(f"{self.name}: {value!r} cannot be stored in GGUF, llama.cpp expects {self.value!r}")


@dataclass(frozen=True)
class Constant:
    """A metadata key that llama.cpp expects, and whose value transformers has built in.

    Attributes:
        key: The metadata key.
        value: Its value, or a function of the config that gives it.
    """

    key: str
    value: Any

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        expected = _default(self.value, config)
        stored = file.get(self.key)
        if stored is not None and (shortest(stored) if isinstance(stored, float) else stored) != expected:
            raise file.wrong(self.key, repr(expected))

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        metadata[self.key] = _default(self.value, config)


@dataclass(frozen=True)
class HeldBy:
    """A switch that the tensors tell: it is on if the first layer, or the model, has one of these.

    Attributes:
        name: The config's key.
        tensor: llama.cpp's name, of a layer without ``blk.N.``.
        on: The value if the tensor is there.
        off: The value if it is not.
    """

    name: str
    tensor: str
    on: Any = True
    off: Any = False

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        there = any(name == self.tensor or name.endswith(f".{self.tensor}") for name in file.tensors)
        config[self.name] = self.on if there else self.off

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """Nothing: the tensors tell."""


def values_of(config: PretrainedConfig) -> dict[str, Any]:
    """What ``write`` takes: the values of transformers' config, under their other names, too."""
    values = config.to_dict()
    return values | {other: values[name] for other, name in config.attribute_map.items() if name in values}


def number_of_heads(config: Mapping[str, Any]) -> int:
    """The number of query heads, the default of the number of key-value heads."""
    return int(config["num_attention_heads"])


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


class HeadSize:
    """``head_dim``, of families that have it. Others' is the width by the heads."""

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        size = file.number("attention.key_length", _head_size(config))
        if file.number("attention.value_length", size) != size:
            raise file.wrong("attention.value_length", f"{size}, as attention.key_length is")
        config["head_dim"] = size

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        metadata["attention.key_length"] = metadata["attention.value_length"] = _head_size(config)


@dataclass(frozen=True)
class Layers:
    """Which layers attend within a sliding window only.

    Attributes:
        period: Every how many layers one attends fully, where the file does not say.
        listed: Whether llama.cpp reads the list of layers for this architecture; else the period is built in.
    """

    period: int
    listed: bool = False

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        window = file.get("attention.sliding_window")
        count = config["num_hidden_layers"]
        pattern = file.get("attention.sliding_window_pattern")
        if not window:
            sliding = [False] * count
        elif isinstance(pattern, list):
            sliding = pattern[:count]
        else:
            sliding = self._sliding(count, pattern or self.period)
        config["sliding_window"] = window or None
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        types = config["layer_types"]
        sliding = [kind == "sliding_attention" for kind in types]
        if not any(sliding):
            return
        metadata["attention.sliding_window"] = config["sliding_window"]
        if self.listed:
            metadata["attention.sliding_window_pattern"] = sliding
        elif sliding != self._sliding(len(types), self.period):
            raise InputError(
                f"layer_types: cannot be stored in GGUF, llama.cpp expects full attention every {self.period} layers"
            )

    @staticmethod
    def _sliding(count: int, period: int) -> list[bool]:
        return [(index + 1) % period != 0 for index in range(count)]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, scaling, and the part of a head that turns.

    Attributes:
        partial: Whether the family may turn only part of a head.
        local_base: The base of layers with a sliding window, where theirs differs; 0.0 for the same base without the
            scaling. ``None`` for families whose layers share all settings.
        truncate: ``False`` where YaRN's boundaries are not rounded to whole dimensions.
    """

    partial: bool = False
    local_base: float | None = None
    truncate: bool = True

    def read(self, file: GGUFFile, config: Config) -> None:
        """See :class:`Setting`."""
        base = file.decimal("rope.freq_base", 10000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base} | _read_scaling(file, base)
        if not self.truncate and rope["rope_type"] == "yarn":
            rope["truncate"] = False
        if rope["rope_type"] == "longrope":
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if self.partial:
            size = _head_size(config)
            rope["partial_rotary_factor"] = file.number("rope.dimension_count", size) / size
        if self.local_base is not None:
            local = file.decimal("rope.freq_base_swa", self.local_base or base)
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        config["rope_parameters"] = rope

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        rope = config["rope_parameters"]
        if self.local_base is not None:
            metadata["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
            rope = rope["full_attention"]
        metadata["rope.freq_base"] = float(rope["rope_theta"])
        part = rope.get("partial_rotary_factor") or 1.0
        metadata["rope.dimension_count"] = int(_head_size(config) * part)
        _write_scaling(rope, metadata, config["max_position_embeddings"])


def _read_scaling(file: GGUFFile, base: float) -> dict[str, Any]:
    """The scaling of positions, as ``rope_parameters``; empty if there is none."""
    if "rope_freqs.weight" in file.tensors:
        factors = dequantize(file.tensors["rope_freqs.weight"], torch.float32).double().numpy()
        return _llama3_scaling(file, factors, base)
    if "rope_factors_long.weight" in file.tensors:
        return _longrope_scaling(file)
    kind = file.get("rope.scaling.type") or "none"
    factor = file.decimal("rope.scaling.factor", file.decimal("rope.scale_linear", 1.0))
    if kind == "none" and factor in (0.0, 1.0):
        return {}
    if kind in ("linear", "none"):  # old files give a factor without a type
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise InputError(f"{file.path}: rope scaling {kind!r} is not supported, expected none, linear or yarn")
    return _yarn_scaling(file, factor)


def _yarn_scaling(file: GGUFFile, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if file.get("rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = file.number("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if file.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = file.decimal(f"rope.scaling.yarn_{name}")
    if file.get("rope.scaling.yarn_log_multiplier") is not None:
        # llama.cpp has one number for DeepSeek's two, which are equal in its models.
        scale = shortest(file.decimal("rope.scaling.yarn_log_multiplier") / _YARN_LOG)
        scaling |= {"mscale": scale, "mscale_all_dim": scale}
    if file.get("rope.scaling.attn_factor") is not None:
        # llama.cpp multiplies YaRN's default factor by this one; in Hugging Face it replaces the default.
        default = _YARN_LOG * math.log(factor) + 1
        scaling["attention_factor"] = file.decimal("rope.scaling.attn_factor") * default
    return scaling


def _longrope_scaling(file: GGUFFile) -> dict[str, Any]:
    factors = {}
    for name in ("long", "short"):
        stored = file.tensors.get(f"rope_factors_{name}.weight")
        if stored is None:
            raise InputError(f"{file.path}: tensor rope_factors_{name}.weight is missing")
        factors[f"{name}_factor"] = [shortest(value) for value in dequantize(stored, torch.float32).tolist()]
    original = file.number("rope.scaling.original_context_length")
    return {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}


def _llama3_scaling(file: GGUFFile, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3's rope scaling, from the frequency divisors that llama.cpp stores.

    The divisor of a frequency is 1 up to one wavelength, ``factor`` beyond another, and blends between the two:
    ``1 / divisor = (1 - s) / factor + s``, with ``s = (original / wavelength - low) / (high - low)``.
    Scaling ``original``, ``low`` and ``high`` together changes nothing, so ``low`` is taken as 1.
    """
    factor = shortest(float(factors.max()))
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    candidates = [(8192, 4.0)]  # original and high, as Llama 3 itself has them
    between = (factors > 1 + 1e-4) & (factors < factor - 1e-4)
    if between.sum() >= 2:
        # Where the divisor blends, s is a straight line over 1 / wavelength: its slope is original / (high - 1), its
        # intercept -1 / (high - 1).
        blend = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(1 / wavelength[between], blend, 1)
        high = 1 - 1 / intercept
        candidates.append((round(float(slope * (high - 1))), shortest(round(float(high), 3))))

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
    raise InputError(
        f"{file.path}: the rope factors in rope_freqs.weight are not those of Llama 3, which is not supported"
    )


def _write_scaling(rope: Mapping[str, Any], metadata: dict[str, Any], context: int) -> None:
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = kind
        metadata["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        metadata["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                metadata[f"rope.scaling.yarn_{name}"] = float(rope[name])
        if rope.get("mscale") != rope.get("mscale_all_dim"):
            raise InputError("mscale: GGUF has one number for mscale and mscale_all_dim, expected them to be equal")
        if rope.get("mscale_all_dim"):
            metadata["rope.scaling.yarn_log_multiplier"] = _YARN_LOG * rope["mscale_all_dim"]
        if rope.get("attention_factor") is not None:
            default = _YARN_LOG * math.log(rope["factor"]) + 1
            metadata["rope.scaling.attn_factor"] = rope["attention_factor"] / default
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = original
        metadata["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(context / original) / math.log(original))
    if kind == "dynamic":
        raise InputError("rope_type: 'dynamic' cannot be stored in GGUF")


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that hold rope's scaling where metadata does not, by llama.cpp's name; float32, (rotated / 2,)."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    if kind != "llama3":
        return {}
    size = _head_size(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((rope["original_max_position_embeddings"] / wavelength - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - blend) / rope["factor"] + blend)).float()}
