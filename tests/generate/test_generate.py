from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.errors import InputError
from lit_lora.generate import PrefixCache, Sampling, answer_all, generate, stream_answer
from lit_lora.generate.answer import AnswerText
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Tokenizer

GREEDY = Sampling(max_new_tokens=24)
PROMPTS = st.lists(st.integers(3, 383), min_size=1, max_size=40)


def tokens(model: CausalLM, prompt: list[int], sampling: Sampling = GREEDY, **options: object) -> list[int]:
    return [step[0] for step in generate(model, [prompt], sampling, **options)]  # type: ignore[arg-type,misc]


def without_cache(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_nothing(model: CausalLM) -> None:
    prompt = list(range(5, 30))
    assert tokens(model, prompt) == without_cache(model, prompt, 24)


def test_a_prompt_longer_than_one_piece_is_read_right(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(5, 60))
    whole = tokens(model, prompt)
    monkeypatch.setattr("lit_lora.generate.decoding._PIECE", 7)
    assert tokens(model, prompt) == whole


@settings(deadline=None, max_examples=12)
@given(prompts=st.lists(PROMPTS, min_size=2, max_size=5), sampled=st.booleans())
def test_each_row_of_a_batch_is_as_if_alone(model: CausalLM, prompts: list[list[int]], sampled: bool) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0 if sampled else 0.0, seed=3, repetition_penalty=1.2)
    stop = set(range(0, 384, 11))  # rows end at different steps
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, sampling, stop_ids=stop):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    assert rows == [tokens(model, prompt, sampling, stop_ids=stop) for prompt in prompts]


@settings(deadline=None, max_examples=12)
@given(
    beginning=st.lists(st.integers(3, 383), min_size=14, max_size=60),
    ends=st.lists(PROMPTS, min_size=2, max_size=5),
)
def test_a_beginning_that_prompts_share_changes_nothing(
    model: CausalLM, beginning: list[int], ends: list[list[int]]
) -> None:
    prompts = [beginning + end for end in ends]
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, Sampling(max_new_tokens=6)):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    assert rows == [without_cache(model, prompt, 6) for prompt in prompts]


def test_a_beginning_that_prompts_share_is_read_once(model: CausalLM) -> None:
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    next(generate(model, [[*range(3, 103), end] for end in range(3, 13)], GREEDY))
    handle.remove()
    assert sum(read) == 100 + 10


@settings(deadline=None, max_examples=12)
@given(first=PROMPTS, second=PROMPTS, common=st.integers(0, 40))
def test_a_memory_gives_the_same_answer_and_keeps_the_common_beginning(
    model: CausalLM, first: list[int], second: list[int], common: int
) -> None:
    prefix_cache = PrefixCache()
    said = tokens(model, first, prefix_cache=prefix_cache)
    assert prefix_cache.ids == first + said[:-1]  # the last token was never read
    second = [*prefix_cache.ids[:common], *second]
    read: list[int] = []
    original = model.hidden_states

    def spy(ids: torch.Tensor, **options: object) -> torch.Tensor:
        read.append(ids.shape[1])
        return original(ids, **options)  # type: ignore[arg-type]

    model.hidden_states = spy  # type: ignore[method-assign]
    try:
        answer = tokens(model, second, prefix_cache=prefix_cache)
    finally:
        model.hidden_states = original  # type: ignore[method-assign]
    assert answer == tokens(model, second)
    assert read[0] <= len(second) - min(common, len(second) - 1, len(first) + len(said) - 1)


def test_a_memory_is_right_after_an_answer_was_broken_off(model: CausalLM) -> None:
    prefix_cache = PrefixCache()
    generation = generate(model, [[5, 6, 7]], GREEDY, prefix_cache=prefix_cache)
    next(generation)
    next(generation)
    assert tokens(model, [5, 6, 7, 8], prefix_cache=prefix_cache) == tokens(model, [5, 6, 7, 8])


def test_stop_ids_end_an_answer_and_are_given(model: CausalLM) -> None:
    free = tokens(model, [5, 6, 7])
    stop = free[5]
    assert tokens(model, [5, 6, 7], stop_ids={stop}) == free[: free.index(stop) + 1]


