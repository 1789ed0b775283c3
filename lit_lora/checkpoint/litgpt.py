"""LitGPT checkpoints (``lit_model.pth`` with ``model_config.yaml``) as Hugging Face tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.checkpoint.torch_file import TorchReader
from lit_lora.config import read_yaml
from lit_lora.errors import InputError
from lit_lora.files import read_json
from lit_lora.model.families import FAMILIES

__all__ = ["LitGPTReader"]

_LLAMA_NAMES = FAMILIES["llama"].names  # Mistral's are the same
# What LitGPT calls a part -> what Hugging Face calls it.
_NAMES = {
    "transformer.wte": _LLAMA_NAMES.embedding,
    "transformer.ln_f": _LLAMA_NAMES.norm,
    "lm_head": _LLAMA_NAMES.head,
}
_LAYER_NAMES = {
    "norm_1": _LLAMA_NAMES.attention_norm,
    "norm_2": _LLAMA_NAMES.mlp_norm,
    "attn.proj": _LLAMA_NAMES.attention_out,
    "mlp.fc_1": _LLAMA_NAMES.mlp_gate,
    "mlp.fc_2": _LLAMA_NAMES.mlp_in,
    "mlp.proj": _LLAMA_NAMES.mlp_out,
}
_QKV = {"q": _LLAMA_NAMES.query, "k": _LLAMA_NAMES.key, "v": _LLAMA_NAMES.value}
# Fused projections, and whether their rows are interleaved. LitGPT up to 0.5.3 stores attn.attn group by group: the
# group's queries, its key, its value. Later versions store attn.qkv: all queries, then all keys, then all values.
_FUSED = {"attn.attn": True, "attn.qkv": False}

# What makes a Llama in LitGPT's config; with any other value it is another architecture.
_LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "shared_attention_norm": False,
    "rotary_percentage": 1.0,
    "n_expert": 0,
    "lm_head_bias": False,
    "scale_embeddings": False,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "norm_qk": False,
}


class LitGPTReader:
    """A LitGPT checkpoint folder as Hugging Face tensors: fused projections split, names translated.

    Args:
        path: The folder, or its ``lit_model.pth``.

    Raises:
        InputError: A file is missing or damaged, or the model is not a Llama.
    """

    def __init__(self, path: Path) -> None:
        self.file = Path(path) / "lit_model.pth" if Path(path).is_dir() else Path(path)
        self.folder = self.file.parent
        self._lit_config = _read_config(self.folder / "model_config.yaml")
        self._reader = TorchReader([self.file])
        # Hugging Face name -> LitGPT's, and which of q, k and v it is of a fused tensor.
        self._sources: dict[str, tuple[str, str | None]] = {}
        for name in self._reader.names():
            self._sources.update(self._translate(name))

    def names(self) -> list[str]:
        """Hugging Face names of all tensors."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        stored, part = self._sources[name]
        shape = self._reader.shape(stored)
        if part is None:
            return shape
        heads = self._number("n_head") if part == "q" else self._groups()
        return (heads * self._head_size(), *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is stored."""
        return self._reader.dtype(self._sources[name][0])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; q, k and v are cut from the fused one."""
        stored, part = self._sources[name]
        tensor = self._reader.read(stored)
        if part is not None:
            fused = "attn.attn" if ".attn.attn." in stored else "attn.qkv"
            tensor = self._cut(tensor, part, interleaved=_FUSED[fused])
        return tensor if dtype is None else tensor.to(dtype)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``.

        Raises:
            InputError: A key of ``model_config.yaml`` is missing or has an unexpected value.
        """
        window = self._lit_config.get("sliding_window_size")
        if window and self._lit_config.get("sliding_window_indices"):
            raise InputError(f"{self.folder / 'model_config.yaml'}: a sliding window in some layers is not supported")
        config: dict[str, Any] = {
            "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
            "model_type": "mistral" if window else "llama",
            "vocab_size": self.shape(f"{_LLAMA_NAMES.embedding}.weight")[0],
            "hidden_size": self._number("n_embd"),
            "intermediate_size": self._number("intermediate_size"),
            "num_hidden_layers": self._number("n_layer"),
            "num_attention_heads": self._number("n_head"),
            "num_key_value_heads": self._groups(),
            "head_dim": self._head_size(),
            "hidden_act": "silu",
            "rms_norm_eps": self._lit_config.get("norm_eps", 1e-5),
            "rope_theta": float(self._lit_config.get("rope_base", 10000)),
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": self._number("block_size"),
            "attention_bias": f"{_LLAMA_NAMES.layers}.0.{_LLAMA_NAMES.query}.bias" in self._sources,
            "mlp_bias": f"{_LLAMA_NAMES.layers}.0.{_LLAMA_NAMES.mlp_gate}.bias" in self._sources,
            "tie_word_embeddings": self._tied(),
        }
        if window:
            config["sliding_window"] = window
        generation_file = self.folder / "generation_config.json"
        if generation_file.is_file():
            generation = read_json(generation_file)
            config.update({key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation})
        return config

    def _tied(self) -> bool:
        """Whether the head is the embedding. LitGPT stores both even if they are tied, and then with equal values."""
        head = f"{_LLAMA_NAMES.head}.weight"
        if head not in self._sources:
            return True
        return torch.equal(self.read(head), self.read(f"{_LLAMA_NAMES.embedding}.weight"))

    def _rope_scaling(self) -> dict[str, Any] | None:
        adjustments = self._lit_config.get("rope_adjustments")
        condense = self._lit_config.get("rope_condense_ratio", 1)
        if not adjustments and condense == 1:
            return None
        if not adjustments:
            return {"rope_type": "linear", "factor": float(condense)}
        try:
            return {
                "rope_type": "llama3",
                "factor": adjustments["factor"],
                "low_freq_factor": adjustments["low_freq_factor"],
                "high_freq_factor": adjustments["high_freq_factor"],
                "original_max_position_embeddings": adjustments["original_max_seq_len"],
            }
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{self.folder / 'model_config.yaml'}: only Llama 3's rope_adjustments are supported"
            ) from error

    def _cut(self, tensor: Tensor, part: str, *, interleaved: bool) -> Tensor:
        """The rows of q, k or v of a fused tensor with (N + 2 K) * H rows."""
        groups = self._groups()
        head_size = self._head_size()
        queries = self._number("n_head") // groups  # of a group
        if interleaved:
            rows = tensor.reshape(groups, queries + 2, head_size, *tensor.shape[1:])  # (K, N / K + 2, H, …)
            heads = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, None)}[part]
            return rows[:, heads].reshape(-1, *tensor.shape[1:])
        sizes = [groups * queries * head_size, groups * head_size, groups * head_size]
        q, k, v = torch.split(tensor, sizes)
        return {"q": q, "k": k, "v": v}[part]

    def _translate(self, name: str) -> dict[str, tuple[str, str | None]]:
        """The Hugging Face tensors that a stored one gives, as entries of ``_sources``."""
        match = re.fullmatch(r"(?:transformer\.h\.(\d+)\.)?([\w.]+)\.(weight|bias)", name)
        layer, module, kind = match.groups() if match else (None, name, "")
        if layer is None and module in _NAMES:
            return {f"{_NAMES[module]}.{kind}": (name, None)}
        prefix = f"{_LLAMA_NAMES.layers}.{layer}."
        if layer is not None and module in _LAYER_NAMES:
            return {f"{prefix}{_LAYER_NAMES[module]}.{kind}": (name, None)}
        if layer is not None and module in _FUSED:
            rows = (self._number("n_head") + 2 * self._groups()) * self._head_size()
            if self._reader.shape(name)[0] != rows:
                raise InputError(f"{self.file}: {name} has {self._reader.shape(name)[0]} rows, expected {rows}")
            return {f"{prefix}{projection}.{kind}": (name, part) for part, projection in _QKV.items()}
        hint = "merge the adapter with litgpt merge_lora first" if "lora_" in name else None
        raise InputError(f"{self.file}: {name} is not part of a Llama model, so it would be lost", hint=hint)

    def _groups(self) -> int:
        return self._number("n_query_groups") if "n_query_groups" in self._lit_config else self._number("n_head")

    def _head_size(self) -> int:
        if "head_size" in self._lit_config:
            return self._number("head_size")
        return self._number("n_embd") // self._number("n_head")

    def _number(self, key: str) -> int:
        value = self._lit_config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise InputError(f"{self.folder / 'model_config.yaml'}: {key}: expected a number above 0, got {value!r}")
        return value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but a LitGPT checkpoint needs it")
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, got {type(config).__name__}")
    for key, expected in _LLAMA.items():
        # LitGPT writes every key that its version has, so a missing one is as good as expected. False, 0 and null all
        # say that a feature is off.
        if (config.get(key, expected) or None) != (expected or None):
            raise InputError(
                f"{path}: {key} is {config[key]!r}, expected {expected!r}: only Llama models are supported"
            )
    return config
