"""The decoder's config, with the field names of Hugging Face's ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, Field, model_validator

from lit_lora.config import Settings, did_you_mean, validate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import read_json
from lit_lora.model.families import FAMILIES, Block, DecoderNames
from lit_lora.model.quantization import require_readable, without_quantization

__all__ = [
    "DTYPES",
    "KEEP_DTYPE",
    "Activation",
    "ModelConfig",
    "Rope",
    "text_part",
    "with_fields",
    "with_text_part",
]

Activation = Literal["silu", "swish", "gelu", "gelu_pytorch_tanh"]
"""Of the MLP's gate, by transformers' names. ``swish`` is another name of ``silu``."""

LayerType = Literal["full_attention", "sliding_attention"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The dtypes of weights, by their names in settings and commands."""

KEEP_DTYPE = "keep_dtype"
"""A key of our own in ``config.json``, see :attr:`ModelConfig.keeps_dtype`."""


class Rope(Settings):
    """Rotary position embedding. Source: ``rope_parameters`` of ``config.json``."""

    model_config = ConfigDict(extra="ignore")

    rope_type: str = Field(
        "default", description="Kind of scaling: default, linear, dynamic, yarn, longrope or llama3."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base of the geometric progression of wavelengths.")
    partial_rotary_factor: float = Field(1.0, gt=0, le=1, description="Share of a head's dimensions that are rotated.")
    factor: float | None = Field(None, gt=0, description="Context length relative to pretraining.")
    original_max_position_embeddings: int | None = Field(None, gt=0, description="Context length in pretraining.")
    low_freq_factor: float | None = Field(None, description="llama3: wavelengths above context / this are scaled.")
    high_freq_factor: float | None = Field(None, description="llama3: wavelengths below context / this are kept.")
    attention_factor: float | None = Field(None, description="yarn, longrope: scale of cosine and sine.")
    beta_fast: float | None = Field(None, description="yarn: rotations above which a dimension is kept.")
    beta_slow: float | None = Field(None, description="yarn: rotations below which a dimension is interpolated.")
    mscale: float | None = Field(None, description="yarn: numerator of the attention factor.")
    mscale_all_dim: float | None = Field(None, description="yarn: denominator of the attention factor.")
    truncate: bool = Field(True, description="yarn: round the correction range outwards.")
    short_factor: list[float] | None = Field(None, description="longrope: divisors within the original context.")
    long_factor: list[float] | None = Field(None, description="longrope: divisors beyond the original context.")
    llama_4_scaling_beta: float | None = Field(
        None, description="Queries grow with the logarithm of their position in original contexts, times this."
    )


class ModelConfig(Settings):
    """Sizes and options of a decoder.

    Keys of ``config.json`` that the decoder does not use are kept in ``source`` and written back by :meth:`to_hf`.
    """

    model_config = ConfigDict(extra="ignore")

    model_type: str = Field("llama", description="Family of the model.")
    vocab_size: int = Field(gt=0, description="Rows V of the embedding, including padding.")
    hidden_size: int = Field(gt=0, description="Width D.")
    intermediate_size: int = Field(gt=0, description="MLP width F.")
    num_hidden_layers: int = Field(gt=0, le=1000, description="Decoder layers.")
    num_attention_heads: int = Field(gt=0, description="Query heads N.")
    num_key_value_heads: int = Field(gt=0, description="Key and value heads K; divides N.")
    head_dim: int = Field(gt=0, description="Head size H.")
    rms_norm_eps: float = Field(1e-6, ge=0, description="Constant added to the mean square before taking its root.")
    max_position_embeddings: int = Field(2048, gt=0, description="Context length in tokens.")
    sliding_window: int | None = Field(None, gt=0, description="Tokens that a token attends to, including itself.")
    layer_types: list[LayerType] | None = Field(
        None, description="Per layer, full_attention or sliding_attention, with the window; all the latter if null."
    )
    rope: Rope = Field(Rope(), description="Rotary position embedding.")
    local_rope: Rope | None = Field(None, description="That of layers with sliding_attention, if they have their own.")
    no_rope_layers: list[int] | None = Field(None, description="Per layer, 0 for no rotary position embedding.")
    hidden_act: Activation = Field("silu", description="Activation of the MLP's gate.")
    tie_word_embeddings: bool = Field(False, description="Whether the head shares the embedding's weight.")
    attention_bias: bool = Field(False, description="Whether the q, k, v and o projections have a bias.")
    attention_out_bias: bool | None = Field(None, description="Whether o has one; as q, k and v if null.")
    mlp_bias: bool = Field(False, description="Whether the gate, up and down projections have a bias.")
    query_pre_attn_scalar: float | None = Field(None, gt=0, description="Scores are divided by the root of this.")
    attention_multiplier: float | None = Field(None, description="Factor of scores, instead of a root.")
    attn_logit_softcapping: float | None = Field(None, gt=0, description="Bound of scores, approached by tanh.")
    final_logit_softcapping: float | None = Field(None, gt=0, description="Bound of logits, approached by tanh.")
    embedding_multiplier: float = Field(1.0, description="Factor of the decoder's input.")
    residual_multiplier: float = Field(1.0, description="Factor of what layers add to the residual stream.")
    logits_scaling: float = Field(1.0, gt=0, description="Divisor of logits.")
    num_experts: int = Field(0, ge=0, description="Experts E instead of an MLP; 0 for plain MLPs.")
    num_experts_per_tok: int = Field(1, gt=0, description="Experts that compute each token.")
    moe_intermediate_size: int | None = Field(None, gt=0, description="An expert's width; intermediate_size if null.")
    norm_topk_prob: bool = Field(False, description="Whether the weights of a token's experts sum up to 1.")
    shared_expert_intermediate_size: int = Field(0, ge=0, description="Width of the expert of all tokens; 0 for none.")
    decoder_sparse_step: int = Field(1, gt=0, description="Interval of layers with experts; 1 for all.")
    mlp_only_layers: list[int] = Field([], description="Layers without experts, counted from 0.")
    bos_token_id: int | None = Field(None, description="Beginning of sequence.")
    eos_token_id: int | list[int] | None = Field(None, description="End of sequence, at which generation stops.")
    dtype: str = Field("float32", description="Data type of the stored weights: float32, bfloat16 or float16.")
    source: dict[str, Any] = Field(default_factory=dict, exclude=True, description="Contents of config.json as read.")

    @model_validator(mode="after")
    def _shapes_agree(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for rope in self.ropes:
            if self.rotated(rope) % 2:
                raise ValueError(f"an odd number of dimensions of a head is rotated: {self.rotated(rope)}")
        for key in ("layer_types", "no_rope_layers"):
            value = getattr(self, key)
            if value is not None and len(value) < self.num_hidden_layers:
                raise ValueError(f"{key} lists {len(value)} layers of {self.num_hidden_layers}")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is more than all {self.num_experts}")
        return self

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` of a checkpoint.

        Raises:
            InputError: It is missing, not JSON, of an unknown family, or its values do not fit together.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(
                f"{path}: no such file, expected a checkpoint folder with config.json and *.safetensors",
                hint="lit-lora download fetches one; lit-lora convert makes one from a GGUF, .bin or .pth file",
            )
        return cls.from_hf(read_json(path), name=str(path))

    @classmethod
    def from_hf(cls, data: dict[str, Any], *, name: str = "config.json") -> ModelConfig:
        """Read a parsed ``config.json`` written by transformers 4 or 5.

        Raises:
            InputError: Unknown family, an unsupported option, or values that do not fit together.
        """
        _require_supported(data, name)
        family = FAMILIES[data["model_type"]]
        fields: dict[str, Any] = {**family.defaults, **data}
        for key in [key for key, value in fields.items() if value is None or key in _OF_SOME - family.reads]:
            del fields[key]  # an explicit null turns off the family's default, such as a window
        fields |= {**family.complete(fields), **family.fixed}
        if fields.get("hidden_act", "silu") not in get_args(Activation):
            expected = ", ".join(get_args(Activation))
            raise InputError(f"{name}: hidden_act {fields['hidden_act']!r} is not supported, expected {expected}")

        heads: Any = fields.get("num_attention_heads")
        width: Any = fields.get("hidden_size")
        fields.setdefault("num_key_value_heads", heads)
        if "head_dim" not in fields:
            sizes_are_valid = all(isinstance(size, int) and size > 0 for size in (heads, width))
            fields["head_dim"] = width // heads if sizes_are_valid else 2  # validation will report the wrong size

        dtype = fields.get("dtype", fields.get("torch_dtype", "float32"))  # transformers 5, transformers 4
        fields["dtype"] = str(dtype).removeprefix("torch.")
        fields["rope"], fields["local_rope"] = _ropes(fields, name)
        fields["source"] = data
        try:
            return validate(fields, cls, name=name)
        except UsageError as error:
            raise InputError(str(error)) from error

    def extended(self, factor: float, rope_type: str = "linear") -> ModelConfig:
        """The config for a context that is ``factor`` times as long, with interpolated positions.

        Raises:
            UsageError: The positions are already scaled in another way.
        """
        if self.rope.rope_type not in ("default", rope_type):
            raise UsageError(
                f"rope_type {rope_type!r}: the model's positions are already scaled by {self.rope.rope_type!r}",
                hint=f"use rope_type: {self.rope.rope_type}" if self.rope.rope_type in ("linear", "yarn") else None,
            )
        context = round(self.max_position_embeddings * factor)
        changed: dict[str, Any] = {"rope_type": rope_type, "factor": (self.rope.factor or 1.0) * factor}
        if rope_type == "yarn":
            original = self.rope.original_max_position_embeddings or self.max_position_embeddings
            changed["original_max_position_embeddings"] = original

        source = self.source
        if source:
            text = dict(text_part(source))
            key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
            ropes = text.get(key) or {}
            rope_source = {**ropes.get(_FULL, ropes), **changed}
            rope_source.pop("type", None)  # the former name of rope_type
            text["max_position_embeddings"] = context
            text[key] = {**ropes, _FULL: rope_source} if _FULL in ropes else rope_source
            source = with_text_part(source, text)
        rope = self.rope.model_copy(update=changed)
        return self.model_copy(update={"rope": rope, "max_position_embeddings": context, "source": source})

    @property
    def ropes(self) -> list[Rope]:
        """The model's rotations, of which each layer uses one or none."""
        return [self.rope] if self.local_rope is None else [self.rope, self.local_rope]

    def rotated(self, rope: Rope) -> int:
        """The number of a head's dimensions that ``rope`` rotates."""
        return int(self.head_dim * rope.partial_rotary_factor)

    @property
    def rope_switch(self) -> int | None:
        """With ``longrope``, the length beyond which all positions of a sequence are rotated in another way."""
        switches = [rope.original_max_position_embeddings for rope in self.ropes if rope.rope_type == "longrope"]
        return switches[0] if switches else None

    def rotates_alike(self, lengths: Sequence[int]) -> bool:
        """Whether the same tokens at the beginning of sequences of these lengths are rotated in the same way."""
        switch = self.rope_switch
        return switch is None or max(lengths) <= switch or min(lengths) > switch

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, if it has one."""
        return self.sliding_window if self._is_sliding(layer) else None

    def rope_of(self, layer: int) -> int | None:
        """Which of :attr:`ropes` a layer uses; ``None`` for no rotation."""
        if self.no_rope_layers is not None and not self.no_rope_layers[layer]:
            return None
        return 1 if self.local_rope is not None and self._is_sliding(layer) else 0

    def _is_sliding(self, layer: int) -> bool:
        return self.layer_types is None or self.layer_types[layer] == "sliding_attention"

    @property
    def attention_scale(self) -> float | None:
        """The factor of scores; ``None`` for ``H**-0.5``."""
        if self.query_pre_attn_scalar is not None:
            return 1 / math.sqrt(self.query_pre_attn_scalar)
        return self.attention_multiplier

    @property
    def expert_width(self) -> int:
        """Width F of an expert's MLP."""
        return self.moe_intermediate_size or self.intermediate_size

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this number, counted from 0, has experts instead of an MLP."""
        in_step = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and in_step and layer not in self.mlp_only_layers

    @property
    def names(self) -> DecoderNames:
        """The family's names of the parts."""
        return FAMILIES[self.model_type].names

    @property
    def block(self) -> Block:
        """What the family's layers compute."""
        return FAMILIES[self.model_type].block

    @property
    def keeps_dtype(self) -> bool:
        """Whether to keep the dtype of the stored weights, because another would round off a merged update."""
        return bool(self.source.get(KEEP_DTYPE))

    def to_hf(self) -> dict[str, Any]:
        """``config.json`` as read, with the fields that finetuning may change, and without quantization."""
        if self.source:
            changed = {key: getattr(self, key) for key in ("vocab_size", "tie_word_embeddings", "dtype")}
            return with_fields(without_quantization(self.source), changed)

        # A config that was made in Python.
        family = FAMILIES[self.model_type]
        rope: dict[str, Any] = self.rope.model_dump(exclude_none=True)
        if self.local_rope is not None:
            rope = {_FULL: rope, _SLIDING: self.local_rope.model_dump(exclude_none=True)}
        return {
            "architectures": [family.architecture],
            **self.model_dump(exclude={"rope", "local_rope", "source", *(_OF_SOME - family.reads)}),
            "use_sliding_window": self.sliding_window is not None,  # without it, some families have no window
            "rope_parameters": rope,
        }


def text_part(data: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the text model: of a composite checkpoint a part, else ``data`` itself."""
    part = data.get("text_config")
    return part if isinstance(part, dict) else data


def with_text_part(data: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """A copy of a ``config.json`` with another :func:`text_part`."""
    return text if text_part(data) is data else {**data, "text_config": text}


def with_fields(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A copy of a ``config.json``, or of a part of it, with these fields; ``dtype`` under the name that it has."""
    named = dict(fields)
    if "dtype" in named and "torch_dtype" in data and "dtype" not in data:  # written by transformers 4
        named["torch_dtype"] = named.pop("dtype")
    return {**data, **named}


def _require_supported(data: dict[str, Any], name: str) -> None:
    """Refuse a model that this decoder cannot compute.

    Raises:
        InputError: Unknown family, activation or quantization.
    """
    family = data.get("model_type")
    if family not in FAMILIES:
        hint = "encoders and encoder-decoders, such as BERT, RoBERTa and T5, are for recipe: classify"
        if "auto_map" in data:
            hint = f"lit-lora never runs Python code from a checkpoint (auto_map); {hint}"
        known = ", ".join(FAMILIES)
        raise InputError(
            f"{name}: model_type {family!r} is not supported{did_you_mean(str(family), FAMILIES)}, known: {known}",
            hint=hint,
        )

    if data.get("use_bidirectional_attention"):
        raise InputError(f"{name}: use_bidirectional_attention: tokens see later ones, so this model cannot write text")
    types = set(data.get("layer_types") or ())
    if len(types) > 1 and "layer_types" not in FAMILIES[data["model_type"]].reads:
        raise InputError(f"{name}: layer_types: models of type {family} have layers of one type, got {sorted(types)}")

    require_readable(data, name)


_NEEDED_BY_ROPE_TYPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Keys that each rope type cannot do without."""


_FULL, _SLIDING = get_args(LayerType)

_OF_SOME = frozenset(
    (
        "attention_out_bias",
        "attention_multiplier",
        "attn_logit_softcapping",
        "decoder_sparse_step",
        "embedding_multiplier",
        "final_logit_softcapping",
        "layer_types",
        "logits_scaling",
        "mlp_only_layers",
        "moe_intermediate_size",
        "no_rope_layers",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "shared_expert_intermediate_size",
    )
)
"""Fields that only some families have: in the others' ``config.json`` such a key means nothing."""


def _ropes(fields: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotation of all layers, or of those with full attention, and that of those with a window, if they have one.

    transformers 5 writes ``rope_parameters``, by type of layer where they differ, transformers 4 ``rope_scaling``,
    ``rope_theta`` and ``rope_local_base_freq``.
    """
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"{name}: rope_scaling: expected an object, got {type(scaling).__name__}")

    local = None
    if "rope_local_base_freq" in fields:
        own = scaling.get(_SLIDING) or {}
        local = _rope({"rope_theta": fields["rope_local_base_freq"], **own}, fields, name)
    return _rope(scaling.get(_FULL, scaling), fields, name), local


def _rope(scaling: dict[str, Any], fields: dict[str, Any], name: str) -> dict[str, Any]:
    """One rotation, from its own keys and those of ``config.json``."""
    rope = {key: value for key, value in scaling.items() if value is not None}
    rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if "original_max_position_embeddings" in fields:
        rope["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings", 2048))

    rope_type = rope["rope_type"]
    if rope_type not in _NEEDED_BY_ROPE_TYPE:
        known = ", ".join(_NEEDED_BY_ROPE_TYPE)
        raise InputError(f"{name}: rope_type {rope_type!r} is not supported, known: {known}")
    missing = [key for key in _NEEDED_BY_ROPE_TYPE[rope_type] if key not in rope]
    if missing:
        raise InputError(f"{name}: rope_type {rope_type!r} needs {', '.join(missing)}")
    return rope
