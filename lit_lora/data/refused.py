"""Rows that must not be learned as they are: preferences, unwanted answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lit_lora.data.cells import as_text, is_empty
from lit_lora.data.findings import Notice
from lit_lora.data.formats.exchange import message_list
from lit_lora.data.formats.messages import dialog_messages
from lit_lora.data.guesses import METADATA_COLUMNS, fold, guess, mapping_hint
from lit_lora.errors import InputError

__all__ = ["WANTED_COLUMNS", "check_wanted", "preference_error"]

WANTED_COLUMNS = ("label", "kto_tag", "desirable")
"""Columns in which KTO's rows say whether the answer is wanted."""

# (better, worse): names of the two answers of a preference row
_PREFERENCES = (
    ("chosen", "rejected"),
    ("chosenresponse", "rejectedresponse"),
    ("messages", "rejectedresponse"),
    ("messages", "rejectedmessages"),
    ("conversations", "rejectedresponse"),
    ("conversations", "rejectedmessages"),
    ("response", "rejectedresponse"),
    ("preferred", "other"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("preferredoutput", "nonpreferredoutput"),
    ("accepted", "rejected"),
    ("responsej", "responsek"),
    ("win", "lose"),
    ("winner", "loser"),
    ("better", "worse"),
    ("good", "bad"),
    ("best", "worst"),
    ("positive", "negative"),
)
_ANSWER_PAIRS = (
    ("response0", "response1"),
    ("response1", "response2"),
    ("responsea", "responseb"),
    ("answer0", "answer1"),
    ("answera", "answerb"),
    ("output1", "output2"),
)
_VERDICT = re.compile(r"prefer|better|chosen|winner|score|overall|rating|label|safer")


def preference_error(row: Mapping[str, Any]) -> InputError | None:
    """The error for a row with a better and a worse answer, with the mapping that learns the better one."""
    by_fold = {fold(name): name for name in row}
    for better, worse in _PREFERENCES:
        if better in by_fold and worse in by_fold:
            return _preference_error(row, [by_fold[better], by_fold[worse]], by_fold[better])
    if "chosen" in by_fold and not {"completion", "output", "response", "answer"} & by_fold.keys():
        return _preference_error(row, [by_fold["chosen"]], by_fold["chosen"])
    for first, second in _ANSWER_PAIRS:
        verdicts = [name for name in row if _VERDICT.search(fold(name)) and fold(name) not in (first, second)]
        if first in by_fold and second in by_fold and verdicts:
            names = f"{by_fold[first]}, {by_fold[second]}"
            return InputError(
                f"preference rows ({names}), expected one answer per row",
                hint=f"write the better of {names} into a column completion, as {verdicts[0]} says, and remove the two",
            )
    return None


def _preference_error(row: Mapping[str, Any], names: list[str], chosen: str) -> InputError:
    others = {name: value for name, value in row.items() if name not in names}
    messages = message_list(row[chosen])
    roles = {str(message.get("role", message.get("from"))) for message in messages or []}
    is_dialog = isinstance(row[chosen], str) and dialog_messages(row[chosen]) is not None
    is_whole = is_dialog or bool(roles & {"user", "human"})
    prompt = guess(others, ["prompt"]).get("prompt")
    if prompt is None:
        texts = [name for name, value in others.items() if fold(name) not in METADATA_COLUMNS and not is_empty(value)]
        prompt = texts[0] if texts else None
    if is_whole:
        mapping = {"messages": chosen}
    elif prompt is None:
        mapping = {"text": chosen}
    else:
        mapping = {"prompt": prompt, "completion": chosen}
    return InputError(
        f"preference rows ({', '.join(names)}), expected one answer per row",
        hint=f"to train on {chosen} alone: {mapping_hint(mapping)}",
    )


def check_wanted(column: str, value: Any, notice: Notice) -> None:
    """Check the label of a KTO row, which says whether its answer is wanted.

    Raises:
        InputError: It is not.
    """
    text = as_text(value).strip().lower()
    if text in ("false", "no"):
        raise InputError(
            f"{column}: false marks an answer that is not wanted, and it would be learned",
            hint=f"keep only the rows whose {column} is true",
        )
    if text in ("0", "0.0", "-1"):
        notice(f"whose {column} is {text}, and whose answer is learned all the same")
