from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer, encode_prompt, encode_text
from tests.tokenizer.conftest import MakeTokenizer, change_json

KINDS = ["bytes", "prepend", "metaspace"]
SAMPLES = [
    "hello world",
    "  leading and trailing  ",
    "emoji 👩‍👩‍👧 and 😀!",
    "你好,世界。語",
    "مرحبا بالعالم",
    "tabs\tand\n\nlines\r\n",
    "<|im_end|> is text here",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_encoding_and_its_special_strings_stay_text(make: MakeTokenizer, kind: str, text: str) -> None:
    tokenizer = Tokenizer.load(make(kind=kind))
    ids = tokenizer.encode(text)
    # Metaspace puts its blank in front only where there is none, so a first blank is lost: the tokenizer's own rule.
    assert tokenizer.decode(ids) == (text.removeprefix(" ") if kind == "metaspace" else text)
    assert tokenizer.token_id("<|im_end|>") not in ids
    if "<|im_end|>" in text:
        assert tokenizer.token_id("<|im_end|>") in tokenizer.encode(text, special=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SAMPLES)
def test_pain_51_streamed_text_is_the_whole_text_without_broken_characters(
    make: MakeTokenizer, kind: str, text: str
) -> None:
    tokenizer = Tokenizer.load(make(kind=kind))
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 383), max_size=40))
def test_pain_51_any_ids_stream_to_their_text(chatml: Tokenizer, ids: list[int]) -> None:
    stream = chatml.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == chatml.decode(ids)


def test_an_unfinished_character_comes_out_at_the_end(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make())
    ids = tokenizer.encode("a😀")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_pain_05_the_folder_name_means_nothing(make: MakeTokenizer, tmp_path: Path) -> None:
    folder = make("llama3", bos=True)
    messages = [{"role": "user", "content": "hello"}]
    tokenizers_ = [Tokenizer.load(folder)]
    for name in ("Meta-Llama-3-8B-Instruct", "SmolLM2-135M", "final"):
        shutil.copytree(folder, tmp_path / name)
        tokenizers_.append(Tokenizer.load(tmp_path / name))
    assert len({tokenizer.fingerprint for tokenizer in tokenizers_}) == 1
    assert len({tuple(encode_text(tokenizer, "hello")) for tokenizer in tokenizers_}) == 1
    assert len({tuple(encode_prompt(tokenizer, messages)) for tokenizer in tokenizers_}) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_read_back_the_same_by_us_and_by_transformers(
    make: MakeTokenizer, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer

    folder = make("llama3", kind=kind, bos=True)
    change_json(folder / "generation_config.json", eos_token_id=[0, 7], temperature=0.6)
    tokenizer = Tokenizer.load(folder)
    tokenizer.add_tokens(["ticketish", "hello"])
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.stop_ids == tokenizer.stop_ids
    text = "hello ticketish world"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert encode_text(again, text) == encode_text(tokenizer, text) == theirs(text)["input_ids"]
    assert theirs.pad_token == "<|endoftext|>"


def test_added_tokens_are_words_and_known_ones_keep_their_ids(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make())
    size, before = tokenizer.vocab_size, tokenizer.fingerprint
    ids = tokenizer.add_tokens(["[TICKET]", "<|im_end|>", "[/TICKET]"])
    assert ids == [size, 2, size + 1]
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.fingerprint != before
    assert tokenizer.encode("[TICKET]x[/TICKET]") == [size, *tokenizer.encode("x"), size + 1]
    assert tokenizer.decode([size]) == "[TICKET]"


def test_stop_ids_come_from_every_file_that_names_them(make: MakeTokenizer) -> None:
    folder = make("llama3")
    change_json(folder / "generation_config.json", eos_token_id=[3, 4])
    change_json(folder / "config.json", eos_token_id=9)
    tokenizer = Tokenizer.load(folder)
    eos, end_of_turn = tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|eot_id|>")
    assert tokenizer.stop_ids == {3, 4, 9, eos, end_of_turn}
    assert tokenizer.end_of_turn_id == end_of_turn


def test_named_tokens_are_found_wherever_they_stand(make: MakeTokenizer) -> None:
    folder = make("llama3")
    change_json(folder / "tokenizer_config.json", bos_token=None, eos_token={"content": "</s>"}, pad_token=None)
    change_json(folder / "special_tokens_map.json", pad_token="[PAD]")
    change_json(folder / "config.json", bos_token_id=3, eos_token_id=0)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_id == 3
    assert tokenizer.eos_id == tokenizer.token_id("</s>")
    assert tokenizer.pad_id == tokenizer.vocab_size - 1  # it was not in the vocabulary


def test_a_template_in_the_config_is_used_also_in_a_list(make: MakeTokenizer) -> None:
    folder = make()
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", chat_template=text)
    assert Tokenizer.load(folder).chat_template == text
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    change_json(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.load(folder).chat_template == text
    change_json(folder / "tokenizer_config.json", chat_template=[1])
    with pytest.raises(InputError, match="chat_template: expected text or a list"):
        Tokenizer.load(folder)


def test_truncation_and_padding_of_the_file_are_not_used(make: MakeTokenizer) -> None:
    folder = make()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("hello world, hello there")) == "hello world, hello there"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", '{"version": "1.0", "trunc', "tokenizer.json: the tokenizers library cannot read it"),
        ("tokenizer_config.json", "{\n oops", "tokenizer_config.json:2: not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object, got list"),
        ("generation_config.json", "{", "generation_config.json:1: not valid JSON"),
    ],
)
def test_a_broken_file_is_named(make: MakeTokenizer, name: str, content: str, problem: str) -> None:
    folder = make()
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=problem):
        Tokenizer.load(folder)


