"""Every token's target, against a slow reference that knows nothing of marks, spans or offsets."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lit_lora.data.config import DataConfig
from lit_lora.data.encode import encode_samples
from lit_lora.data.findings import Findings
from lit_lora.data.rows import Status
from lit_lora.data.sample import Conversation
from lit_lora.tokenizer import Message, Tokenizer, encode_prompt
from lit_lora.tokenizer.templates import NAMED, named_template
from tests.tiny import tiny_tokenizer

BOS, EOS = "<s>", "</s>"
SPECIALS = tuple(dict.fromkeys([BOS, EOS, *(token for tokens in NAMED.values() for token in tokens)]))
TEXTS = st.lists(st.sampled_from([*"ab \n\té😀語.", "  ", "\n\n", *SPECIALS]), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizers_by_template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("all")
    tiny_tokenizer(folder, template=None, vocab_size=420, specials=SPECIALS, bos=BOS, eos=EOS, pad=EOS)
    _merge_white_space(folder / "tokenizer.json")
    loaded = {}
    for name in NAMED:
        loaded[name] = Tokenizer.load(folder)
        loaded[name].use_template(named_template(name, starts_with_bos=False), name)
    return loaded


def _merge_white_space(path: Path) -> None:
    """Add tokens of several line breaks and spaces, which reach over the start of an answer where they can."""
    values = json.loads(path.read_text())
    model = values["model"]
    merges = []
    for left, right in (("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ġ"), ("ĊĊ", "Ġ"), (":", "Ċ"), ("Ċ", "ĠĠ")):
        model["vocab"].setdefault(left + right, len(model["vocab"]))
        merges.append([left, right])
    model["merges"] = [*merges, *(merge for merge in model["merges"] if merge not in merges)]
    path.write_text(json.dumps(values))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return Conversation(messages, context_only=frozenset(draw(st.sets(st.sampled_from(answers)))))


def _render(source: str, messages: list[Any], generation_prompt: bool = False) -> str:
    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=generation_prompt,
        bos_token=BOS,
        eos_token=EOS,
    )
    return str(rendered[0][0])


def _targets(source: str, messages: list[Any], learned: list[int]) -> list[tuple[bool, str]]:
    """The text of the conversation, cut where the targets begin and end: from what the model is asked by to the token
    that ends its turn.
    """
    text = _render(source, messages)
    parts = []
    position = 0
    for index in learned:
        prompt = _render(source, messages[:index], generation_prompt=True)
        turn = _render(source, messages[: index + 1])
        assert text.startswith(prompt)
        assert text.startswith(turn)
        assert turn.startswith(prompt)
        # The same turn with an answer that is easily found shows what follows an answer.
        other = _render(source, [*messages[:index], {"role": "assistant", "content": "QZX"}])
        after = other.rpartition("QZX")[2]
        assert turn.endswith(after)
        end_of_turn = max(after.rfind(token) + len(token) for token in SPECIALS if token in after)
        end = len(turn) - len(after) + end_of_turn
        parts += [(False, text[position : len(prompt)]), (True, text[len(prompt) : end])]
        position = end
    return [part for part in [*parts, (False, text[position:])] if part[1]]


def _check(tokenizer: Tokenizer, conversation: Conversation, learn: str) -> None:
    source = tokenizer.template.text
    messages: list[Any] = conversation.messages
    config = DataConfig.model_validate({"path": "x", "learn": learn, "max_seq_length": 100_000})
    (row,) = encode_samples(tokenizer, [conversation], [("rows.jsonl", 1)], config, Findings())

    learned = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip() and index not in conversation.context_only:
            learned.append(index)
    if learn == "last":
        learned = learned[-1:]
    if learn == "all":
        assert all(row.loss_mask)
        assert tokenizer.decode(row.ids, skip_special=False) == _render(source, messages)
    elif not learned:
        assert row.status is Status.NOTHING_TO_LEARN
        return
    else:
        parts = []
        for is_target, pairs in groupby(zip(row.ids, row.loss_mask, strict=True), key=lambda pair: pair[1]):
            parts.append((is_target, tokenizer.decode([token for token, _ in pairs], skip_special=False)))
        assert parts == _targets(source, messages, learned)

    # The special tokens are those that the template writes, none those of the users.
    special_ids = [tokenizer.token_id(token) for token in SPECIALS]
    harmless = [{**message, "content": "x"} for message in messages]
    expected = tokenizer.encode(_render(source, harmless), special=True)
    assert [i for i in row.ids if i in special_ids] == [i for i in expected if i in special_ids]
    for index in learned:
        prompt = encode_prompt(tokenizer, messages[:index])
        assert list(row.ids[: len(prompt)]) == prompt


CASES = given(
    name=st.sampled_from(sorted(NAMED)), conversation=conversations(), learn=st.sampled_from(["answers", "last", "all"])
)
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=300, **COMMON)  # type: ignore[arg-type]
@CASES
def test_every_target_is_what_a_slow_reference_says(
    tokenizers_by_template: dict[str, Tokenizer], name: str, conversation: Conversation, learn: str
) -> None:
    _check(tokenizers_by_template[name], conversation, learn)


@pytest.mark.slow
@settings(max_examples=20_000, **COMMON)  # type: ignore[arg-type]
@CASES
def test_every_target_of_20_000_conversations_is_what_a_slow_reference_says(
    tokenizers_by_template: dict[str, Tokenizer], name: str, conversation: Conversation, learn: str
) -> None:
    _check(tokenizers_by_template[name], conversation, learn)
