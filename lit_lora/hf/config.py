"""The config of any decoder: our own by its family, or one of transformers' by the facts that its config class knows.

The family that counts is that of the text model, which may be a part of a composite checkpoint. transformers takes a
second to import, so it is imported only for a composite, and for a type that our decoder does not implement.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora.config import did_you_mean, validate
from lit_lora.errors import InputError, UsageError, first_line
from lit_lora.files import read_json
from lit_lora.hf.quiet import quiet
from lit_lora.model import FAMILIES, ModelConfig
from lit_lora.model.config import Rope, text_part, with_fields, with_text_part
from lit_lora.model.families import HOSTED, LLAMA_LIKE, DecoderNames
from lit_lora.model.quantization import require_readable, without_quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["UNLIMITED", "HostedConfig", "config_from_hf", "is_decoder", "read_config", "text_config"]

UNLIMITED = 1 << 20
"""The context of a model that names no limit, such as a recurrent one."""


class HostedConfig(ModelConfig):
    """Sizes of a model that transformers implements, read from its own config class.

    ``source`` is ``config.json`` as read; of a composite model, that of all its parts. The other fields describe the
    text model, in the words of Llama's config.
    """

    @property
    def ropes(self) -> list[Rope]:
        """None: the model rotates queries and keys itself."""
        return []

    @property
    def names(self) -> DecoderNames:
        """The type's names of the parts, Llama's unless the table has others."""
        return HOSTED.get(self.model_type, LLAMA_LIKE)

    def extended(self, factor: float, rope_type: str = "linear") -> ModelConfig:
        """Refused: transformers' models scale positions each in its own way.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"a longer context is not supported for model_type {self.model_type!r}",
            hint=f"the model types whose context can be extended are {', '.join(FAMILIES)}",
        )

    def to_hf(self) -> dict[str, Any]:
        """``config.json`` as read, with the fields that finetuning has changed, and without quantization."""
        return _with_changes(self)


class CompositeConfig(ModelConfig):
    """Sizes and options of our own decoder, where it is the text model of a composite checkpoint.

    ``source`` is ``config.json`` as read, of all parts.
    """

    def to_hf(self) -> dict[str, Any]:
        """``config.json`` as read, with the fields that finetuning has changed, and without quantization."""
        return _with_changes(self)


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint of any decoder.

    Returns:
        A :class:`HostedConfig` for a type that our decoder does not implement, a :class:`CompositeConfig` for a
        composite whose text model it does.

    Raises:
        InputError: It is missing or not JSON, no model can be built from it, or that would run code of the checkpoint.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return ModelConfig.from_folder(folder)  # has the message
    return config_from_hf(read_json(path), name=str(path))


def config_from_hf(data: dict[str, Any], *, name: str = "config.json") -> ModelConfig:
    """As :func:`read_config`, from a parsed ``config.json``.

    Raises:
        InputError: No model can be built from it, or that would run code of the checkpoint.
    """
    model_type = data.get("model_type")
    if model_type in FAMILIES:
        return ModelConfig.from_hf(data, name=name)
    _require_supported(data, name)
    require_readable(data, name)
    try:
        text = text_config(data)
    except Exception as error:  # a config class validates as it likes
        raise InputError(f"{name}: transformers cannot read it as {model_type!r}: {first_line(error)[:200]}") from error
    if text.model_type in FAMILIES and text_part(data) is not data:
        # As transformers' class has it, because files of composites leave out what is the default.
        own = CompositeConfig.from_hf(text.to_dict(), name=f"{name}: text_config")
        return own.model_copy(update={"source": data})
    _require_decoder(text, str(model_type), name)
    try:
        return validate(_facts(text, data), HostedConfig, name=name)
    except UsageError as error:
        raise InputError(str(error)) from error


