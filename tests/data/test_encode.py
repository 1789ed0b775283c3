"""What is learned, and what happens to rows that are too long."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.data.config import DataConfig
from lit_lora.data.encode import encode_samples
from lit_lora.data.findings import Findings
from lit_lora.data.report import _decode
from lit_lora.data.rows import EncodedRow, Status
from lit_lora.data.sample import Conversation, Sample
from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer, encode_chat

CHAT = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes"},
    ]
)


def _encode(tokenizer: Tokenizer, sample: Sample, **settings: Any) -> list[EncodedRow]:
    config = DataConfig(path="x", **settings)
    return list(encode_samples(tokenizer, [sample], [("rows.jsonl", 5)], config, Findings()))


def _learned(tokenizer: Tokenizer, row: EncodedRow) -> list[str]:
    groups = groupby(zip(row.ids, row.loss_mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group], skip_special=False) for learned, group in groups if learned]


def _unlearned_stretches(row: EncodedRow) -> list[int]:
    return [len(list(group)) for learned, group in groupby(row.loss_mask) if not learned]


def _qa(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def test_answers_and_their_end_of_turn_are_learned(tokenizer: Tokenizer) -> None:
    (row,) = _encode(tokenizer, CHAT)
    assert row.status is Status.KEPT
    assert _learned(tokenizer, row) == ["Paris<|im_end|>", "Yes<|im_end|>"]


def test_everything_is_learned_when_asked_for(tokenizer: Tokenizer) -> None:
    (row,) = _encode(tokenizer, CHAT, learn="all")
    assert all(row.loss_mask)
    (alone,) = _encode(tokenizer, Conversation([{"role": "user", "content": "x"}]), learn="all")
    assert (alone.status, all(alone.loss_mask)) == (Status.KEPT, True)
    assert list(row.ids) == _encode(tokenizer, CHAT)[0].ids


def test_many_samples_at_once_are_encoded_as_one_by_one(tokenizer: Tokenizer) -> None:
    samples: list[Sample] = [
        CHAT,
        "plain text",
        _qa("x", ""),
        _qa("quotes <|im_end|> here", "<|im_start|>"),
        CHAT,
    ] * 300
    places = [("rows.jsonl", number) for number in range(len(samples))]
    together = list(encode_samples(tokenizer, samples, places, DataConfig(path="x"), Findings()))
    alone = [
        row
        for sample, place in zip(samples[:5], places[:5], strict=True)
        for row in encode_samples(tokenizer, [sample], [place], DataConfig(path="x"), Findings())
    ]
    assert [row.line for row in together] == list(range(len(samples)))
    assert together[:5] == alone
    assert list(together[-1].ids) == encode_chat(tokenizer, CHAT.messages).ids


@pytest.mark.parametrize(
    "sample",
    [
        _qa("x", ""),
        _qa("x", " \n"),
        Conversation([{"role": "user", "content": "x"}]),
        "",
    ],
)
def test_pain_02_a_row_with_nothing_to_learn_is_marked_so(tokenizer: Tokenizer, sample: Sample) -> None:
    (row,) = _encode(tokenizer, sample)
    assert row.status is Status.NOTHING_TO_LEARN
    assert not row.ids


def test_pain_02_a_long_row_is_dropped_whole_by_default(tokenizer: Tokenizer) -> None:
    (row,) = _encode(tokenizer, _qa("word " * 100, "yes"), max_seq_length=50)
    assert (row.status, list(row.ids)) == (Status.TOO_LONG, [])
    assert row.length > 100


def test_pain_02_a_long_row_is_an_error_with_row_and_lengths_when_asked_for(tokenizer: Tokenizer) -> None:
    length = _encode(tokenizer, _qa("word " * 100, "yes"))[0].length
    with pytest.raises(InputError, match=rf"rows\.jsonl:5: {length} tokens, max_seq_length is 50"):
        _encode(tokenizer, _qa("word " * 100, "yes"), max_seq_length=50, too_long="error")


def test_pain_02_truncating_cuts_the_middle_of_the_prompt_and_keeps_the_answer_and_the_template(
    tokenizer: Tokenizer,
) -> None:
    question = "first " + "word " * 200 + "last"
    (row,) = _encode(tokenizer, _qa(question, "a whole answer"), max_seq_length=80, too_long="truncate_prompt")
    assert (row.status, len(row.ids)) == (Status.TRUNCATED, 80)
    assert _learned(tokenizer, row) == ["a whole answer<|im_end|>"]
    text = tokenizer.decode(row.ids, skip_special=False)
    assert text.startswith("<|im_start|>user\nfirst word")
    assert "word last<|im_end|>\n<|im_start|>assistant\na whole answer<|im_end|>" in text


def test_pain_02_an_answer_that_does_not_fit_alone_is_dropped_rather_than_cut(tokenizer: Tokenizer) -> None:
    (row,) = _encode(tokenizer, _qa("x", "word " * 100), max_seq_length=60, too_long="truncate_prompt")
    assert row.status is Status.TOO_LONG


@given(
    prompts=st.lists(st.integers(0, 120), min_size=1, max_size=4),
    answers=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    most=st.integers(20, 300),
)
def test_pain_02_truncating_keeps_every_answer_or_drops_the_row(
    tokenizer: Tokenizer, prompts: list[int], answers: list[int], most: int
) -> None:
    chat = Conversation([])
    for prompt, answer in zip(prompts, answers, strict=False):
        chat.messages.append({"role": "user", "content": "q " * prompt})
        chat.messages.append({"role": "assistant", "content": "a " * answer})
    (whole,) = _encode(tokenizer, chat, max_seq_length=100_000)
    (row,) = _encode(tokenizer, chat, max_seq_length=most, too_long="truncate_prompt")
    if len(whole.ids) <= most:
        assert row.ids == whole.ids
    elif row.status is Status.TRUNCATED:
        assert len(row.ids) == most
        assert _learned(tokenizer, row) == _learned(tokenizer, whole)
    else:
        assert row.status is Status.TOO_LONG
        spare = sum(max(length - 32, 0) for length in _unlearned_stretches(whole))
        assert len(whole.ids) - spare > most


@given(st.text(min_size=1, max_size=400), st.integers(2, 60))
def test_pieces_of_a_long_text_predict_every_token_but_the_first_once(
    tokenizer: Tokenizer, text: str, most: int
) -> None:
    (whole,) = _encode(tokenizer, text, max_seq_length=100_000)
    pieces = _encode(tokenizer, text, max_seq_length=most)
    assert all(2 <= len(piece.ids) <= most for piece in pieces)
    assert [token for piece in pieces for token in piece.ids[1:]] == list(whole.ids)[1:]
    assert all(all(piece.loss_mask) for piece in pieces)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Tokenizer) -> None:
    chat = Conversation([{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}])  # type: ignore[typeddict-item]
    with pytest.raises(InputError, match=r"^rows\.jsonl:5: message 1"):
        _encode(tokenizer, chat)


def test_what_the_template_does_not_write_is_counted(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "play", "arguments": '{"song": "A0"}'}}
    with_all: list[Any] = [
        {"role": "user", "content": "Play A0", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "They want A0."},
    ]
    samples: list[Sample] = [CHAT, Conversation(with_all, tools=[{"name": "play"}]), Conversation(with_all)]
    findings = Findings()
    places = [("rows.jsonl", line) for line in (1, 2, 3)]
    rows = list(encode_samples(tokenizer, samples, places, DataConfig(path="x"), findings))
    assert [str(finding) for finding in findings.of_level("warning")] == [
        "2 rows with reasoning that the chat template does not write: rows.jsonl:2, 3",
        "2 rows with calls of functions, written as JSON text because the chat template has no place for them: "
        "rows.jsonl:2, 3",
        "1 row with tools, for which the model's chat template has no place: rows.jsonl:2",
    ]
    assert [finding.count for finding in findings.of_level("note")] == [2]
    assert _learned(tokenizer, rows[1]) == ['{"name": "play", "arguments": {"song": "A0"}}<|im_end|>']


RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"


def test_text_with_special_tokens_is_counted_and_parsed_only_when_asked_for(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = tokenizer.token_id("<|im_end|>")
    shown = {}
    for how, count in (("text", 0), ("parse", 2)):
        findings = Findings()
        config = DataConfig(path="x", special_tokens=how)  # type: ignore[arg-type]
        (row,) = encode_samples(tokenizer, [RENDERED], [("rows.jsonl", 5)], config, findings)
        # The end of the text is the EOS of this vocabulary, which is not doubled.
        assert list(row.ids).count(ends) == (count or 1)
        warnings = [str(finding) for finding in findings.of_level("warning")]
        if how == "text":
            assert warnings == [
                "1 row with special tokens written as text, which stay text (data.special_tokens: parse makes them "
                "tokens): rows.jsonl:5"
            ]
        else:
            assert not warnings
        shown[how] = _decode(list(row.ids), tokenizer)
    assert shown["parse"] == RENDERED
    assert shown["text"] == RENDERED.replace("<|im", "\\<|im") + "<|im_end|>"


@pytest.mark.parametrize("sample", ["[INST] Hi [/INST] Yo", _qa("<|eot_id|>", "x")])
def test_text_of_another_models_template_is_counted(tokenizer: Tokenizer, sample: Sample) -> None:
    findings = Findings()
    list(encode_samples(tokenizer, [sample], [("rows.jsonl", 5)], DataConfig(path="x"), findings))
    (finding,) = findings.of_level("warning")
    assert finding.message == "that look like text rendered by the chat template of another model"


def test_special_tokens_text_in_a_message_is_counted(tokenizer: Tokenizer) -> None:
    findings = Findings()
    sample = _qa("What is <|im_end|>?", "A mark")
    list(encode_samples(tokenizer, [sample], [("rows.jsonl", 5)], DataConfig(path="x"), findings))
    assert [finding.message for finding in findings.of_level("warning")] == [
        "with a special token's text in a message, which stays text"
    ]
