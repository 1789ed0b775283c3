"""What only some methods do: which do, and what everybody gets who asks another."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, Literal

import pytest
from torch import nn

from lit_lora import peft
from lit_lora.errors import UsageError
from lit_lora.peft.core import capabilities

LORA = {"lora", "dora", "multilora", "longlora", "loftq", "lq-lora", "qa-lora"}
TARGETED = LORA | {"vera", "tied-lora", "glora", "ia3", "bitfit"}
METHODS_OF = {
    "TakesTokens": LORA,
    "TakesText": {"prefix", "prompt", "p-tuning", "composed"},
    "NeedsQuantizedBase": {"lq-lora", "qa-lora"},
    "WeighsErrors": {"lq-lora"},
    "ChoosesCodes": {"loftq", "lq-lora"},
    "ChoosesTypes": {"lq-lora"},
    "GroupsTokens": {"longlora"},
    "TrainsModulesInFull": TARGETED | {"houlsby", "lin", "parallel", "residual", "composed", "full"},
    "InitializesFromData": LORA,
    "ScalesLearningRate": LORA | {"composed"},
    "FinalizesAfterTraining": {"glora"},
    "KeepsCodes": {"qa-lora"},
    "ChangesConfig": {"longlora"},
}


class Plain(peft.Method):
    """A method that does nothing beside being applied."""

    kind: ClassVar[peft.Kind] = "full"
    name: Literal["plain"] = "plain"

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(True)


@pytest.mark.parametrize("capability", METHODS_OF)
def test_a_method_has_the_members_of_what_it_does_and_no_others(capability: str) -> None:
    wanted = getattr(capabilities, capability)
    found = {name for name, method in peft.methods().items() if issubclass(method, wanted)}
    assert found == METHODS_OF[capability]
    members = getattr(wanted, "__abstractmethods__", set())
    without = [method for name, method in peft.methods().items() if name not in found]
    assert not [(method, member) for method in without for member in members if hasattr(method, member)]


def test_the_table_above_is_complete() -> None:
    classes = {name for name in capabilities.__all__ if isinstance(getattr(capabilities, name), type)}
    assert classes - {"Decomposer"} == METHODS_OF.keys()
    assert issubclass(capabilities.TakesText, ABC)


def test_a_method_without_capabilities_is_asked_nothing() -> None:
    method, model = Plain(), nn.Linear(2, 2)
    assert (peft.rows_for_init(method), capabilities.calibration_rows(method), peft.lr_factors(method, model)) == (
        0, 0, {},
    )  # fmt: skip
    assert peft.with_text(method, str.split) is method  # type: ignore[arg-type]
    assert peft.with_token_ids(method, list) is method  # type: ignore[arg-type]
    assert peft.with_modules_to_save(method, []) is method
    with pytest.raises(UsageError, match="plain trains only its own modules, but head must train too"):
        peft.with_modules_to_save(method, ["head"])
