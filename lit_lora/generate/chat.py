"""A conversation with a model: its history, and a cache of what the model has already read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from lit_lora.errors import InputError
from lit_lora.generate.answer import Answer, stream_answer
from lit_lora.generate.decoding import PrefixCache
from lit_lora.generate.sample import Sampling
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import Message, Tokenizer, encode_prompt, fold_system

__all__ = ["ChatSession"]


class ChatSession:
    """Talk to a model. Every turn renders the whole history again; the cache saves computing it again.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with the chat template.
        sampling: How to draw.
        system: The system prompt; the template's default, if it has one, when omitted.
        stop: Strings that also end an answer.
        fill: Puts a message into the template of the prompts that the model was trained on.
        fold: Put the system prompt into the first message, for a template without a place for it.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        system: str | None = None,
        stop: Sequence[str] = (),
        fill: Callable[[str], str] = str,
        fold: bool = False,
    ) -> None:
        self.sampling = sampling
        self.messages: list[Message] = []
        """The history, the system prompt included."""
        self.prefix_cache = PrefixCache()
        """What the model has already read."""
        self.last = Answer("", [], "interrupted")
        """The last answer, complete or not."""
        self._stop = stop
        self.use(model, tokenizer, fill, fold)
        self.reset(system)

    def use(
        self, model: LanguageModel, tokenizer: Tokenizer, fill: Callable[[str], str] = str, fold: bool = False
    ) -> None:
        """Continue with another model, such as the same one with another adapter; the history stays."""
        self._model = model
        self._fill = fill
        self._fold = fold
        self._tokenizer = tokenizer
        self.prefix_cache = PrefixCache()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Send a message and yield the answer piece by piece. An interrupted answer stays in the history.

        Raises:
            InputError: The template refuses the conversation, or it is too long for the model. The history is
                then unchanged.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": self._fill(text)}]
        prompt = self._encode(messages)
        context = self._model.context
        if len(prompt) >= context:
            raise InputError(
                f"the conversation has {len(prompt)} tokens, the model's context is {context}",
                hint="/undo takes back the last turn, /reset starts over",
            )
        stream = stream_answer(
            self._model, self._tokenizer, prompt, self.sampling, stop=self._stop, prefix_cache=self.prefix_cache
        )
        try:
            yield from stream
        finally:
            self.last = stream.answer
            if self.last.ids:
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def reset(self, system: str | None = None) -> None:
        """Forget the conversation.

        Args:
            system: A new system prompt, empty for none; the present one stays when omitted.

        Raises:
            InputError: The template has no place for a system prompt. The history is then unchanged.
        """
        beginning = [message for message in self.messages[:1] if message["role"] == "system"]
        if system is not None:
            beginning = [{"role": "system", "content": system}] if system else []
            self._encode([*beginning, {"role": "user", "content": "x"}])  # refused now, not later
        self.messages = beginning

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that is to be answered."""
        return encode_prompt(self._tokenizer, fold_system(messages) if self._fold else messages)

    def undo(self) -> bool:
        """Take back the last question and its answer; false if there is none."""
        if len(self.messages) < 2:
            return False
        self.messages = self.messages[:-2]
        return True
