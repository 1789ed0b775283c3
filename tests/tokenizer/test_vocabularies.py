"""Vocabularies in other files than ``tokenizer.json``: SentencePiece's, tiktoken's, Mistral's, GPT-2's."""

from __future__ import annotations

import base64
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from lit_lora.checkpoint.save import copy_side_files
from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer, encode_text, has_vocabulary
from lit_lora.tokenizer import tiktoken as ranked
from lit_lora.tokenizer.sentencepiece import parse, tokenizer_of
from tests.tiny import tiny_tokenizer
from tests.tokenizer.conftest import change_json
from tests.tokenizer.sentencepiece_model import sentencepiece_model, vocabulary

TEXTS = [
    "hello world",
    "  hello   world ",
    "hello\nworld\n",
    "naïve 😀",
    "<s> is text",
    "a<sep>hello",
    "▁hello",
    "",
    " ",
]


def write(folder: Path, data: bytes, name: str = "tokenizer.model") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
@pytest.mark.parametrize("user_defined", [[], ["<sep>"]])
def test_ids_are_those_of_sentencepiece(
    algorithm: int, byte_fallback: bool, add_dummy_prefix: bool, remove_extra_whitespaces: bool, user_defined: list[str]
) -> None:
    library = pytest.importorskip("sentencepiece")
    data = sentencepiece_model(
        vocabulary(byte_pieces=byte_fallback, user_defined=user_defined),
        algorithm=algorithm,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
    theirs = library.SentencePieceProcessor(model_proto=data)
    ours = tokenizer_of(parse(data), {})
    ours.encode_special_tokens = True
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


# What SentencePiece 0.2.3 gives.
KNOWN: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, "hello world", ["▁hello", "▁world"]),
    ({}, " hello", ["▁", "▁hello"]),
    ({}, "", []),
    ({}, "é", ["▁", "<0xC3>", "<0xA9>"]),
    ({}, "hello\n", ["▁hello", "\n"]),
    ({"algorithm": 1}, "hello world", ["▁hello", "▁world"]),
    ({"algorithm": 1}, "<s>", ["▁", "<", "s", ">"]),
    ({"remove_extra_whitespaces": True}, "  hello   world ", ["▁hello", "▁world"]),
    ({"remove_extra_whitespaces": True}, "hello\n", ["▁hello", "\n"]),
    ({"add_dummy_prefix": False}, "hello world", ["h", "ello", "▁world"]),
]


@pytest.mark.parametrize(("settings", "text", "expected"), KNOWN)
def test_known_pieces(tmp_path: Path, settings: dict[str, Any], text: str, expected: list[str]) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, sentencepiece_model(vocabulary(), **settings)))
    assert [tokenizer.token(token_id) for token_id in tokenizer.encode(text)] == expected


def test_runs_of_spaces_that_a_user_defined_are_one_piece(tmp_path: Path) -> None:
    data = sentencepiece_model(vocabulary(user_defined=["▁▁▁"]), add_dummy_prefix=False)
    tokenizer = Tokenizer.load(write(tmp_path, data))
    assert [tokenizer.token(token) for token in tokenizer.encode("a   hello")] == ["a", "▁▁▁", "h", "ello"]


def test_a_sentencepiece_folder_opens_with_bos_and_named_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, sentencepiece_model(vocabulary())))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert encode_text(tokenizer, "hello") == [1, *tokenizer.encode("hello")]
    for text in ("hello  world", " hello", "</s> is text", "naïve 😀\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 2 not in tokenizer.encode(text)
    change_json(tmp_path / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    assert encode_text(Tokenizer.load(tmp_path), "hello") == tokenizer.encode("hello")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_space_comes_after_special_tokens_only_as_transformers_has_it(tmp_path: Path, legacy: bool) -> None:
    write(tmp_path, sentencepiece_model(vocabulary()))
    change_json(tmp_path / "tokenizer_config.json", legacy=legacy)
    tokenizer = Tokenizer.load(tmp_path)
    pieces = [tokenizer.token(token) for token in tokenizer.encode("hello</s>world", special=True)]
    assert pieces == ["▁hello", "</s>", *(["▁world"] if legacy else ["w", "orld"])]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    size = len(vocabulary())
    write(tmp_path, sentencepiece_model(vocabulary()))
    change_json(tmp_path / "added_tokens.json", **{"<b>": size + 1, "<a>": size})
    assert Tokenizer.load(tmp_path).encode("<a><b>", special=True) == [size, size + 1]
    change_json(tmp_path / "added_tokens.json", **{"<a>": 32000, "<b>": 32001})
    with pytest.raises(InputError, match=rf"added_tokens\.json: '<a>' has the id 32000, but {size} in this vocabulary"):
        Tokenizer.load(tmp_path)


# Three letters of each, as if the bytes were words, so that a file of 128,000 ranks is quickly made.
def rank_file(count: int) -> bytes:
    words: list[bytes] = [bytes([byte]) for byte in range(256)]
    words += [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"12", b"123"]
    words += [b"wxyz"]  # to which no merges lead
    for number in range(count - len(words)):
        words.append(b"\xff" + number.to_bytes(3, "big") + b"\xfe")
    return b"\n".join(base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words)) + b"\n"


def test_llama_3s_ranks_open_with_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, rank_file(128_000)))
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert [tokenizer.token_id(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")] == [
        128_006,
        128_007,
        128_009,
    ]
    assert [tokenizer.token(token) for token in encode_text(tokenizer, "hello world1234")] == [
        "<|begin_of_text|>",
        "hello",
        "Ġworld",
        "123",
        "4",
    ]
    assert [tokenizer.token(token) for token in tokenizer.encode("wxyz wxy")] == ["wxyz", "Ġw", "x", "y"]
    tokenizer.choose_template("llama-3")
    assert 128_009 in tokenizer.stop_ids


def test_ids_of_ranks_are_those_of_tiktoken() -> None:
    library = pytest.importorskip("tiktoken")
    words = ranked.parse_ranks(rank_file(151_643))
    theirs = library.Encoding(
        name="test", pat_str=words.pattern, mergeable_ranks=dict(words.ranks), special_tokens=dict(words.special)
    )
    ours = ranked.tokenizer_of(words, {})
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, disallowed_special=()), text


