"""Answers as text: streamed for one prompt, or many prompts in batches; they end where the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_lora.generate.decoding import Generation, PrefixCache, generate
from lit_lora.generate.sample import Sampling
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import Tokenizer

__all__ = ["Answer", "AnswerStream", "AnswerText", "answer_all", "stream_answer"]

Ended = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    """Without special tokens, and without the stop string that ended it."""
    ids: list[int]
    """The tokens drawn, the stop token included."""
    ended: Ended
    """``stop``: by itself; ``length``: cut off at the token limit or at the end of the context."""


class AnswerText:
    """The text of one answer as its tokens come in; text that may become a stop string is held back.

    Args:
        tokenizer: Decodes; its stop ids end the answer.
        stop: Strings that also end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop_ids = tokenizer.stop_ids
        self._stop = [string for string in stop if string]
        self._held = ""
        self.text = ""
        """What was given so far."""
        self.ids: list[int] = []
        """The tokens so far."""
        self.ended: Ended | None = None
        """How it ended, once it has."""

    def push(self, token: int) -> str:
        """Take a token; give the text that is certain now."""
        self.ids.append(token)
        if token in self._stop_ids:
            return self.finish("stop")
        self._held += self._stream.push(token)
        return self._release()

    def finish(self, ended: Ended) -> str:
        """Give what was held back."""
        if self.ended is not None:
            return ""
        self._held += self._stream.flush()
        piece = self._release()
        if self.ended is None:
            self.ended = ended
            piece += self._held
            self.text += self._held
        return piece

    def answer(self) -> Answer:
        """The answer so far."""
        return Answer(self.text, self.ids, self.ended or "interrupted")

    def _release(self) -> str:
        found = [at for at in (self._held.find(string) for string in self._stop) if at >= 0]
        if found:
            piece, self._held, self.ended = self._held[: min(found)], "", "stop"
        else:
            cut = next((i for i in range(len(self._held)) if self._may_stop(self._held[i:])), len(self._held))
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece

    def _may_stop(self, end: str) -> bool:
        return any(string.startswith(end) for string in self._stop)


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they come; made by :func:`stream_answer`."""

    def __init__(self, generation: Generation, text: AnswerText) -> None:
        self._generation = generation
        self._text = text

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        while self._text.ended is None:
            token = next(self._generation, [None])[0]
            piece = self._text.finish("length") if token is None else self._text.push(token)
            if piece:
                return piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The answer so far; complete once the stream has ended."""
        return self._text.answer()


def stream_answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    prefix_cache: PrefixCache | None = None,
) -> AnswerStream:
    """Answer one prompt, piece by piece.

    Args:
        model: The model.
        tokenizer: Its tokenizer, whose stop ids end the answer.
        prompt: Ids, as of ``encode_prompt``.
        sampling: How to draw.
        stop: Strings that also end the answer; they may lie across tokens.
        prefix_cache: What was read before, see :func:`lit_lora.generate.generate`.

    Raises:
        InputError: The prompt is empty or leaves no room in the model's context.
    """
    generation = generate(model, [prompt], sampling, stop_ids=tokenizer.stop_ids, prefix_cache=prefix_cache)
    return AnswerStream(generation, AnswerText(tokenizer, stop))


def answer_all(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    batch_tokens: int = 16384,
    on_answer: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Answer many prompts in batches of similar length; in the order of the prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Ids of each.
        sampling: How to draw.
        stop: Strings that also end an answer.
        batch_size: Prompts at once, at most.
        batch_tokens: Tokens in the cache at once, at most, if one prompt fits.
        on_answer: Called with the number of prompts answered by each batch.

    Raises:
        InputError: A prompt is empty or leaves no room in the model's context.
    """
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while order:
        fits = batch_tokens // (len(prompts[order[0]]) + sampling.max_new_tokens)
        size = max(1, min(batch_size, fits))
        batch, order = order[:size], order[size:]
        answers.update(
            zip(batch, _answer_batch(model, tokenizer, [prompts[i] for i in batch], sampling, stop), strict=True)
        )
        on_answer(len(batch))
    return [answers[index] for index in range(len(prompts))]


def _answer_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[Sequence[int]], sampling: Sampling, stop: Sequence[str]
) -> list[Answer]:
    generation = generate(model, prompts, sampling, stop_ids=tokenizer.stop_ids)
    texts = [AnswerText(tokenizer, stop) for _ in prompts]
    for step in generation:
        for row, token in enumerate(step):
            if token is not None:
                texts[row].push(token)
                if texts[row].ended is not None:
                    generation.stop(row)
    for text in texts:
        text.finish("length")
    return [text.answer() for text in texts]
