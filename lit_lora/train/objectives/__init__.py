"""What the loss is and what a validation measures, one file for each objective.

``OBJECTIVES`` is the table to read: one line for each name, and nothing is imported to read it.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_lora.train.objectives.base import Objective

__all__ = ["OBJECTIVES", "metric_names", "objective_class"]

# name -> "module:class"; its keyword arguments are its settings, all with defaults
OBJECTIVES: dict[str, str] = {
    "next_token": "lit_lora.train.objectives.next_token:NextToken",
    "classification": "lit_lora.train.objectives.classification:Classification",
    "regression": "lit_lora.train.objectives.regression:Regression",
    "seq2seq": "lit_lora.train.objectives.seq2seq:Seq2Seq",
}


def objective_class(name: str) -> type[Objective]:
    """The class of an objective of the table."""
    loaded: type[Objective] = resolve_name(OBJECTIVES[name])
    return loaded


def metric_names() -> list[str]:
    """``loss``, and what any objective measures beside it."""
    measured = [metric for name in OBJECTIVES for metric in objective_class(name).metrics]
    return ["loss", *dict.fromkeys(measured)]
