"""The table of families: what llama.cpp calls each architecture, its tensors and its settings, in both directions.

Tensor names come from the ``gguf`` library, :func:`gguf.get_tensor_name_map`; a family lists only the tensors that are
renamed otherwise or stored in another form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import gguf
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, TensorNameMap

from lit_lora.errors import InputError
from lit_lora.gguf.file import GGUFFile
from lit_lora.gguf.ops import (
    GATE_UP_HALVES,
    GATE_UP_INTERLEAVED,
    INPUT_FIRST,
    LATENT_KEY_VALUE,
    ONE_ADDED,
    OUTPUT_LAST,
    SAME,
    WITHOUT_CHANNEL,
    TensorOp,
    fused_by_group,
    in_pairs,
)
from lit_lora.gguf.settings import Constant, Fixed, HeadSize, HeldBy, Layers, Number, Rope, Setting, number_of_heads

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
        rules: Tensors that are not stored under the library's name as they are. Of several for one tensor, the first
            whose tensors a file has counts, and writers use the first.
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

    def places(self, name: str, layers: int) -> list[Place]:
        """Where a tensor may be kept, the present form first; empty if llama.cpp has no place for it."""
        matches = [(rule, match) for rule in self.rules if (match := re.fullmatch(rule.pattern, name))]
        if not matches:
            return self._place(Rule(name), [name], None, layers)
        places = []
        for rule, match in matches:
            names = [match.expand(new) for new in rule.names or (r"\g<0>",)]
            places += self._place(rule, names, match.groupdict().get("index"), layers)
        return places

    def _place(self, rule: Rule, names: list[str], index: str | None, layers: int) -> list[Place]:
        """The place by one rule, or none."""
        known = [self._gguf_name(name, layers) for name in names]
        found = tuple(name for name in known if name is not None)
        return [Place(found, rule.op, None if index is None else int(index))] if len(found) == len(names) else []

    def _gguf_name(self, name: str, layers: int) -> str | None:
        if name.startswith("blk."):
            return name
        return _name_map(self.arch, layers).get_name(name, try_suffixes=(".weight", ".bias"))


@cache
def _name_map(arch: MODEL_ARCH, layers: int) -> TensorNameMap:
    return gguf.get_tensor_name_map(arch, layers)


def family_of(file: GGUFFile) -> Family:
    """The family of a file.

    Raises:
        InputError: Its architecture is not in the table.
    """
    for family in FAMILIES:
        if MODEL_ARCH_NAMES[family.arch] == file.architecture and family.fits(file):
            return family
    known = sorted({MODEL_ARCH_NAMES[family.arch] for family in FAMILIES})
    nearest = get_close_matches(file.architecture, known, n=3, cutoff=0.0)
    raise InputError(
        f"{file.path}: architecture {file.architecture!r} is not supported",
        hint=f"the nearest of {len(known)} that are: {', '.join(nearest)}",
    )


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


def _expert_counts(count: str, used: str = "num_experts_per_tok", size: str | None = None) -> tuple[Setting, ...]:
    """Numbers of experts, and the width of one where it differs from that of a dense layer."""
    settings = (Number(count, "expert_count"), Number(used, "expert_used_count"))
    return (*settings, Number(size, "expert_feed_forward_length")) if size else settings


class _AllAttendFully:
    """Families whose sliding window, which few models use, llama.cpp does not have."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        config["use_sliding_window"] = False

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        Fixed("use_sliding_window", False).write(config, metadata)
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise InputError("layer_types: sliding attention cannot be stored in GGUF for this family")


@dataclass(frozen=True)
class _GemmaQueryScale:
    """``query_pre_attn_scalar``: llama.cpp knows it by the number of layers, the 27B model's is not the head size."""

    layers_of_27b: int

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        config["query_pre_attn_scalar"] = self._scalar(config)

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        Fixed("query_pre_attn_scalar", self._scalar(config)).write(config, metadata)

    def _scalar(self, config: Mapping[str, Any]) -> int:
        if config["num_hidden_layers"] == self.layers_of_27b:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return int(config["head_dim"])


