"""A GGUF file as a Hugging Face checkpoint: its config and its tensors, under their names and in their form there."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_lora.errors import InputError, first_line
from lit_lora.gguf.families import Place, family_of
from lit_lora.gguf.file import GGUFFile, Stored, dequantize

__all__ = ["GGUFReader", "hf_shapes"]

# Computed from the config, so not part of a checkpoint. The factors become settings of rope.
_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")


class GGUFReader:
    """A GGUF file (or all parts of a split one) as Hugging Face tensors, dequantized on ``read``.

    Args:
        path: The file; of a split file, any part.

    Raises:
        InputError: Not GGUF, truncated, a missing part, an unsupported architecture, or tensors and metadata that do
            not describe a model of it.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        kind = self.metadata.get("general.type", "model")
        if kind != "model":
            raise InputError(f"{self._file.path}: holds {kind!r}, expected a whole model")
        self._family = family_of(self._file)
        self._config = self._family.config(self._file) | self._vocabulary()
        self._require_counts()
        self._shapes = hf_shapes(self._config, where=self._file.path)
        self._places = self._find_places()

    @property
    def files(self) -> list[Path]:
        """The parts of the file."""
        return self._file.files

    @property
    def metadata(self) -> dict[str, Any]:
        """All metadata by key."""
        return self._file.metadata

    def names(self) -> list[str]:
        """Hugging Face names of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds a tensor's values without loss: float16 or bfloat16 as stored, else float32."""
        unquantized = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
        return unquantized.get(self._stored(self._places[name])[0].kind, torch.float32)

    def quantizations(self) -> dict[str, int]:
        """Number of tensors by quantization, in alphabetical order."""
        counts = Counter(stored.kind.name for name, stored in self._file.tensors.items() if not _derived(name))
        return dict(sorted(counts.items()))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantized in float32 and rounded once to ``dtype``, in Hugging Face's form.

        Memory: the result (twice for those in another form) and about 0.1 GB of temporaries.
        """
        place = self._places[name]
        dtype = dtype or self.dtype(name)
        parts = [dequantize(stored, torch.float32 if place.op.computes else dtype) for stored in self._stored(place)]
        return place.op.to_hf(parts, self._config).to(dtype).contiguous()

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``, with the settings of rope as all versions of transformers read them."""
        config = copy.deepcopy(self._config)
        rope = config.pop("rope_parameters", None)
        if rope is None:
            return config
        if "full_attention" in rope:
            config["rope_parameters"] = rope
            config["rope_theta"] = rope["full_attention"]["rope_theta"]
            if rope["sliding_attention"]["rope_theta"] != config["rope_theta"]:
                config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            return config
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        return config

    def _vocabulary(self) -> dict[str, Any]:
        """What the embedding, the head and the tokenizer's metadata say."""
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise InputError(f"{self._file.path}: tensor token_embd.weight is missing")
        return {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self._family.model_type]],
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def _require_counts(self) -> None:
        """A damaged count of layers or experts must not make a model of millions of them."""
        path = self._file.path
        layers = self._file.number("block_count")
        stored = {name.split(".")[1] for name in self._file.tensors if name.startswith("blk.")}
        if layers != len(stored):
            raise InputError(f"{path}: tensors of {len(stored)} layers, but its block_count is {layers}")
        experts = self._file.get("expert_count") or 0
        for name, tensor in self._file.tensors.items():
            if name.endswith("_exps.weight") and tensor.shape[0] != experts:
                raise InputError(
                    f"{path}: tensor {name} has {tensor.shape[0]} experts, but its expert_count is {experts}"
                )

    def _find_places(self) -> dict[str, Place]:
        """Where every tensor of the model is stored; each stored one is part of some."""
        layers = self._file.number("block_count")
        stored = self._file.tensors
        places = {}
        for name, shape in self._shapes.items():
            candidates = self._family.places(name, layers)
            if not candidates:
                raise InputError(f"{self._file.path}: tensor {name} has no place in a {self._file.architecture} file")
            complete = [place for place in candidates if stored.keys() >= set(place.names)]
            if not complete:
                (missing, *_) = sorted(set(candidates[0].names) - stored.keys())
                raise InputError(f"{self._file.path}: tensor {missing} is missing, expected it for {name}")
            places[name] = complete[0]
            self._require_shape(name, shape, complete[0])

        used = {name for place in places.values() for name in place.names}
        for name in stored:
            if name not in used and not _derived(name):
                kind = f"a {self._file.architecture} model"
                raise InputError(f"{self._file.path}: tensor {name} is not part of {kind}, so it would be lost")
        return places

    def _require_shape(self, name: str, shape: tuple[int, ...], place: Place) -> None:
        parts = [torch.empty(stored.shape, device="meta") for stored in self._stored(place)]
        try:
            found = tuple(place.op.to_hf(parts, self._config).shape)
        except RuntimeError:
            found = tuple(parts[0].shape)
        if found != shape:
            raise InputError(
                f"{self._file.path}: tensor {place.names[0]}: shape {found}, expected {shape} from the metadata"
            )

    def _stored(self, place: Place) -> list[Stored]:
        stored = [self._file.tensors[name] for name in place.names]
        return stored if place.index is None else [one.part(place.index) for one in stored]


def _derived(name: str) -> bool:
    return name.endswith(_DERIVED)


def hf_shapes(config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that transformers saves for this config, by name, without a tied head.

    Raises:
        InputError: transformers cannot make a model of it.
    """
    try:
        settings = AutoConfig.for_model(**copy.deepcopy(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, trust_remote_code=False
            )
            once = {name for name, _ in model.named_parameters()}
            tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
            own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
            state = revert_weight_conversion(model, own)
    except Exception as error:  # whatever a config that does not add up makes transformers raise
        raise InputError(f"{where}: its metadata does not describe a model: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
