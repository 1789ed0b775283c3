"""Where byte-level tokenizers cut a text before they merge, by the name that ``tokenizer.ggml.pre`` has for it.

The expressions are those of the models' own tokenizers, which llama.cpp rewrites for its engine. Names that are not
listed are refused: a wrong cut gives wrong tokens without any other sign.
Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, which names they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut, and what goes with it.

    Attributes:
        splits: Regular expressions, each cutting the pieces that the one before it left.
        whole_words: Whether a piece that is in the vocabulary is taken whole, without merging.
        adds_bos: Whether BOS begins a text where the file does not say.
        composes: Whether texts are brought to Unicode's composed form (NFC) first. llama.cpp leaves that to its users.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


_CONTRACTIONS = r"'(?:[sdmt]|ll|ve|re)"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ANY_CASE}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_ANY_CASE}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN3_5 = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_ANY_CASE}?|{_LEAD}{_UPPER}+{_LOWER}*{_ANY_CASE}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_CHINESE_JAPANESE = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_SEED = rf"{_ANY_CASE}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"

_BY_NAMES: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 jais gigachat mellum exaone4 granite-docling a.x-4.0 trillion": PreTokenizer((_GPT2,)),
    "mpt olmo": PreTokenizer((_GPT2,), composes=True),
    # Every digit alone; the second expression by itself would keep runs of them together.
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((_DIGIT, _GPT2)),
    "llama-bpe llama-v3 llama3 falcon3 falcon-h1 midm-2.0 lfm2": PreTokenizer(
        (_LLAMA3,), whole_words=True, adds_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), whole_words=True),
    "qwen2": PreTokenizer((_QWEN2,), composes=True),
    "qwen35": PreTokenizer((_QWEN3_5,), composes=True),
    "deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((_GPT4O,)),
    "deepseek-v3 hunyuan-dense": PreTokenizer((r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _DIGIT)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    "seed-coder": PreTokenizer((_SEED,)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}

PRE_TOKENIZERS = {name: pre for names, pre in _BY_NAMES.items() for name in names.split()}
"""Every name that is known."""