class _FalconHeads:
    """Falcon's two builds: one key-value head for all queries, or groups with norms of their own."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        groups = file.number("attention.head_count_kv", 1)
        config["num_kv_heads"] = groups
        config["new_decoder_architecture"] = groups > 1
        config["multi_query"] = groups == 1

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        if not config["new_decoder_architecture"] and not config["multi_query"]:
            raise InputError("multi_query: a Falcon with a key for each query head cannot be stored in GGUF")
        metadata["attention.head_count_kv"] = _falcon_groups(config)


def _falcon_groups(config: Mapping[str, Any]) -> int:
    return int(config["num_kv_heads"]) if config["new_decoder_architecture"] else 1


class _MptSizes:
    """MPT's config has the ratio of the MLP's width to the hidden size, and a whole number for ALiBi's largest bias."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        config["expansion_ratio"] = file.number("feed_forward_length") // config["d_model"]
        config["attn_config"] = {"alibi": True, "alibi_bias_max": int(file.decimal("attention.max_alibi_bias"))}

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        Fixed("attn_config.alibi", True).write(config, metadata)
        metadata["feed_forward_length"] = config["expansion_ratio"] * config["d_model"]
        metadata["attention.max_alibi_bias"] = float(config["attn_config"]["alibi_bias_max"])


