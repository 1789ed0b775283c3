"""What a model says of a row: one of some names, a number, or a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_lora.train.objectives import objective_class
from lit_lora.train.objectives.base import Objective

__all__ = ["Kind", "Task"]

Kind = Literal["classification", "regression", "seq2seq"]


@dataclass(frozen=True)
class Task:
    """What is predicted."""

    kind: Kind
    labels: tuple[str, ...] = ()
    """Names by id, of a classification."""

    @property
    def objective(self) -> Objective:
        """The loss and the figures of a validation."""
        return objective_class(self.kind)()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says of it, by transformers' names."""
        if self.kind == "seq2seq":
            return {}
        names = self.labels or ("LABEL_0",)
        problem = "regression" if self.kind == "regression" else "single_label_classification"
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": problem,
        }

    @property
    def peft_type(self) -> str:
        """PEFT's ``task_type``."""
        return "SEQ_2_SEQ_LM" if self.kind == "seq2seq" else "SEQ_CLS"

    def to_json(self) -> dict[str, Any]:
        """For the file beside an adapter."""
        return {"kind": self.kind, "labels": list(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task | None:
        """What :meth:`to_json` wrote; ``None`` if it is not that."""
        labels = data.get("labels")
        kind = next((known for known in get_args(Kind) if known == data.get("kind")), None)
        if kind is None or not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            return None
        return cls(kind, tuple(labels))

    def __str__(self) -> str:
        if self.kind != "classification":
            return self.kind
        names = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
        return f"classification, {len(self.labels)} labels: {names}"
