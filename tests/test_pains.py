"""What users of other finetuning tools suffer from: each has tests here, found by ``pytest -k pain_04``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAINS = {
    1: "gradient accumulation gives another loss",
    2: "truncation or masks leave nothing to learn",
    3: "good in training, rubbish in chat: the prompt differs",
    4: "the end is never learned because padding is the same token",
    5: "BOS doubled or missing",
    6: "masks of several turns are wrong, reasoning is lost",
    7: "packed rows see each other",
    8: "LoRA with activation checkpointing trains nothing",
    9: "a typo in target_modules trains few layers",
    10: "an adapter loads and has no effect",
    11: "bfloat16 adapters do not move, float16 ones crash",
    12: "NaN is hidden for hours",
    13: "rows are never trained",
    14: "a trained head is lost where embeddings are tied",
    15: "a vocabulary that grew does not load or merge",
    16: "merging changes the model",
    17: "what is written does not open in transformers",
    19: "no adapters of PEFT, in or out",
    21: "conversion is killed for its memory",
    23: "a resumed run is another run",
    24: "resuming shuffles anew",
    25: "resuming is confused with going on",
    26: "a half-written checkpoint blocks the restart",
    27: "Ctrl-C loses hours",
    28: "checkpoints fill the disk",
    29: "the last model is kept, not the best",
    30: "tokenizing is done again and again",
    31: "a stale cache is used",
    40: "1e-4 in YAML is a text",
    41: "unknown keys are ignored",
    42: "warm-up longer than the run",
    43: "tiny data gives no steps",
    44: "KeyError for columns of another name",
    45: "a local model still goes online",
    46: "the scores of the tuned model are the base's",
    47: "documents that do not run",
    48: "pickles run code",
    49: "secrets in logs",
    51: "broken emoji in streams",
    52: "temperature 0 is ignored",
    54: "chat repeats the system prompt",
}
TESTS = [
    name
    for path in Path(__file__).parent.rglob("test_*.py")
    for name in re.findall(r"^def (test_pain_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


def pains_of(name: str) -> list[int]:
    """``test_pain_14_15_merged_…`` is of two."""
    return [int(number) for number in re.match(r"test_pain((?:_\d\d)+)_", f"{name}_")[1].split("_")[1:]]  # type: ignore[index]


@pytest.mark.parametrize("number", PAINS, ids=lambda number: f"{number:02}")
def test_every_pain_has_a_test(number: int) -> None:
    assert [name for name in TESTS if number in pains_of(name)], PAINS[number]


def test_every_test_of_a_pain_is_of_one_in_the_list() -> None:
    assert {number for name in TESTS for number in pains_of(name)} <= PAINS.keys()
