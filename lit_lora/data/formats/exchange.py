"""One question and its answer, each a text or a list of messages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lit_lora.data.formats.messages import conversation, is_message_list, read_history, read_turns
from lit_lora.data.formats.turns import Turn, shown
from lit_lora.data.sample import Conversation, RowContext, as_json_value, as_text

__all__ = ["exchange", "join_texts"]


def exchange(
    row: Mapping[str, Any], prompt: str, answer: str, context: RowContext, *, input_: str = ""
) -> Conversation:
    """A prompt and its answer, after the row's ``system`` message and earlier turns (``history``).

    Args:
        row: Under the format's column names.
        prompt: Name of the column with the prompt.
        answer: Name of the column with the answer.
        context: Of the row.
        input_: Name of a column with a text that follows the prompt.

    Raises:
        ValueError: A value is of the wrong kind.
    """
    turns = read_history(row.get("history"), context)
    turns += _prompt_turns(row, prompt, input_, context)
    turns += _answer_turns(row[answer], context.columns.get(answer, answer), context)
    return conversation(row, turns, context)


def _prompt_turns(row: Mapping[str, Any], prompt: str, input_: str, context: RowContext) -> list[Turn]:
    value = row[prompt]
    if is_message_list(value):
        # Answers within a prompt are given, as in TRL; only the completion is learned.
        return [Turn(turn.message, learned=False) for turn in read_turns(value, prompt, context)]
    texts = [_prompt_text(value, context.columns.get(prompt, prompt))]
    if input_:
        texts.append(_prompt_text(row.get(input_), context.columns.get(input_, input_)))
    return [Turn({"role": "user", "content": join_texts(*texts)}, learned=False)]


def _prompt_text(value: Any, column: str) -> str:
    if isinstance(value, list | tuple | Mapping):
        raise ValueError(f"{column}: expected the text of a prompt, got {shown(as_json_value(value))}")
    return as_text(value)


def _answer_turns(value: Any, column: str, context: RowContext) -> list[Turn]:
    if isinstance(value, Mapping) and {"role", "from"} & value.keys() and {"content", "value"} & value.keys():
        value = [value]
    if is_message_list(value):
        return read_turns(value, column, context)
    return [Turn({"role": "assistant", "content": _answer_text(value, column)}, learned=True)]


def _answer_text(value: Any, column: str) -> str:
    """The text of an answer; an object or a list is written as JSON.

    Raises:
        ValueError: It contains NaN or an infinite number, for which JSON has no word.
    """
    if not isinstance(value, list | tuple | Mapping):
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{column}: the answer is an infinite number")
        return as_text(value)
    try:
        return as_text(json.dumps(as_json_value(value), ensure_ascii=False, allow_nan=False))
    except ValueError as error:
        if "JSON compliant" in str(error):
            raise ValueError(f"{column}: NaN or Infinity in the answer, which JSON cannot write") from None
        raise


def join_texts(*texts: str) -> str:
    """The texts that are not empty, with a blank line between."""
    return "\n\n".join(text for text in texts if text.strip())
