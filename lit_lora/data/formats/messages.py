"""Conversations: OpenAI's ``messages`` (role, content), ShareGPT's ``conversations`` (from, value) and their kin."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal

from lit_lora.config import did_you_mean
from lit_lora.data.cells import as_text, is_empty
from lit_lora.data.formats.turns import (
    ROLES,
    Turn,
    content_text,
    is_learned,
    known_role,
    parse_json,
    read_turn,
    role_name,
    shown,
    tool_list,
)
from lit_lora.data.sample import Conversation, Format, RowContext, Sample
from lit_lora.errors import InputError

__all__ = [
    "MESSAGES",
    "ROW_COLUMNS",
    "SHAREGPT",
    "SYSTEM_NAMES",
    "conversation",
    "dialog_messages",
    "exchange_keys",
    "is_message_list",
    "read_history",
    "read_turns",
]

SYSTEM_NAMES = ("system_prompt", "system_message", "system_instruction")
"""Other names of a column with the system message; ``systemInstruction`` is spelled alike."""

LEARN_COLUMNS = ("weight", "loss", "train")
"""Columns of which 0 or false says that no answer of the row is learned."""

ROW_COLUMNS = ("system", "tools", *LEARN_COLUMNS)
"""Optional columns of every conversation."""

# The keys of a question and its answer where a list has one object per exchange.
_PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("query", "response"),
    ("prompt", "response"),
)

_DIALOGS = (
    re.compile(r"(?:\A|\n\n)(Human|Assistant):"),  # HH-RLHF
    re.compile(r"\s*### (Human|Assistant):"),  # Guanaco
)
"""What begins a turn where a conversation is written as one text."""

_SPEAKER = re.compile(r"(\w+): ?")
"""What a text begins with that names its speaker."""

_PRINTED_ROWS = re.compile(r"\}\s*\n\s*\{")
"""Objects without a comma between, as NumPy and pandas print a list of them."""


def _read(row: Mapping[str, Any], context: RowContext, column: str) -> Sample:
    turns = read_turns(row[column], context.columns.get(column, column), context)
    return conversation(row, turns, context)


def conversation(row: Mapping[str, Any], turns: Sequence[Turn], context: RowContext) -> Conversation:
    """The turns as a conversation, after the row's ``system`` message if it has one and with its ``tools``.

    An empty answer stays in its place, but is not learned, nor is any answer of a row that says so of itself.
    """
    turns = _after_system(row.get("system"), list(turns), context)
    is_row_learned = _is_row_learned(row, context)

    context_only = set()
    is_last_answer = True
    for index, turn in reversed(list(enumerate(turns))):
        if turn.message["role"] != "assistant":
            continue
        has_nothing = not (turn.message.get("content") or "").strip() and not turn.message.get("tool_calls")
        if has_nothing and turn.learned and not is_last_answer:
            context.notice("with an empty answer within a conversation, which is not learned")
        if has_nothing or not turn.learned or not is_row_learned:
            context_only.add(index)
        is_last_answer = False
    tools = tool_list(row.get("tools"), "tools", "function schemas")
    return Conversation([turn.message for turn in turns], tools or None, frozenset(context_only))


def _after_system(system: Any, turns: list[Turn], context: RowContext) -> list[Turn]:
    """The turns after the row's system message, unless they begin with one."""
    if is_empty(system):
        return turns
    column = context.columns.get("system", "system")
    text = content_text(system, column, context.notice)
    if not turns or turns[0].message["role"] != "system":
        return [Turn({"role": "system", "content": text}, learned=False), *turns]
    if (turns[0].message["content"] or "").strip() != text.strip():
        context.notice(f"whose {column} is not used, because the messages begin with another system message")
    return turns


