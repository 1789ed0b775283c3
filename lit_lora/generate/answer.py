"""Answers as text: streamed for one prompt, or in batches for many. The checkpoint's stop tokens end them."""

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
    """``stop``: by a stop token or string; ``length``: cut off at the token limit or at the end of the context."""


class AnswerText:
    """The text of one answer as its tokens arrive; text that may turn out to begin a stop string is withheld.

    Args:
        tokenizer: Decodes the tokens; its stop ids end the answer.
        stop: Strings that also end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop_ids = tokenizer.stop_ids
        self._stop = [string for string in stop if string]
        self._withheld = ""
        self.text = ""
        """The text returned so far."""
        self.ids: list[int] = []
        """The tokens so far."""
        self.ended: Ended | None = None
        """How it ended, once it has."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self.ids.append(token)
        if token in self._stop_ids:
            return self.finish("stop")
        self._withheld += self._stream.push(token)
        return self._release()

    def finish(self, ended: Ended) -> str:
        """End the answer; returns the text withheld so far. Does nothing if it has already ended."""
        if self.ended is not None:
            return ""
        self._withheld += self._stream.flush()
        piece = self._release()
        if self.ended is None:  # the text that came last completed no stop string
            self.ended = ended
            piece += self._withheld
            self.text += self._withheld
        return piece

    def answer(self) -> Answer:
        """The answer so far."""
        return Answer(self.text, self.ids, self.ended or "interrupted")

    def _release(self) -> str:
        """Take the certain part off the withheld text, and end at a stop string."""
        places = [self._withheld.find(string) for string in self._stop]
        stops = [place for place in places if place >= 0]
        if stops:
            piece = self._withheld[: min(stops)]
            self._withheld = ""
            self.ended = "stop"
        else:
            cut = self._first_possible_stop()
            piece = self._withheld[:cut]
            self._withheld = self._withheld[cut:]
        self.text += piece
        return piece

    def _first_possible_stop(self) -> int:
        """Where the withheld text begins to be the beginning of a stop string."""
        for place in range(len(self._withheld)):
            if any(string.startswith(self._withheld[place:]) for string in self._stop):
                return place
        return len(self._withheld)


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they arrive; made by :func:`stream_answer`."""

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
        """The answer so far; complete once the iteration has ended."""
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
        prompt: Its ids, such as from ``encode_prompt``.
        sampling: How to draw.
        stop: Strings that also end the answer; they may span tokens.
        prefix_cache: See :func:`lit_lora.generate.generate`.

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
    """Answer many prompts in batches of similar length; the answers come in the order of the prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Ids of each prompt.
        sampling: How to draw.
        stop: Strings that also end an answer.
        batch_size: Maximum number of prompts per batch.
        batch_tokens: Maximum number of tokens in a batch's cache; a longer prompt gets a batch of its own.
        on_answer: Called after each batch with its number of prompts.

    Raises:
        InputError: A prompt is empty or leaves no room in the model's context.
    """
    answers: dict[int, Answer] = {}
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while waiting:
        longest = len(prompts[waiting[0]])
        fits = batch_tokens // (longest + sampling.max_new_tokens)
        size = max(1, min(batch_size, fits))
        batch = waiting[:size]
        waiting = waiting[size:]
        batch_answers = _answer_batch(model, tokenizer, [prompts[index] for index in batch], sampling, stop)
        answers.update(zip(batch, batch_answers, strict=True))
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
