"""Parts of a tokenizer that vocabularies of every format need when they are rebuilt for the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from tokenizers import processors

__all__ = ["begin_and_end", "ranked_merges"]

Word = TypeVar("Word", str, bytes)


def ranked_merges(priorities: Mapping[Word, float], ids: Mapping[Word, int]) -> list[tuple[Word, Word]]:
    """The merges of a vocabulary that stores none: every way to cut a word into two others, the first to join first.

    Args:
        priorities: The words to cut. Of all neighbors, those are joined first whose joined word has the lowest value.
        ids: The words that the parts may be; they decide between merges into the same word.
    """
    ranked = []
    for whole, priority in priorities.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                ranked.append((priority, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def begin_and_end(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> processors.TemplateProcessing | None:
    """What puts a token before a text and one after it, where special tokens are asked for.

    Args:
        bos: The first token, if any.
        eos: The last token, if any.
        ids: Of these tokens.

    Returns:
        ``None`` if there is nothing to put.
    """
    if bos is None and eos is None:
        return None
    # $A and $B are the texts of a pair; `:1` marks every token of the second one.
    first = [part for part in (bos, "$A", eos) if part]
    second = [f"{part}:1" for part in (bos, "$B", eos) if part]
    return processors.TemplateProcessing(
        single=" ".join(first),
        pair=" ".join([*first, *second]),
        special_tokens=[(token, ids[token]) for token in dict.fromkeys([bos, eos]) if token],
    )