def _is_row_learned(row: Mapping[str, Any], context: RowContext) -> bool:
    """Whether the row's ``weight``, ``loss`` and ``train`` let its answers be learned."""
    for name in LEARN_COLUMNS:
        value = row.get(name)
        if is_empty(value):
            continue
        column = context.columns.get(name, name)
        try:
            if not is_learned({name: value}, column):
                return False
        except ValueError:  # a share, or a quantity that has nothing to do with training
            context.notice(f"whose {column} is neither 0 nor 1, and is not used")
    return True


def read_turns(value: Any, column: str, context: RowContext) -> list[Turn]:
    """The messages in a cell.

    Args:
        value: A list of messages, of exchanges (``input`` and ``output`` in one object) or of alternating texts; or
            such a list as JSON or Python text, as a cell of a CSV file has it.
        column: What the user calls the cell.
        context: Of the row.

    Raises:
        ValueError: It is something else, or a message cannot be read.
    """
    if isinstance(value, str):
        value = _parse_list(value, column)
    if isinstance(value, Mapping):  # a single message
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{column}: expected a list of messages, got {shown(value)}")
    if value and all(isinstance(item, list | tuple) for item in value):
        return _pairs(value, column)
    if value and all(isinstance(item, str) for item in value):
        parsed = [parse_json(item) for item in value]
        if not all(isinstance(item, Mapping) for item in parsed):
            parsed = _by_speakers(value, context.roles)
        if not parsed:
            return _alternating(value, column)
        value = parsed

    value = [_renamed(item, context.message_keys) for item in value]
    _require_known_roles(value, column, context.roles)
    turns: list[Turn] = []
    for index, item in enumerate(value):
        where = f"{column}[{index}]"
        pair = exchange_keys(item)
        if pair is None:
            turns.append(read_turn(item, where, context.notice, context.roles))
        else:
            turns += _exchange(item, pair, where, context)
    return turns


def _renamed(item: Any, keys: Mapping[Literal["role", "content"], str]) -> Any:
    """A message with its role and its content under these names."""
    if not isinstance(item, Mapping):
        return item
    renamed = dict(item)
    for key, own in keys.items():
        if own in renamed:
            renamed[key] = renamed.pop(own)
    return renamed


def _require_known_roles(messages: Sequence[Any], column: str, roles: Mapping[str, str]) -> None:
    """Check the roles of all messages, so that the error can name every unknown one.

    Raises:
        InputError: There is an unknown one; the hint maps it.
    """
    unknown = []
    where = ""
    for index, message in enumerate(messages):
        name = role_name(message)
        if name is None or known_role(name, roles) is not None or name in unknown:
            continue
        unknown.append(name)
        where = where or f"{column}[{index}]"
    if not unknown:
        return
    guesses = ["user", "assistant"] if len(unknown) > 1 else ["assistant"]
    if known_role(role_name(messages[0]) or "", roles) is None and len(unknown) == 1:
        guesses = ["user"]
    mapping = []
    flags = []
    for name, role in zip(unknown, chain(guesses, repeat("tool")), strict=False):
        mapping.append(f"{json.dumps(name, ensure_ascii=False)}: {role}")
        flags.append(f"--columns {shlex.quote(f'roles.{name}={role}')}")
    names = ", ".join(map(repr, unknown))
    raise InputError(
        f"{where}: unknown role {names}{did_you_mean(unknown[0].lower(), ROLES)}, known: {', '.join(ROLES)}",
        hint=f"say what it is, such as columns: {{roles: {{{', '.join(mapping)}}}}} in the config, "
        f"or {' '.join(flags)}",
    )