def test_pain_52_one_token_means_one_token_and_zero_temperature_repeats(model: CausalLM) -> None:
    assert len(tokens(model, [5], Sampling(max_new_tokens=1))) == 1
    assert tokens(model, [5]) == tokens(model, [5])


def test_a_seed_gives_the_same_draws_and_none_gives_others(model: CausalLM) -> None:
    hot = Sampling(max_new_tokens=24, temperature=3.0)
    seeded = hot.model_copy(update={"seed": 7})
    assert tokens(model, [5], seeded) == tokens(model, [5], seeded)
    assert tokens(model, [5], hot) != tokens(model, [5], hot)


def test_an_answer_ends_where_the_context_ends(model: CausalLM) -> None:
    assert len(tokens(model, [5] * 250, Sampling(max_new_tokens=100))) == 6


def test_a_prompt_longer_than_the_context_is_a_clear_error(model: CausalLM) -> None:
    with pytest.raises(InputError, match="256 tokens, which leaves no room for an answer: the model's context is 256"):
        generate(model, [[5], [5] * 256], GREEDY)
    with pytest.raises(InputError, match="empty"):
        generate(model, [[]], GREEDY)


def test_generation_leaves_training_mode_as_it_was_and_no_inference_tensors(model: CausalLM) -> None:
    model.train()
    try:
        tokens(model, [5])
        assert model.training
        assert all(module.training for module in model.modules())
        model(torch.tensor([[5, 6]])).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        model.zero_grad()
        model.eval()


def test_streamed_text_is_the_text_of_the_ids(model: CausalLM, tokenizer: Tokenizer) -> None:
    stream = stream_answer(model, tokenizer, [5, 6, 7], Sampling(max_new_tokens=60, temperature=1.5, seed=1))
    pieces = list(stream)
    assert all(pieces)
    answer = stream.answer
    assert "".join(pieces) == answer.text == tokenizer.decode(answer.ids)
    assert answer.ended == ("stop" if answer.ids[-1] in tokenizer.stop_ids else "length")


SENTENCE = "The capital of France is Paris, 你好 and 😀! The cap."


@settings(deadline=None)
@given(start=st.integers(0, len(SENTENCE) - 1), length=st.integers(1, 9), more=st.text(max_size=3))
def test_stop_strings_end_the_text_wherever_tokens_meet(
    tokenizer: Tokenizer, start: int, length: int, more: str
) -> None:
    stop = SENTENCE[start : start + length] + more
    text = AnswerText(tokenizer, [stop, "never said"])
    pieces = []
    for token in tokenizer.encode(SENTENCE):
        pieces.append(text.push(token))
        if text.ended:
            break
    pieces.append(text.finish("length"))
    found = stop in SENTENCE
    assert "".join(pieces) == text.text == SENTENCE.partition(stop)[0]
    assert text.ended == ("stop" if found else "length")


def test_text_that_only_begins_like_a_stop_string_is_not_lost(model: CausalLM, tokenizer: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=0)
    whole = "".join(stream_answer(model, tokenizer, [5, 6, 7], sampling))
    assert "".join(stream_answer(model, tokenizer, [5, 6, 7], sampling, stop=[whole[-2:] + "#"])) == whole


def test_many_answers_come_in_order_and_as_if_alone(model: CausalLM, tokenizer: Tokenizer) -> None:
    prompts = [[5 + i] * (1 + 7 * i % 13) for i in range(9)]
    done: list[int] = []
    answers = answer_all(model, tokenizer, prompts, GREEDY, batch_size=4, on_answer=done.append)
    for prompt, answer in zip(prompts, answers, strict=True):
        stream = stream_answer(model, tokenizer, prompt, GREEDY)
        assert "".join(stream) == answer.text
        assert stream.answer == answer
    assert sum(done) == 9
    assert answer_all(model, tokenizer, prompts, GREEDY, batch_tokens=1) == answers
    assert answer_all(model, tokenizer, [], GREEDY) == []