class _SmolLM3Layers:
    """Every 4th layer of SmolLM3 does not rotate: llama.cpp has that built in."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        config["no_rope_layers"] = self._rotated(config)

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        Fixed("no_rope_layers", self._rotated(config)).write(config, metadata)

    @staticmethod
    def _rotated(config: Mapping[str, Any]) -> list[int]:
        return [int((index + 1) % 4 != 0) for index in range(config["num_hidden_layers"])]


class _Latent:
    """The sizes of DeepSeek's latent attention; llama.cpp sees one key-value head, the latent."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        rotated = file.number("rope.dimension_count")
        # Files from before 2025-04 have the sizes of a decompressed head under the usual keys.
        key = file.number("attention.key_length_mla", file.number("attention.key_length", 192))
        config["qk_rope_head_dim"] = config["head_dim"] = rotated
        config["qk_nope_head_dim"] = key - rotated
        config["v_head_dim"] = file.number("attention.value_length_mla", file.number("attention.value_length", 128))
        config["num_key_value_heads"] = config["num_attention_heads"]

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        metadata["attention.head_count_kv"] = 1
        metadata["attention.key_length"] = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        metadata["attention.value_length"] = config["kv_lora_rank"]
        metadata["attention.key_length_mla"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        metadata["attention.value_length_mla"] = config["v_head_dim"]


class _ConvolutionLayers:
    """LFM2's layers: those that attend have key-value heads."""

    def read(self, file: GGUFFile, config: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        heads = file.get("attention.head_count_kv")
        if not isinstance(heads, list) or not any(heads):
            raise file.wrong("attention.head_count_kv", "a number for each layer")
        config["num_key_value_heads"] = max(heads)
        config["layer_types"] = ["full_attention" if count else "conv" for count in heads]

    def write(self, config: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """See :class:`Setting`."""
        heads = config["num_key_value_heads"]
        types = config["layer_types"]
        metadata["attention.head_count_kv"] = [heads if kind == "full_attention" else 0 for kind in types]


_GROUPED_HEADS = Number("num_key_value_heads", "attention.head_count_kv", default=number_of_heads)
_RMS_EPS = Number("rms_norm_eps", "attention.layer_norm_rms_epsilon", float)
_NORM_EPS = "attention.layer_norm_epsilon"
_SILU = Fixed("hidden_act", "silu")
_GELU_TANH = Fixed("hidden_act", "gelu_pytorch_tanh")
_CLIP = Number("clip_qkv", "attention.clamp_kqv", float, default=None)
_LOGIT_SCALE = Number("logit_scale", "logit_scale", float)
_ATTENTION_BIAS = HeldBy("attention_bias", "attn_q.bias")
_MLP_BIAS = HeldBy("mlp_bias", "ffn_up.bias")
_NORMALIZED = Fixed("norm_topk_prob", True)
_NOT_NORMALIZED = Fixed("norm_topk_prob", False)
_ALL_LAYERS_SPARSE = (Fixed("decoder_sparse_step", 1), Fixed("mlp_only_layers", []))

_USUAL: tuple[Setting, ...] = (*_sizes(), _GROUPED_HEADS, _RMS_EPS)
_LLAMA: tuple[Setting, ...] = (*_USUAL, _SILU, HeadSize(), Rope())
_LLAMA_BIASES: tuple[Setting, ...] = (*_LLAMA, _ATTENTION_BIAS, _MLP_BIAS)
_QWEN: tuple[Setting, ...] = (*_USUAL, _SILU, Rope(), _AllAttendFully())
_GRANITE: tuple[Setting, ...] = (
    *_USUAL,
    _SILU,
    Rope(),
    _ATTENTION_BIAS,
    Number("attention_multiplier", "attention.scale", float, default=1.0),
    Number("embedding_multiplier", "embedding_scale", float, default=1.0),
    Number("residual_multiplier", "residual_scale", float, default=1.0),
    Number("logits_scaling", "logit_scale", float, default=1.0),
)
_COHERE: tuple[Setting, ...] = (
    *_sizes(),
    _GROUPED_HEADS,
    Number("layer_norm_eps", _NORM_EPS, float),
    _SILU,
    _LOGIT_SCALE,
    _ATTENTION_BIAS,
)

_QK_IN_PAIRS = (
    Rule(r".*\.q_proj\.(weight|bias)", in_pairs("num_attention_heads")),
    Rule(r".*\.k_proj\.(weight|bias)", in_pairs("num_key_value_heads")),
)
_NORMS_WITH_ONE = (Rule(r".*norm\.weight", ONE_ADDED),)
# Hugging Face keeps every expert's tensors apart, llama.cpp those of a layer in one.
_EXPERTS = (Rule(r"(.*\.experts)\.(?P<index>\d+)\.(.*)", names=(r"\1.\3",)),)
_ROUTER_CORRECTION = (Rule(r"(.*)\.e_score_correction_bias", names=(r"\1.e_score_correction.bias",)),)


def _has(tensor: str) -> Callable[[GGUFFile], bool]:
    """Whether some layer has a tensor."""
    return lambda file: any(name.endswith(tensor) for name in file.tensors)


_DEEPSEEK: tuple[Setting, ...] = (
    *_sizes(),
    _RMS_EPS,
    _SILU,
    Number("q_lora_rank", "attention.q_lora_rank", default=None),
    Number("kv_lora_rank", "attention.kv_lora_rank"),
    _Latent(),
    Rope(),
    *_expert_counts("n_routed_experts", size="moe_intermediate_size"),
    Number("first_k_dense_replace", "leading_dense_block_count", default=0),
    Number("n_shared_experts", "expert_shared_count"),
    Number("routed_scaling_factor", "expert_weights_scale", float, default=1.0),
    Number("norm_topk_prob", "expert_weights_norm", bool, default=False),
    Number("n_group", "expert_group_count", default=1),
    Number("topk_group", "expert_group_used_count", default=1),
)
# New files have the two projections out of the latent apart, old ones as one.
_DEEPSEEK_RULES = (
    *_EXPERTS,
    *_ROUTER_CORRECTION,
    Rule(r"(.*)\.kv_b_proj\.weight", LATENT_KEY_VALUE, (r"\1.k_b_proj.weight", r"\1.v_b_proj.weight")),
    Rule(r"(.*)\.kv_b_proj\.weight"),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        MODEL_ARCH.LLAMA,
        (*_LLAMA, *_expert_counts("num_local_experts"), Fixed("sliding_window", None)),
        (*_EXPERTS, *_QK_IN_PAIRS),
        fits=lambda file: bool(file.get("expert_count")),
    ),
    Family(
        "mistral",
        MODEL_ARCH.LLAMA,
        (*_LLAMA, Number("sliding_window", "attention.sliding_window", default=None)),
        _QK_IN_PAIRS,
        fits=lambda file: bool(file.get("attention.sliding_window")),
    ),
    Family("llama", MODEL_ARCH.LLAMA, _LLAMA_BIASES, _QK_IN_PAIRS),
    Family("llama", MODEL_ARCH.INTERNLM2, _LLAMA_BIASES, _QK_IN_PAIRS),
    Family("llama", MODEL_ARCH.XVERSE, _LLAMA_BIASES, _QK_IN_PAIRS),
    Family(
        "arcee",
        MODEL_ARCH.ARCEE,
        (*_USUAL, Fixed("hidden_act", "relu2"), HeadSize(), Rope(), _ATTENTION_BIAS, _MLP_BIAS),
        _QK_IN_PAIRS,
    ),
    Family("qwen2", MODEL_ARCH.QWEN2, _QWEN),
    Family("qwen3", MODEL_ARCH.QWEN3, (*_QWEN, HeadSize(), Fixed("attention_bias", False))),
    Family(
        "qwen2_moe",
        MODEL_ARCH.QWEN2MOE,
        (
            *_QWEN,
            *_expert_counts("num_experts", size="moe_intermediate_size"),
            Number("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
            _NOT_NORMALIZED,
            *_ALL_LAYERS_SPARSE,
        ),
        _EXPERTS,
    ),
    Family(
        "qwen3_moe",
        MODEL_ARCH.QWEN3MOE,
        (
            *_QWEN,
            HeadSize(),
            *_expert_counts("num_experts", size="moe_intermediate_size"),
            _NORMALIZED,
            *_ALL_LAYERS_SPARSE,
            Fixed("attention_bias", False),
        ),
        _EXPERTS,
    ),
    Family("gemma", MODEL_ARCH.GEMMA, (*_USUAL, HeadSize(), _GELU_TANH, Rope()), _NORMS_WITH_ONE),
    Family(
        "gemma2",
        MODEL_ARCH.GEMMA2,
        (
            *_USUAL,
            HeadSize(),
            Fixed("hidden_activation", "gelu_pytorch_tanh"),
            _GemmaQueryScale(layers_of_27b=46),
            Number("attn_logit_softcapping", "attn_logit_softcapping", float, default=50.0),
            Number("final_logit_softcapping", "final_logit_softcapping", float, default=30.0),
            Layers(2),
            Rope(),
        ),
        _NORMS_WITH_ONE,
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
    Family(
        "phi",
        MODEL_ARCH.PHI2,
        (
            *_sizes(),
            _GROUPED_HEADS,
            Number("layer_norm_eps", _NORM_EPS, float),
            Fixed("hidden_act", "gelu_new"),
            Fixed("qk_layernorm", False),
            Rope(partial=True),
        ),
    ),
    Family(
        "phi3",
        MODEL_ARCH.PHI3,
        (
            *_USUAL,
            _SILU,
            Rope(partial=True),
            Number("sliding_window", "attention.sliding_window", zero_is_none=True),
        ),
    ),
    Family(
        "falcon",
        MODEL_ARCH.FALCON,
        (
            *_sizes(intermediate_size="ffn_hidden_size"),
            _FalconHeads(),
            Number("layer_norm_epsilon", _NORM_EPS, float),
            HeldBy("num_ln_in_parallel_attn", "attn_norm_2.weight", on=2, off=1),
            Fixed("activation", "gelu"),
            Fixed("parallel_attn", True),
            Fixed("bias", False),
            Fixed("alibi", False),
            Constant("tensor_data_layout", "jploski"),
            Rope(),
        ),
        (Rule(r".*\.query_key_value\.weight", fused_by_group("num_attention_heads", _falcon_groups)),),
    ),
    Family(
        "mpt",
        MODEL_ARCH.MPT,
        (
            Number("n_layers", "block_count"),
            Number("max_seq_len", "context_length"),
            Number("d_model", "embedding_length"),
            Number("n_heads", "attention.head_count"),
            _MptSizes(),
            Number("layer_norm_epsilon", _NORM_EPS, float),
            Number("attn_config.clip_qkv", "attention.clamp_kqv", float, default=None),
            Fixed("no_bias", True),
        ),
    ),
    Family(
        "gpt2",
        MODEL_ARCH.GPT2,
        (
            Number("n_layer", "block_count"),
            Number("n_positions", "context_length"),
            Number("n_embd", "embedding_length"),
            Number("n_inner", "feed_forward_length", default=lambda config: 4 * config["n_embd"]),
            Number("n_head", "attention.head_count"),
            Number("layer_norm_epsilon", _NORM_EPS, float),
            Fixed("activation_function", "gelu_new"),
            Fixed("scale_attn_by_inverse_layer_idx", False),
        ),
        (Rule(r".*\.(c_attn|c_proj|c_fc)\.weight", INPUT_FIRST),),
    ),
    Family(
        "gpt_neox",
        MODEL_ARCH.GPTNEOX,
        (
            *_sizes(),
            Number("layer_norm_eps", _NORM_EPS, float),
            Number("use_parallel_residual", "use_parallel_residual", bool),
            Fixed("hidden_act", "gelu"),
            Fixed("attention_bias", True),
            Rope(partial=True),
        ),
        (Rule(r".*\.query_key_value\.(weight|bias)", fused_by_group("num_attention_heads", number_of_heads)),),
    ),
    Family(
        "bloom",
        MODEL_ARCH.BLOOM,
        (
            Number("n_layer", "block_count"),
            Number("hidden_size", "embedding_length"),
            Number("n_head", "attention.head_count"),
            Number("layer_norm_epsilon", _NORM_EPS, float),
            Fixed("apply_residual_connection_post_layernorm", False),
            Constant("feed_forward_length", lambda config: 4 * config["hidden_size"]),
            Constant("attention.head_count_kv", lambda config: config["n_head"]),
            Number("seq_length", "context_length", default=2048),
        ),
        (
            Rule(
                r"transformer\.(.*\.query_key_value\.(weight|bias))",
                fused_by_group("n_head", lambda config: int(config["n_head"])),
                (r"\1",),
            ),
            Rule(r"transformer\.(.*)", names=(r"\1",)),
        ),
    ),
    Family(
        "stablelm",
        MODEL_ARCH.STABLELM,
        (
            *_sizes(),
            _GROUPED_HEADS,
            Number("layer_norm_eps", _NORM_EPS, float),
            _SILU,
            HeldBy("use_qkv_bias", "attn_q.bias"),
            HeldBy("qk_layernorm", "attn_q_norm.weight"),
            HeldBy("use_parallel_residual", "ffn_norm.weight", on=False, off=True),
            Rope(partial=True),
        ),
        (Rule(r"(.*\.[qk]_layernorm)\.norms\.(?P<index>\d+)\.weight", names=(r"\1.weight",)),),
    ),
    Family(
        "starcoder2",
        MODEL_ARCH.STARCODER2,
        (
            *_sizes(),
            _GROUPED_HEADS,
            Number("norm_epsilon", _NORM_EPS, float),
            _GELU_TANH,
            HeldBy("use_bias", "attn_q.bias"),
            Fixed("sliding_window", None),
            Rope(),
        ),
    ),
    Family(
        "olmo",
        MODEL_ARCH.OLMO,
        (*_sizes(), _GROUPED_HEADS, _SILU, Constant(_NORM_EPS, 1e-5), _CLIP, Rope()),
        _QK_IN_PAIRS,
    ),
    Family(
        "olmo3",
        MODEL_ARCH.OLMO2,
        (*_USUAL, _SILU, Layers(4, listed=True), Rope(local_base=0.0)),
        fits=lambda file: bool(file.get("attention.sliding_window")),
    ),
    Family("olmo2", MODEL_ARCH.OLMO2, (*_USUAL, _SILU, Rope())),
    Family(
        "olmoe",
        MODEL_ARCH.OLMOE,
        (*_USUAL, _SILU, Rope(), *_expert_counts("num_experts"), _NOT_NORMALIZED, Fixed("clip_qkv", None)),
        _EXPERTS,
    ),
    Family(
        "smollm3",
        MODEL_ARCH.SMOLLM3,
        (*_USUAL, _SILU, Rope(), _AllAttendFully(), _ATTENTION_BIAS, _MLP_BIAS, _SmolLM3Layers()),
        _QK_IN_PAIRS,
    ),
    Family("granite", MODEL_ARCH.GRANITE, (*_GRANITE, _MLP_BIAS), _QK_IN_PAIRS),
    Family(
        "granitemoe",
        MODEL_ARCH.GRANITE_MOE,
        (*_GRANITE, *_expert_counts("num_local_experts")),
        (
            Rule(
                r"model\.layers\.(\d+)\.block_sparse_moe\.input_linear\.weight",
                GATE_UP_HALVES,
                (r"blk.\1.ffn_gate_exps.weight", r"blk.\1.ffn_up_exps.weight"),
            ),
            *_QK_IN_PAIRS,
        ),
    ),
    Family(
        "cohere",
        MODEL_ARCH.COMMAND_R,
        (*_COHERE, Rope(), HeldBy("use_qk_norm", "attn_q_norm.weight"), Constant("rope.scaling.type", "none")),
    ),
    Family("cohere2", MODEL_ARCH.COHERE2, (*_COHERE, HeadSize(), Layers(4), Rope())),
    Family(
        "deepseek_v3",
        MODEL_ARCH.DEEPSEEK2,
        (*_DEEPSEEK, Constant("expert_gating_func", ExpertGatingFuncType.SIGMOID.value)),
        _DEEPSEEK_RULES,
        fits=_has("exp_probs_b.bias"),
    ),
    Family(
        "deepseek_v2",
        MODEL_ARCH.DEEPSEEK2,
        (*_DEEPSEEK, Constant("expert_gating_func", ExpertGatingFuncType.SOFTMAX.value)),
        _DEEPSEEK_RULES,
    ),
    Family(
        "gpt_oss",
        MODEL_ARCH.GPT_OSS,
        (
            *_USUAL,
            HeadSize(),
            _SILU,
            Layers(2),
            Rope(truncate=False),
            *_expert_counts("num_local_experts", size="intermediate_size"),
            Fixed("attention_bias", True),
        ),
        (
            Rule(r"(.*)\.sinks", names=(r"\1.sinks.weight",)),
            Rule(
                r"(.*)\.gate_up_proj",
                GATE_UP_INTERLEAVED,
                (r"\1.gate_proj.weight", r"\1.up_proj.weight"),
            ),
            Rule(r"(.*)\.gate_up_proj_bias", GATE_UP_INTERLEAVED, (r"\1.gate_proj.bias", r"\1.up_proj.bias")),
            Rule(r"(.*)\.down_proj", OUTPUT_LAST, (r"\1.down_proj.weight",)),
            Rule(r"(.*)\.down_proj_bias", names=(r"\1.down_proj.bias",)),
        ),
    ),
    Family("glm", MODEL_ARCH.CHATGLM, (*_USUAL, _SILU, HeadSize(), _ATTENTION_BIAS, Rope(partial=True))),
    Family("glm4", MODEL_ARCH.GLM4, (*_USUAL, _SILU, HeadSize(), _ATTENTION_BIAS, Rope(partial=True))),
    Family(
        "nemotron",
        MODEL_ARCH.NEMOTRON,
        (
            *_sizes(),
            _GROUPED_HEADS,
            Number("norm_eps", _NORM_EPS, float),
            Fixed("hidden_act", "relu2"),
            HeadSize(),
            _ATTENTION_BIAS,
            _MLP_BIAS,
            Rope(partial=True),
        ),
        _NORMS_WITH_ONE,
    ),
    Family("ernie4_5", MODEL_ARCH.ERNIE4_5, (*_LLAMA, Fixed("use_bias", False))),
    Family("hunyuan_v1_dense", MODEL_ARCH.HUNYUAN_DENSE, (*_LLAMA, Fixed("attention_bias", False))),
    Family("exaone4", MODEL_ARCH.EXAONE4, (*_USUAL, _SILU, Rope(), Layers(4, listed=True))),
    Family(
        "seed_oss",
        MODEL_ARCH.SEED_OSS,
        (*_LLAMA, _ATTENTION_BIAS, Fixed("attention_out_bias", False), Fixed("mlp_bias", False)),
    ),
    Family(
        "lfm2",
        MODEL_ARCH.LFM2,
        (
            *_sizes(),
            _ConvolutionLayers(),
            Number("norm_eps", "attention.layer_norm_rms_epsilon", float),
            Number("conv_L_cache", "shortconv.l_cache"),
            Fixed("block_auto_adjust_ff_dim", False),
            Fixed("conv_bias", False),
            Rope(),
        ),
        (Rule(r".*\.conv\.conv\.weight", WITHOUT_CHANNEL),),
    ),
)
"""Of several families with one architecture, the first that fits counts."""
