from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lit_lora.errors import InputError
from lit_lora.gguf import write_tokenizer
from lit_lora.gguf.pre_tokenizers import PRE_TOKENIZERS
from tests.checkpoint.makers import tokenizer_metadata

TEXT = "I'll pay 1234.50€ for it,  OK?\n\n  Ça va? 你好 عربي 😀\tEND'S "


def build(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    write_tokenizer(metadata, folder, Path("model.gguf"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Where the pre-tokenizer cuts."""
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def pair(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer, and the same one rebuilt from its GGUF metadata."""
    rebuilt = build(tokenizer_metadata(tokenizer_folder), tmp_path_factory.mktemp("rebuilt"))
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")), rebuilt


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_a_byte_level_tokenizer_survives_gguf(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    own, rebuilt = pair
    assert rebuilt.encode(text).ids == own.encode(text).ids
    assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_and_skipped(pair: tuple[Tokenizer, Tokenizer]) -> None:
    _, rebuilt = pair
    assert rebuilt.encode("<|im_start|>user<|im_end|>").ids[0] == 1
    assert rebuilt.encode("<|im_end|>").ids == [2]
    assert rebuilt.decode([1, 2]) == ""


# Derived by hand from each family's published rule.
CASES = {
    "smollm": ["x", " ", "1", "2", "3", "'ll", " ", " go", "\n\n"],
    "starcoder": ["x", " ", "1", "2", "3", "'ll", " ", " go", "\n\n"],
    "gpt-2": ["x", " 123", "'ll", " ", " go", "\n\n"],
    "llama-bpe": ["x", " ", "123", "'ll", " ", " go", "\n\n"],
    "qwen2": ["x", " ", "1", "2", "3", "'ll", " ", " go", "\n\n"],
    "tekken": ["x", " ", "1", "2", "3", "'ll", " ", " go", "\n\n"],
    "default": ["x", " ", "123", "'", "ll", " ", " go", "\n\n"],
}


@pytest.mark.parametrize("pre", CASES)
def test_each_pre_tokenizer_cuts_by_its_own_rule(tokenizer_folder: Path, tmp_path: Path, pre: str) -> None:
    tokenizer = build(tokenizer_metadata(tokenizer_folder) | {"tokenizer.ggml.pre": pre}, tmp_path)
    assert pieces(tokenizer, "x 123'll  go\n\n") == CASES[pre]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "2026", ["2", "0", "2", "6"]),
        ("smollm", "٣٤ ½", ["٣", "٤", " ", "½"]),  # digits of every script, and numbers that are not digits
        ("llama-bpe", "1234567", ["123", "456", "7"]),
        ("llama-bpe", "DON'T(x)\r\ny", ["DON", "'T", "(x", ")\r\n", "y"]),
        ("gpt-2", "DON'T", ["DON", "'", "T"]),
        ("tekken", "HelloWorld ABCdef", ["Hello", "World", " ABCdef"]),
        ("default", "1234", ["123", "4"]),
        ("gpt-4o", "HelloWorld's 12345", ["Hello", "World's", " ", "123", "45"]),
        ("deepseek-v3", "a1234你好b", ["a", "123", "4", "你好", "b"]),
        ("deepseek-coder", "if x:\n 12", ["if", " x", ":", "\n", " ", "1", "2"]),
        ("falcon", "a+1234`", ["a", "+", "123", "4", "`"]),
        ("bloom", "in 1999, a.b", ["in", " 1999", ",", " a", ".", "b"]),
        ("viking", "in 1999", ["in", " ", "1", "9", "9", "9"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
    ],
)
def test_pre_tokenizers_differ_where_their_families_do(
    tokenizer_folder: Path, tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    tokenizer = build(tokenizer_metadata(tokenizer_folder) | {"tokenizer.ggml.pre": pre}, tmp_path)
    assert pieces(tokenizer, text) == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_no_pre_tokenizer_loses_text(tokenizer_folder: Path, tmp_path: Path, pre: str) -> None:
    tokenizer = build(tokenizer_metadata(tokenizer_folder) | {"tokenizer.ggml.pre": pre}, tmp_path)
    assert "".join(pieces(tokenizer, TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False).ids) == TEXT


def test_texts_are_composed_where_the_model_was_trained_on_that(tokenizer_folder: Path, tmp_path: Path) -> None:
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    metadata = tokenizer_metadata(tokenizer_folder)
    for pre, same in (("qwen2", True), ("olmo", True), ("stablelm2", False), ("gpt-2", False)):
        tokenizer = build(metadata | {"tokenizer.ggml.pre": pre}, tmp_path)
        assert (tokenizer.encode(decomposed).ids == tokenizer.encode(composed).ids) == same, pre


def test_an_unknown_pre_tokenizer_is_refused_with_the_remedy(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pre-tokenizer 'mystery' is not known") as caught:
        build(tokenizer_metadata(tokenizer_folder) | {"tokenizer.ggml.pre": "mystery"}, tmp_path)
    assert "--tokenizer" in str(caught.value.hint)


def test_a_file_without_a_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.gguf: no tokenizer in it"):
        build({}, tmp_path)
    with pytest.raises(InputError, match="tokenizer 'bert' is not supported"):
        build({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, tmp_path)


def test_the_files_beside_it_say_what_the_metadata_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    metadata = tokenizer_metadata(tokenizer_folder)
    build(metadata, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert config["chat_template"] == metadata["tokenizer.chat_template"]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0], "the end of turn first, then the end of text"


def test_end_of_turn_is_added_to_the_stops_of_a_llama3(tokenizer_folder: Path, tmp_path: Path) -> None:
    metadata = tokenizer_metadata(tokenizer_folder)
    metadata["tokenizer.ggml.tokens"][:3] = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    metadata |= {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
    }
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = build(metadata, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert tokenizer.encode("hi").ids[0] == 0, "Llama 3 begins a text with BOS"
    assert tokenizer.encode("hi", add_special_tokens=False).ids[0] != 0


# --- SentencePiece -------------------------------------------------------------------------------------------------

WORDS = ["▁the", "▁cat", "▁sat", "on", "▁on", "at", "▁t", "he", "th", "▁c", "▁s", "▁ca", "▁sa", "▁th", "in", "▁in"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *LETTERS]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(WORDS) + len(LETTERS))],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(LETTERS))],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def by_the_book(text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbors with the best score, the leftmost first; leftovers become bytes."""
    score = dict(zip(TOKENS, SENTENCEPIECE["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [
            (-score[left + right], place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in WORDS
        ]
        if not joined:
            break
        place = min(joined)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [TOKENS.index(symbol)] if symbol in TOKENS else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The SentencePiece tokenizer rebuilt."""
    return build(SENTENCEPIECE, tmp_path_factory.mktemp("sentencepiece"))


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="thecasoni é😀\n", max_size=30))
def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special_tokens=False).ids
    assert ids == by_the_book(text)
    assert sentencepiece.decode(ids) == text


def test_sentencepiece_adds_bos_where_the_file_says_nothing(tmp_path: Path) -> None:
    assert build(SENTENCEPIECE, tmp_path).encode("the").ids == [1, TOKENS.index("▁the")]
    silent = SENTENCEPIECE | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    assert build(silent, tmp_path).encode("the").ids == [TOKENS.index("t"), TOKENS.index("he")]
    both = SENTENCEPIECE | {"tokenizer.ggml.add_eos_token": True}
    assert build(both, tmp_path).encode("the").ids == [1, TOKENS.index("▁the"), 2]
