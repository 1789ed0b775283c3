"""The tokenizer inside a GGUF file, rebuilt as ``tokenizer.json`` and the files that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.files import write_text
from lit_lora.gguf.pre_tokenizers import PRE_TOKENIZERS
from lit_lora.tokenizer.assembly import begin_and_end, ranked_merges

__all__ = ["write_tokenizer"]

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Tokens that end a turn or a text in common chat templates; a checkpoint stops at those it has as control tokens.
_END_TOKENS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>", "<|user|>"),
    *("<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<|end_of_role|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
)


def write_tokenizer(metadata: dict[str, Any], folder: Path, source: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json`` into ``folder``.

    Args:
        metadata: The GGUF file's metadata.
        folder: Where to write.
        source: The GGUF file, for messages.

    Raises:
        InputError: The metadata holds no tokenizer, or one of an unsupported kind.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        what = f"its tokenizer {kind!r} is not supported, expected 'gpt2' or 'llama'" if kind else "no tokenizer in it"
        raise InputError(f"{source}: {what}", hint="give a folder that has tokenizer.json with --tokenizer FOLDER")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    tokenizer = _byte_level(metadata, tokens, source) if kind == "gpt2" else _sentencepiece(metadata, tokens, types)

    special = [tokens[index] for index, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    user_defined = [tokens[index] for index, type_ in enumerate(types) if type_ == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])
    _add_bos_and_eos(tokenizer, metadata, tokens, kind)

    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens))
    _write_json(folder / "generation_config.json", _generation_config(metadata, tokens, types))


def _byte_level(metadata: dict[str, Any], tokens: list[str], source: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, its pre-tokenizer chosen by name."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
        log.warn(
            f"{source}: names no pre-tokenizer; using the default, which may not be the model's "
            "(--tokenizer FOLDER takes the original)"
        )
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{source}: pre-tokenizer {pre!r} is not known, so texts would be split into wrong tokens",
            hint="give a folder that has the model's tokenizer.json with --tokenizer FOLDER",
        )
    known = PRE_TOKENIZERS[pre]
    pairs = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=known.whole_words))
    if known.composes:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: of all neighboring pieces, those whose joined piece has the best score are joined first."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("tokenizer.ggml.scores") or [-float(index) for index in range(len(tokens))]
    unknown = next((tokens[index] for index, type_ in enumerate(types) if type_ == _UNKNOWN), None)

    priorities = {token: -scores[index] for index, token in enumerate(tokens) if types[index] == _NORMAL}
    pairs = ranked_merges(priorities, vocabulary)  # as SentencePiece itself, the file stores no merges
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    normalizer: list[Any] = [normalizers.Replace(" ", "▁")]
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizer.insert(0, normalizers.Prepend("▁"))
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalizer) if len(normalizer) > 1 else normalizer[0]
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], kind: str) -> None:
    """Let ``tokenizer`` add BOS and EOS around a text where the file says so, if special tokens are asked for."""
    pre = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "default"))
    bos_by_default = kind == "llama" or (pre is not None and pre.adds_bos)
    bos = _token(metadata, tokens, "bos") if metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) else None
    eos = _token(metadata, tokens, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    steps = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    around = begin_and_end(bos, eos, {token: tokens.index(token) for token in (bos, eos) if token})
    if around is not None:
        tokenizer.post_processor = processors.Sequence([*steps, around])
    elif steps:
        tokenizer.post_processor = steps[0]


def _token(metadata: dict[str, Any], tokens: list[str], role: str) -> str | None:
    """The token of a role such as ``bos``; ``None`` where the file names none, or one beyond the vocabulary."""
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _token(metadata, tokens, role)
        if token is not None:
            config[f"{key}_token"] = token
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _generation_config(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    candidates = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    control_tokens = {
        token: index for index, (token, type_) in enumerate(zip(tokens, types, strict=False)) if type_ == _CONTROL
    }
    candidates += [control_tokens.get(token) for token in _END_TOKENS]
    stops = list(dict.fromkeys(index for index in candidates if index is not None))

    config: dict[str, Any] = {}
    if "tokenizer.ggml.bos_token_id" in metadata:
        config["bos_token_id"] = metadata["tokenizer.ggml.bos_token_id"]
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if "tokenizer.ggml.padding_token_id" in metadata:
        config["pad_token_id"] = metadata["tokenizer.ggml.padding_token_id"]
    return config


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
