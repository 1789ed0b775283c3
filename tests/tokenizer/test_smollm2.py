"""SmolLM2's own tokenizer on real text, against transformers."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lit_lora.tokenizer import Message, Tokenizer, encode_chat, encode_prompt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    given = Path(os.environ.get("LIT_LORA_TEST_WEIGHTS", "unset"))
    places = [given, *sorted(given.parent.iterdir())] if given.exists() else []
    found = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    if found is None:
        pytest.skip("LIT_LORA_TEST_WEIGHTS is not set to a converted SmolLM2 folder, nor lies beside one")
    return found


@pytest.fixture(scope="module")
def conversations(real_data: Path) -> list[list[Message]]:
    with gzip.open(real_data / "train" / "dolly_15k.jsonl.gz", "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line, _ in zip(file, range(1500), strict=False)]
    found: list[list[Message]] = []
    for row, following in zip(rows[::2], rows[1::2], strict=True):
        chat: list[Message] = []
        for one in (row, following):
            chat.append({"role": "user", "content": f"{one['instruction']}\n{one['context']}"})
            chat.append({"role": "assistant", "content": one["response"]})
        found.append(chat)
    return found


def test_pain_03_ids_of_real_conversations_are_those_of_transformers(
    folder: Path, conversations: list[list[Message]]
) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for chat in conversations[:200]:
        assert encode_chat(ours, chat).ids == theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        prompt = theirs.apply_chat_template(chat[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert encode_prompt(ours, chat[:-1]) == prompt


def test_pain_06_every_answer_of_real_conversations_is_learned_whole(
    folder: Path, conversations: list[list[Message]]
) -> None:
    tokenizer = Tokenizer.load(folder)
    for chat in conversations:
        encoded = encode_chat(tokenizer, chat)
        learned = [token for token, learn in zip(encoded.ids, encoded.loss_mask, strict=True) if learn]
        answers = [str(message["content"]) + "<|im_end|>" for message in chat if message["role"] == "assistant"]
        # Blanks alone may differ: a token may hold the header's line end and the answer's first ones together.
        text = tokenizer.decode(learned, skip_special=False)
        assert text.replace("\n", "") == "".join(answers).replace("\n", "")


def test_pain_51_real_answers_stream_to_their_text(folder: Path, conversations: list[list[Message]]) -> None:
    tokenizer = Tokenizer.load(folder)
    texts = [str(chat[1]["content"]) for chat in conversations[:100]]
    for text in [*texts, "👩‍👩‍👧 你好,世界 مرحبا 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 é"]:
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in tokenizer.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == text


def test_digits_are_split_one_by_one(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.token(token) for token in tokenizer.encode("48213")] == ["4", "8", "2", "1", "3"]
