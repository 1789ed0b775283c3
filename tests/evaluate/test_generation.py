from __future__ import annotations

import json

import pytest

from lit_lora.data.sample import Conversation
from lit_lora.errors import UsageError
from lit_lora.evaluate import Share, evaluate_generation
from lit_lora.evaluate.shots import draw_shots, encode_after_shots, with_shots
from lit_lora.generate import Sampling, answer_all
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Message, Tokenizer, encode_chat, encode_prompt


def talk(question: str, answer: str, system: str | None = None) -> Conversation:
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return Conversation([*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def say(model: CausalLM, tokenizer: Tokenizer, question: str, tokens: int) -> str:
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    return answer_all(model, tokenizer, [prompt], Sampling(max_new_tokens=tokens))[0].text


def test_exact_match_counts_the_answers_that_the_model_really_gives(model: CausalLM, tokenizer: Tokenizer) -> None:
    questions = [f"hello number {i}, how are you?" * (1 + i % 3) for i in range(7)]
    spoken = [say(model, tokenizer, question, 12) for question in questions]
    conversations = [talk(question, answer) for question, answer in zip(questions, spoken, strict=True)]
    conversations[3] = talk(questions[3], "something that it does not say")
    scores = evaluate_generation(model, tokenizer, conversations, max_new_tokens=12, batch_size=3)
    assert scores.exact_match == Share(6, 7)
    assert [answer.answer for answer in scores.answers] == spoken
    assert (scores.rows, len(scores.samples), scores.valid_json, scores.fields) == (7, 3, None, {})


def test_the_answers_do_not_depend_on_the_batch(model: CausalLM, tokenizer: Tokenizer) -> None:
    conversations = [talk("hello " * n, json.dumps({"n": n})) for n in range(1, 10)]
    one, many = (evaluate_generation(model, tokenizer, conversations, batch_size=size) for size in (1, 50))
    assert [answer.answer for answer in one.answers] == [answer.answer for answer in many.answers]
    assert one.fields == many.fields == {"n": Share(0, 9)}
    assert one.valid_json == Share(0, 9)


def test_conversations_must_end_with_a_reference(model: CausalLM, tokenizer: Tokenizer) -> None:
    question = Conversation(talk("a", "b").messages[:1])
    with pytest.raises(UsageError, match="end with the assistant's answer"):
        evaluate_generation(model, tokenizer, [talk("a", "b"), question])


def test_shots_that_fill_the_context_are_refused(model: CausalLM, tokenizer: Tokenizer) -> None:
    shots = [talk("the quick brown fox " * 20, "yes")] * 3
    with pytest.raises(UsageError, match="the model's context is 256") as error:
        evaluate_generation(model, tokenizer, [talk("hello", "yes")], shots=shots)
    assert error.value.hint == "use fewer --shots"


def test_shots_come_after_the_system_message_and_without_their_own() -> None:
    shots = [talk("q1", "a1", system="other"), talk("q2", "a2")]
    contents = [message["content"] for message in with_shots(talk("q", "a", system="mine"), shots).messages]
    assert contents == ["mine", "q1", "a1", "q2", "a2", "q", "a"]
    assert with_shots(talk("q", "a"), []) == talk("q", "a")


def test_only_the_own_answer_counts_after_shots(tokenizer: Tokenizer) -> None:
    own = talk("What is it?", "a refund", system="mine")
    encoded = encode_after_shots(tokenizer, own, [talk("q1", "a1"), talk("q2", "a2")])
    alone = encode_chat(tokenizer, own.messages)
    learned = [token for token, learn in zip(encoded.ids, encoded.loss_mask, strict=True) if learn]
    assert learned == [token for token, learn in zip(alone.ids, alone.loss_mask, strict=True) if learn]
    assert encoded.ids[-sum(alone.loss_mask) - 1 :] == alone.ids[-sum(alone.loss_mask) - 1 :]
    assert tokenizer.decode(encoded.ids).count("a1") == 1


def test_shots_are_drawn_by_seed_without_repetition() -> None:
    examples = list(range(100))
    drawn = draw_shots(examples, 20, seed=1)
    assert drawn == draw_shots(examples, 20, seed=1)
    assert drawn != draw_shots(examples, 20, seed=2)
    assert len(set(drawn)) == 20
    with pytest.raises(UsageError, match="only 100 examples"):
        draw_shots(examples, 101, seed=1)
