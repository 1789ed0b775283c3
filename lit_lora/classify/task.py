"""What a model predicts for a row: one of several labels, a number, or a text."""

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
    """Names of the classes by id; empty unless it is classification."""

    @property
    def objective(self) -> Objective:
        """The loss and the validation's metrics."""
        return objective_class(self.kind)()

    @property
    def config(self) -> dict[str, Any]:
        """Its entries in ``config.json``, by transformers' names."""
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
        """Its form in the file beside an adapter."""
        return {"kind": self.kind, "labels": list(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task | None:
        """The task that :meth:`to_json` wrote; ``None`` if ``data`` is something else."""
        labels = data.get("labels")
        kind: Kind | None = next((kind for kind in get_args(Kind) if kind == data.get("kind")), None)
        if kind is None or not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            return None
        return cls(kind, tuple(labels))

    def __str__(self) -> str:
        if self.kind != "classification":
            return self.kind
        more = ", …" if len(self.labels) > 8 else ""
        return f"classification, {len(self.labels)} labels: {', '.join(self.labels[:8])}{more}"
