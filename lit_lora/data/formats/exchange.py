"""A question and its answer in columns of their own: texts, or messages as TRL has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_lora.data.cells import as_text
from lit_lora.data.formats.messages import conversation, read_history, read_turns
from lit_lora.data.formats.turns import Turn, parse_json
from lit_lora.data.sample import Conversation, RowContext

__all__ = ["message_list", "read_exchange"]


def read_exchange(row: Mapping[str, Any], context: RowContext, *, prompt: Sequence[str], answer: str) -> Conversation:
    """The conversation of a row: its system message, earlier turns, prompt and answer.

    Args:
        row: A row under the format's column names; ``system``, ``history`` and ``tools`` are optional.
        context: Of the row.
        prompt: Columns of the prompt's parts, which blank lines separate; empty parts leave none.
        answer: Column of the answer.

    Raises:
        ValueError: A value has the wrong type.
    """
    question = _question(row, context, prompt)
    reply = _reply(row[answer], context.columns.get(answer, answer), context)
    turns = [*read_history(row.get("history"), context), *question, *_without_question(reply, question)]
    return conversation(row, turns, context)


def message_list(value: Any) -> list[Any] | None:
    """The value as a list of messages, if it is one, a single message, or the JSON text of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_json(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    return value if all(_is_message(item) for item in value) else None


def _is_message(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    return "from" in item or ("role" in item and bool({"content", "tool_calls", "parts"} & item.keys()))


def _question(row: Mapping[str, Any], context: RowContext, prompt: Sequence[str]) -> list[Turn]:
    """The prompt; of messages, the assistant's are given, for only the completion is to be learned."""
    first, *others = prompt
    messages = message_list(row[first])
    parts = [as_text(row.get(column)) for column in others]
    if messages is None:
        parts.insert(0, as_text(row[first]))
        text = "\n\n".join(part for part in parts if part.strip())
        if not text:
            context.notice("with an empty prompt")
        return [Turn({"role": "user", "content": text}, learned=False)]

    for column, part in zip(others, parts, strict=True):
        if part.strip():
            context.notice(f"whose {column} is not used, because the {first} is a list of messages")
    turns = read_turns(messages, context.columns.get(first, first), context)
    return [Turn(turn.message, learned=False) for turn in turns]


def _reply(value: Any, column: str, context: RowContext) -> list[Turn]:
    messages = message_list(value)
    if messages is None:
        return [Turn({"role": "assistant", "content": as_text(value)}, learned=True)]
    return read_turns(messages, column, context)


def _without_question(reply: list[Turn], question: Sequence[Turn]) -> list[Turn]:
    """The reply without the prompt, if it repeats it, as ``chosen`` of many preference sets does."""
    asked = [turn.message["content"] for turn in question if turn.message["role"] != "system"]
    said = [turn for turn in reply if turn.message["role"] != "system"]
    if len(said) > len(asked) and [turn.message["content"] for turn in said[: len(asked)]] == asked:
        return said[len(asked) :]
    return reply