def is_message_list(value: Any) -> bool:
    """Whether a cell holds messages, and not a list of other things."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, Mapping) and ({"role", "from"} & item.keys() or exchange_keys(item)) for item in value)


def read_history(value: Any, context: RowContext) -> list[Turn]:
    """Earlier turns: ``[["question", "answer"], …]``, objects with both, or messages; null is none.

    Raises:
        ValueError: It is something else.
    """
    if value is None or value in ("", []):
        return []
    if isinstance(value, str):
        value = _parse_list(value, "history")
    if not isinstance(value, list):
        raise ValueError(f"history: expected a list of [question, answer], got {shown(value)}")
    return read_turns(value, "history", context)


def exchange_keys(item: Any) -> tuple[str, str] | None:
    """The keys of question and answer of an object that holds a whole exchange."""
    if not isinstance(item, Mapping) or {"role", "from"} & item.keys():
        return None
    return next((pair for pair in _PAIRS if set(pair) <= item.keys()), None)


def _exchange(item: Mapping[str, Any], pair: tuple[str, str], where: str, context: RowContext) -> list[Turn]:
    """The turns of an object with a question and its answer; what else it has is read as the answer's."""
    question, answer = pair
    system = as_text(item.get("system"))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": as_text(item[question])})
    others = {key: value for key, value in item.items() if key not in (*pair, "system")}
    messages.append({**others, "role": "assistant", "content": as_text(item[answer])})
    return [read_turn(message, where, context.notice) for message in messages]


def _pairs(pairs: Sequence[Sequence[Any]], column: str) -> list[Turn]:
    """The turns of ``[["question", "answer"], …]``."""
    turns: list[Turn] = []
    for pair in pairs:
        if len(pair) != 2 or any(isinstance(text, list | Mapping) for text in pair):
            raise ValueError(f"{column}: expected [question, answer], got {shown(pair)}")
        turns += _alternating(pair, column)
    return turns


def _by_speakers(texts: Sequence[str], roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Messages of texts that each begin with their speaker, ``User: Hi``; none if not all do."""
    messages = []
    for text in texts:
        speaker = _SPEAKER.match(text)
        if speaker is None or known_role(speaker[1], roles) is None:
            return []
        messages.append({"role": speaker[1], "content": text[speaker.end() :]})
    return messages


def dialog_messages(text: str) -> list[dict[str, str]] | None:
    """The messages of a dialog of Human and Assistant that is written as one text; None if it is another text."""
    for pattern in _DIALOGS:
        before, *parts = pattern.split(text.strip())
        if before or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
            continue
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": role, "content": words.strip()} for role, words in turns]
    return None


def _alternating(texts: Sequence[str], column: str) -> list[Turn]:
    """Texts as turns of user and assistant."""
    if len(texts) % 2:
        raise ValueError(f"{column}: {len(texts)} texts without roles, expected questions and answers in turn")
    turns = []
    for index, text in enumerate(texts):
        if index % 2:
            turns.append(Turn({"role": "assistant", "content": as_text(text)}, learned=True))
        else:
            turns.append(Turn({"role": "user", "content": as_text(text)}, learned=False))
    return turns


def _parse_list(text: str, column: str) -> Any:
    """A list written as JSON, as Python writes one, or as a dialog of Human and Assistant."""
    parsed = parse_json(text)
    if not isinstance(parsed, str):
        return parsed
    dialog = dialog_messages(text)
    if dialog is not None:
        return dialog
    if text.lstrip().startswith("[{") and _PRINTED_ROWS.search(text):
        raise InputError(
            f"{column}: a list as NumPy prints it, without commas, which cannot be read back with certainty",
            hint=f"save the rows anew with {column} as JSON: frame.to_json('rows.jsonl', orient='records', lines=True)",
        )
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{column}: expected a list of messages, got text: {shown(text)}") from None


MESSAGES = Format(
    required=("messages",),
    optional=ROW_COLUMNS,
    aliases={
        "messages": ("conversation", "contents", "dialog", "dialogue", "chat"),
        "tools": ("functions",),
        "system": SYSTEM_NAMES,
    },
    nested=True,
    read=partial(_read, column="messages"),
)
SHAREGPT = Format(
    required=("conversations",),
    optional=ROW_COLUMNS,
    aliases={"tools": ("functions",), "system": SYSTEM_NAMES},
    nested=True,
    read=partial(_read, column="conversations"),
)