def text_config(data: dict[str, Any]) -> PretrainedConfig:
    """Transformers' config of the text model that ``config.json`` describes, a composite model's or the model itself.

    Dropout is off in it: the base is frozen, and methods have a dropout of their own.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[data["model_type"]]
    plain = {key: value for key, value in without_quantization(data).items() if key != "auto_map"}
    with quiet():
        whole = kind.from_dict(_with_floats(plain))
    text: PretrainedConfig = whole.get_text_config(decoder=True)
    text.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)  # not all have it
    text.dtype = text.dtype or whole.dtype
    return text


def _with_floats(data: Any) -> Any:
    """A parsed ``config.json`` with its infinities, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(data, dict):
        if data.keys() == {"__float__"}:
            return float(data["__float__"])
        return {key: _with_floats(value) for key, value in data.items()}
    return [_with_floats(value) for value in data] if isinstance(data, list) else data


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether models of a config predict the next token, and have no encoder."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    # transformers can also build encoders with a causal mask, which their checkpoints were not trained with.
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return causal and (not masked or bool(getattr(config, "is_decoder", False)))


def _require_supported(data: dict[str, Any], name: str) -> None:
    """Refuse types that transformers does not have, and those that only code of the checkpoint implements.

    Raises:
        InputError: With what to do instead.
    """
    from transformers import CONFIG_MAPPING

    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{name}: model_type is missing, expected the name of an architecture, such as 'llama'")
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" in data:
        raise InputError(
            f"{name}: model_type {model_type!r} exists only as Python code in the checkpoint (auto_map), "
            "which lit-lora never runs",
            hint="look for a version of this model that transformers implements, often named -hf",
        )
    raise InputError(
        f"{name}: model_type {model_type!r} is not supported{did_you_mean(model_type, list(CONFIG_MAPPING))}: neither "
        "lit-lora nor the installed transformers implements it",
        hint="a newer transformers may: pip install --upgrade transformers",
    )


def _require_decoder(text: PretrainedConfig, model_type: str, name: str) -> None:
    """Refuse types that do not predict the next token.

    Raises:
        InputError: With what to do instead.
    """
    if not is_decoder(text):
        raise InputError(
            f"{name}: model_type {model_type!r} is not a decoder, which predicts the next token",
            hint="encoders and encoder-decoders, such as BERT, RoBERTa and T5, are for recipe: classify",
        )


def _facts(text: PretrainedConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The fields of :class:`HostedConfig`, from the many names that config classes have for them."""
    values = text.to_dict()

    def number(*names: str, default: int) -> int:
        for name in names:
            value = values.get(text.attribute_map.get(name, name))
            if isinstance(value, list) and value:  # a size per layer
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    width = number("hidden_size", "d_model", "n_embd", default=1)
    bos = values.get("bos_token_id")
    heads = number("num_attention_heads", "n_heads", "num_heads", default=1)
    return {
        "model_type": text.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": width,
        "intermediate_size": number("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", default=4 * width),
        "num_hidden_layers": number("num_hidden_layers", "n_layers", "num_layers", default=1),
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", "num_kv_heads", default=heads),
        "head_dim": 2 * max(1, number("head_dim", default=width // heads) // 2),
        "max_position_embeddings": number("max_position_embeddings", "n_positions", "max_seq_len", default=UNLIMITED),
        "tie_word_embeddings": bool(getattr(text, "tie_word_embeddings", False)),
        "bos_token_id": bos if isinstance(bos, int) else None,
        "eos_token_id": values.get("eos_token_id"),
        "dtype": str(text.dtype or "float32").removeprefix("torch."),
        "source": source,
    }


def _with_changes(config: ModelConfig) -> dict[str, Any]:
    """``config.source`` with the fields that finetuning has changed, and without quantization."""
    data = without_quantization(config.source)
    as_read = _facts(text_config(config.source), config.source)
    changed = {
        key: getattr(config, key)
        for key in ("vocab_size", "tie_word_embeddings", "dtype")
        if getattr(config, key) != as_read[key]
    }
    text = text_part(data)
    if text is data:
        return with_fields(data, changed)
    # Of a composite, the text model's part counts for sizes, and that of the whole for the tie and the dtype, which
    # programs that open the text model alone read from its part.
    of_whole = {key: value for key, value in changed.items() if key != "vocab_size"}
    if not {"dtype", "torch_dtype"} & text.keys():
        changed.pop("dtype", None)
    return with_text_part(with_fields(data, of_whole), with_fields(text, changed))
