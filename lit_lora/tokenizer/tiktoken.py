"""Byte-level vocabularies as lists of ranks: tiktoken's files (Llama 3, Qwen) and Mistral's ``tekken.json``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lit_lora.tokenizer.assembly import begin_and_end, ranked_merges

__all__ = ["RankedVocabulary", "is_ranks", "parse_ranks", "parse_tekken", "tokenizer_of"]


@dataclass(frozen=True)
class RankedVocabulary:
    """Byte strings in the order in which they are joined, and the special tokens around them."""

    ranks: Mapping[bytes, int]
    pattern: str
    """Splits a text before its bytes are joined."""
    special: Mapping[str, int]
    """Special token -> id."""
    offset: int = 0
    """The id of rank 0."""
    named: Mapping[str, str] = field(default_factory=dict)
    """``bos_token`` and the like."""


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Number of ranks -> what the file leaves out: the pattern, the special tokens that follow, which of them is which.
_LLAMA3 = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
]
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
_KNOWN: dict[int, tuple[str, list[str], dict[str, str]]] = {
    128_000: (
        rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
        _LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    151_643: (rf"{_WORDS}|\p{{N}}|{_REST}", _QWEN, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
}

# The special tokens of tekken files that do not list them, up to version 7.
_TEKKEN_SPECIAL = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
]


def is_ranks(data: bytes) -> bool:
    """Whether a file has tiktoken's form: lines of base64 text and a number."""
    words = data[:1000].partition(b"\n")[0].split()
    return len(words) == 2 and words[1].isdigit() and data.isascii()


def parse_ranks(data: bytes) -> RankedVocabulary:
    """Read tiktoken's file, by whose length the model family is known.

    Raises:
        ValueError: A line is not of the form, or no known family has so many ranks.
    """
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number}: expected base64 text and a number") from error
    if len(ranks) not in _KNOWN:
        families = ", ".join(f"{count:,}" for count in _KNOWN)
        raise ValueError(f"{len(ranks):,} ranks; the pattern and special tokens are known for {families} only")
    pattern, special, named = _KNOWN[len(ranks)]
    return RankedVocabulary(
        ranks, pattern, {token: len(ranks) + number for number, token in enumerate(special)}, named=named
    )


def parse_tekken(data: Mapping[str, Any]) -> RankedVocabulary:
    """Read ``tekken.json``. Its special tokens come first, and only as many ranks count as its settings say.

    Raises:
        ValueError: A part is missing or is not of the form.
    """
    try:
        config = data["config"]
        specials = int(config["default_num_special_tokens"])
        count = int(config["default_vocab_size"]) - specials
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in data["vocab"][:count]}
        listed = data.get("special_tokens")
        names = _TEKKEN_SPECIAL if listed is None else [entry["token_str"] for entry in listed]
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a tekken file: {error}") from error
    names = [*names, *(f"<SPECIAL_{number}>" for number in range(len(names), specials))]
    special = {name: number for number, name in enumerate(names)}
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return RankedVocabulary(
        ranks, pattern, special, specials, {name: token for name, token in named.items() if token in special}
    )


def tokenizer_of(vocabulary: RankedVocabulary, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that gives tiktoken's ids.

    Args:
        vocabulary: From :func:`parse_ranks` or :func:`parse_tekken`.
        config: Contents of ``tokenizer_config.json``: ``add_bos_token``.
    """
    letters = _letters()
    words = {bytes_: "".join(letters[byte] for byte in bytes_) for bytes_ in vocabulary.ranks}
    ids = {words[bytes_]: rank + vocabulary.offset for bytes_, rank in vocabulary.ranks.items()}
    ids |= vocabulary.special
    merges = [(words[left], words[right]) for left, right in ranked_merges(vocabulary.ranks, vocabulary.ranks)]
    # A word of the vocabulary is taken whole, as tiktoken does, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocabulary.special])
    bos = vocabulary.named.get("bos_token") if config.get("add_bos_token", True) else None
    begin = begin_and_end(bos, None, vocabulary.special)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False), *([begin] if begin else [])]
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _letters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 introduced it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}
