"""The tokenizer inside a GGUF file, rebuilt as ``tokenizer.json`` with the files that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.files import write_text

__all__ = ["write_tokenizer"]

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# Tokens that end a turn or a text in the chat templates in use; a checkpoint stops on those it has as control tokens.
_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "</s>")

_CONTRACTIONS = r"'(?:[sdmt]|ll|ve|re)"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> regular expressions applied one after the other, each splitting the pieces of the one before
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),  # every digit alone, though the second expression would join a run of them
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "codeshell": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "tekken": (_TEKKEN,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_LLAMA3_LIKE = ("llama-bpe", "llama-v3", "llama3", "falcon3", "tekken")


def write_tokenizer(metadata: dict[str, Any], folder: Path, source: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json`` into ``folder``.

    Args:
        metadata: The GGUF file's metadata.
        folder: Where to write.
        source: The GGUF file, for messages.

    Raises:
        InputError: The metadata holds no tokenizer, or one of a kind that is not known here.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        what = f"its tokenizer {kind!r} is not supported, expected 'gpt2' or 'llama'" if kind else "no tokenizer in it"
        raise InputError(f"{source}: {what}", hint="give a folder that has tokenizer.json by --tokenizer FOLDER")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer = _byte_level(metadata, tokens, source) if kind == "gpt2" else _sentencepiece(metadata, tokens, types)
    special = [_added(tokens[index], True) for index, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([_added(tokens[index], False) for index, type_ in enumerate(types) if type_ == _USER_DEFINED])
    _add_bos_and_eos(tokenizer, metadata, tokens, kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens))
    _write_json(folder / "generation_config.json", _generation_config(metadata, tokens, types))


def _byte_level(metadata: dict[str, Any], tokens: list[str], source: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, its pre-tokenizer chosen by name."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
        log.warn(f"{source}: names no pre-tokenizer, the default may not be the model's; --tokenizer FOLDER is safer")
    if pre not in _SPLITS:
        raise InputError(
            f"{source}: pre-tokenizer {pre!r} is not known, so its tokens would come out wrong",
            hint="give a folder that has the model's tokenizer.json by --tokenizer FOLDER",
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata["tokenizer.ggml.merges"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3_LIKE))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: of two neighbours, those whose joined piece has the best score are joined first."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("tokenizer.ggml.scores") or [-float(index) for index in range(len(tokens))]
    unknown = next((tokens[index] for index, type_ in enumerate(types) if type_ == _UNKNOWN), None)
    merges = [
        (-scores[index], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for index, piece in enumerate(tokens)
        if types[index] == 1
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], kind: str) -> None:
    """What other programs add around a text when they ask for special tokens."""
    starts = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_LIKE
    bos = _token(metadata, tokens, "bos") if metadata.get("tokenizer.ggml.add_bos_token", starts) else None
    eos = _token(metadata, tokens, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    byte_level = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    if bos is None and eos is None:
        if byte_level:
            tokenizer.post_processor = byte_level[0]
        return
    around = [*([bos] if bos else []), "{}", *([eos] if eos else [])]
    template = processors.TemplateProcessing(
        single=" ".join(part.format("$A") for part in around),
        pair=" ".join([part.format("$A") for part in around] + [f"{part.format('$B')}:1" for part in around]),
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys([bos, eos]) if token],
    )
    tokenizer.post_processor = processors.Sequence([*byte_level, template])


def _token(metadata: dict[str, Any], tokens: list[str], role: str) -> str | None:
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
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    controls = {
        token: index for index, (token, type_) in enumerate(zip(tokens, types, strict=False)) if type_ == _CONTROL
    }
    ends += [controls.get(token) for token in _END_TOKENS]
    stops = list(dict.fromkeys(index for index in ends if index is not None))
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
