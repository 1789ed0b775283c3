from __future__ import annotations

import copy

import pytest
import torch

from lit_lora.errors import InputError
from lit_lora.generate import ChatSession, Sampling
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Tokenizer, encode_prompt

SHORT = Sampling(max_new_tokens=8)


def session(model: CausalLM, tokenizer: Tokenizer, **options: str) -> ChatSession:
    return ChatSession(model, tokenizer, SHORT, **options)  # type: ignore[arg-type]


def test_pain_54_what_the_model_reads_is_the_template_of_the_whole_history(
    model: CausalLM, tokenizer: Tokenizer
) -> None:
    chat = session(model, tokenizer, system="Be kind.")
    for turn in range(4):
        history = [*chat.messages, {"role": "user", "content": f"hello {turn}"}]
        said = "".join(chat.ask(f"hello {turn}"))
        prompt = encode_prompt(tokenizer, history)  # type: ignore[arg-type]
        assert chat.prefix_cache.ids[: len(prompt)] == prompt
        assert chat.prefix_cache.ids[len(prompt) :] == chat.last.ids[:-1]
        assert chat.messages == [*history, {"role": "assistant", "content": said}]
    assert [message["role"] for message in chat.messages].count("system") == 1


def test_an_answer_is_the_one_that_a_new_session_gives_to_the_same_history(
    model: CausalLM, tokenizer: Tokenizer
) -> None:
    chat = session(model, tokenizer)
    first = "".join(chat.ask("hello"))
    second = "".join(chat.ask("and?"))
    fresh = session(model, tokenizer)
    fresh.messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert "".join(fresh.ask("and?")) == second


def test_undo_takes_one_turn_back_and_keeps_the_system_prompt(model: CausalLM, tokenizer: Tokenizer) -> None:
    chat = session(model, tokenizer, system="Be kind.")
    assert not chat.undo()
    first = "".join(chat.ask("hello"))
    before = list(chat.messages)
    "".join(chat.ask("and?"))
    assert chat.undo()
    assert chat.messages == before
    assert chat.undo()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    assert not chat.undo()
    assert "".join(chat.ask("hello")) == first


def test_reset_keeps_or_replaces_the_system_prompt(model: CausalLM, tokenizer: Tokenizer) -> None:
    chat = session(model, tokenizer, system="Be kind.")
    "".join(chat.ask("hello"))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    chat.reset("Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.reset("")
    assert chat.messages == []


def test_a_broken_off_answer_stays_as_far_as_it_came(model: CausalLM, tokenizer: Tokenizer) -> None:
    chat = session(model, tokenizer)
    answer = chat.ask("hello")
    piece = next(answer)
    answer.close()
    assert chat.last.ended == "interrupted"
    assert chat.messages[-1] == {"role": "assistant", "content": piece}


def test_a_conversation_too_long_for_the_model_says_so_and_stays_as_it_was(
    model: CausalLM, tokenizer: Tokenizer
) -> None:
    chat = session(model, tokenizer)
    "".join(chat.ask("hello"))
    before = list(chat.messages)
    with pytest.raises(InputError, match=r"the conversation has .* tokens, the model's context is 256") as caught:
        "".join(chat.ask("word " * 300))
    assert "/undo" in str(caught.value.hint)
    assert chat.messages == before
    assert "".join(chat.ask("and?"))


def test_another_model_goes_on_with_the_history_and_reads_it_itself(model: CausalLM, tokenizer: Tokenizer) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    chat = session(model, tokenizer)
    "".join(chat.ask("hello"))
    fresh = session(other, tokenizer)
    fresh.messages = list(chat.messages)
    chat.use(other, tokenizer)
    assert "".join(chat.ask("and?")) == "".join(fresh.ask("and?"))
    assert chat.prefix_cache.cache is not None
    assert fresh.prefix_cache.cache is not None
    torch.testing.assert_close(chat.prefix_cache.cache.keys, fresh.prefix_cache.cache.keys)