def test_qwens_tiktoken_file_opens_and_is_saved_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path / "qwen", rank_file(151_643), "qwen.tiktoken")
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="QWenTokenizer", auto_map={"AutoTokenizer": ["a.B", None]}
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.token_id("<|im_end|>") == 151_645
    assert len(tokenizer.encode("123")) == 3
    (tmp_path / "copy").mkdir()
    copy_side_files(folder, tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    assert theirs("hello world 123")["input_ids"] == encode_text(tokenizer, "hello world 123")
    assert not (tmp_path / "copy" / "chat_template.jinja").exists()


def test_ranks_of_an_unknown_family_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model: 300 ranks; the pattern and special tokens are known for"):
        Tokenizer.load(write(tmp_path, rank_file(300)))


def tekken(count: int, special: list[str] | None) -> dict[str, Any]:
    words: list[bytes] = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello", b"beyond"]
    data: dict[str, Any] = {
        "config": {
            "pattern": r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
            "default_vocab_size": 260 + count,
            "default_num_special_tokens": count,
            "version": "v3",
        },
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)],
    }
    if special is not None:
        data["special_tokens"] = [{"rank": rank, "token_str": token} for rank, token in enumerate(special)]
    return data


@pytest.mark.parametrize("special", [None, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]])
def test_mistrals_tekken_file_opens(tmp_path: Path, special: list[str] | None) -> None:
    write(tmp_path, json.dumps(tekken(24, special)).encode(), "tekken.json")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 284
    assert encode_text(tokenizer, "hello") == [1, 24 + 259]  # "beyond" is one more than the settings count
    assert [tokenizer.token_id(token) for token in ("</s>", "[INST]", "[/INST]", "<SPECIAL_23>")] == [2, 3, 4, 23]
    assert tokenizer.decode(tokenizer.encode("naïve 😀 hello")) == "naïve 😀 hello"


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_vocabulary_with_merges_reads_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path / "fast")
    folder = tmp_path / "slow"
    folder.mkdir()
    tokenizers.Tokenizer.from_file(str(tmp_path / "fast" / "tokenizer.json")).model.save(str(folder))
    change_json(
        folder / "tokenizer_config.json", tokenizer_class=kind, eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    assert has_vocabulary(folder)
    tokenizer = Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in ("hello world 123", "  The order\n\n48213", "naïve"):
        assert encode_text(tokenizer, text) == theirs(text)["input_ids"]
    assert tokenizer.eos_id == theirs.eos_token_id


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no vocabulary in it"),
        (b"\x80" * 20, "not a SentencePiece model"),
        (sentencepiece_model(vocabulary())[:-30], "cut off"),
        (b"PK\x03\x04 zip file", "not a SentencePiece model|cut off"),
        (sentencepiece_model(vocabulary(), algorithm=4), "its algorithm is 'char', expected 'unigram' or 'bpe'"),
        (sentencepiece_model(vocabulary(user_defined=["<sep>"]), charsmap=b"xxxx"), "normalizes Unicode around"),
        (b"aGVsbG8= 0\naGVsbG8= x\n", "line 2: expected base64 text and a number"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path: Path, data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        Tokenizer.load(write(tmp_path, data))
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer.model: ")
    assert "tokenizer.json" in str(caught.value.hint)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="then transformers can read it")
def test_a_class_that_numbers_pieces_in_its_own_way_is_left_to_transformers(tmp_path: Path) -> None:
    write(tmp_path, sentencepiece_model(vocabulary()))
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="XGLMTokenizer")
    with pytest.raises(InputError, match="transformers cannot read it") as caught:
        Tokenizer.load(tmp_path)
    assert "pip install sentencepiece" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_a_saved_checkpoint_has_tokenizer_json(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    data = sentencepiece_model(vocabulary()) if name == "tokenizer.model" else rank_file(151_643)
    folder = write(tmp_path / "base", data, name)
    change_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=True)
    (tmp_path / "copy").mkdir()
    copied = copy_side_files(folder, tmp_path / "copy")
    assert copied == sorted([name, "tokenizer_config.json"])
    again, tokenizer = Tokenizer.load(tmp_path / "copy"), Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    for text in ("hello world", " hello", "naïve 😀"):
        assert encode_text(again, text) == encode_text(tokenizer, text) == theirs(text)["input_ids"]