def test_a_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path / "nowhere")
    assert "lit-lora download" in str(caught.value.hint)


def test_pain_45_loading_opens_no_socket(make: MakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer = Tokenizer.load(make())
    assert encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])


def test_the_files_written_hold_no_template_twice(make: MakeTokenizer, tmp_path: Path) -> None:
    folder = make()
    change_json(folder / "tokenizer_config.json", chat_template="other")
    Tokenizer.load(folder).save(tmp_path / "saved")
    assert "chat_template" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()


def test_a_tokenizer_of_another_model_is_refused_when_it_is_read(make: MakeTokenizer) -> None:
    folder = make()  # 384 tokens
    for config in ({"vocab_size": 384}, {"text_config": {"vocab_size": 400}}, {"model_type": "x"}):
        change_json(folder / "config.json", vocab_size=None, text_config=None)
        change_json(folder / "config.json", **config)
        Tokenizer.load(folder)
    change_json(folder / "config.json", vocab_size=320, text_config=None)
    with pytest.raises(InputError, match="the tokenizer has 384 tokens, the model's embedding 320") as caught:
        Tokenizer.load(folder)
    assert "of different models" in str(caught.value.hint)
    change_json(folder / "config.json", vocab_size=384, eos_token_id=9999)
    with pytest.raises(InputError, match="the model ends a text with id 9999, which is no token"):
        Tokenizer.load(folder)


def test_a_padding_token_may_lack_a_row_in_the_embedding_but_an_end_may_not(
    make: MakeTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    change_json(folder / "config.json", vocab_size=384)
    change_json(folder / "tokenizer_config.json", pad_token="[PAD]")
    assert Tokenizer.load(folder).pad_id == 384
    assert capsys.readouterr().err == ""
    change_json(folder / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(InputError, match=r"386 tokens, the model's embedding 384 \(<\|end\|>, \[PAD\] beyond it\)"):
        Tokenizer.load(folder)
    assert "eos_token '<|end|>' is not in the vocabulary" in capsys.readouterr().err


def test_tokens_with_other_ids_than_the_vocabularys_are_named(
    make: MakeTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<|im_end|>"}})
    Tokenizer.load(folder)
    assert "'<|im_end|>' has the id 7, but 2 in the vocabulary, which is used" in capsys.readouterr().err
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={"32000": {"content": "<|new|>"}})
    with pytest.raises(InputError, match=r"'<\|new\|>' has the id 32000, but 384 in the vocabulary"):
        Tokenizer.load(folder)
