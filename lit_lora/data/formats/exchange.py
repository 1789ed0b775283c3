"""One question and its answer, each a text or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_lora.data.cells import as_text, is_empty, require_text
from lit_lora.data.formats.messages import conversation, is_message_list, read_history, read_turns
from lit_lora.data.formats.turns import Turn, is_message, known_role, parse_json, role_name
from lit_lora.data.sample import Conversation, RowContext

__all__ = ["exchange", "join_texts", "message_list"]


def exchange(row: Mapping[str, Any], prompt: Sequence[str], answer: str, context: RowContext) -> Conversation:
    """A prompt and its answer, after the row's ``system`` message and earlier turns (``history``).

    Args:
        row: Under the format's column names.
        prompt: Columns of the prompt's parts, of which all but the first may be missing or empty.
        answer: Name of the column with the answer; an object or a list is written as JSON.
        context: Of the row.

    Raises:
        InputError: A part of the prompt is a list or an object.
        ValueError: A value is of the wrong kind.
    """
    asked = _prompt_turns(row, prompt, context)
    answered = _answer_turns(row[answer], context.columns.get(answer, answer), context)
    turns = read_history(row.get("history"), context)
    return conversation(row, [*turns, *asked, *_without_prompt(answered, asked)], context)


def _prompt_turns(row: Mapping[str, Any], prompt: Sequence[str], context: RowContext) -> list[Turn]:
    first = prompt[0]
    messages = message_list(row[first])
    if messages is not None:
        for column in prompt[1:]:
            if not is_empty(row.get(column)):
                context.notice(f"whose {column} the model does not see, because the {first} is a list of messages")
        # Answers within a prompt are given, as in TRL; only the completion is learned.
        turns = read_turns(messages, context.columns.get(first, first), context)
        return [Turn(turn.message, learned=False) for turn in turns]

    for column in prompt:
        require_text(row.get(column), column, context.columns.get(column, column))
    text = join_texts(*(as_text(row.get(column)) for column in prompt))
    if not text:
        context.notice("with an empty prompt")
    return [Turn({"role": "user", "content": text}, learned=False)]


def _answer_turns(value: Any, column: str, context: RowContext) -> list[Turn]:
    messages = message_list(value)
    if messages is not None:
        return read_turns(messages, column, context)
    return [Turn({"role": "assistant", "content": as_text(value)}, learned=True)]


def _without_prompt(answered: list[Turn], asked: list[Turn]) -> list[Turn]:
    """The answer without the prompt, if it repeats it, as ``chosen`` of many preference sets does."""
    prompt = [_role_and_text(turn) for turn in asked if turn.message["role"] != "system"]
    turns = [turn for turn in answered if turn.message["role"] != "system"]
    repeats = [_role_and_text(turn) for turn in turns[: len(prompt)]] == prompt
    return turns[len(prompt) :] if repeats and len(turns) > len(prompt) else answered


def _role_and_text(turn: Turn) -> tuple[str, str]:
    return turn.message["role"], (turn.message.get("content") or "").strip()


def message_list(value: Any) -> list[Any] | None:
    """The messages in a cell: a list, a single one, or such a list as JSON text; None if it holds something else."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        value = parse_json(value)
        if not isinstance(value, list) or not all(map(_has_known_role, value)):
            return None  # a text that happens to be JSON
    if is_message(value):
        return [value]
    return value if is_message_list(value) else None


def _has_known_role(item: Any) -> bool:
    return is_message(item) and known_role(role_name(item) or "", {}) is not None


def join_texts(*texts: str) -> str:
    """The texts that are not empty, with a blank line between."""
    return "\n\n".join(text for text in texts if text.strip())
