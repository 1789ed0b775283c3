"""Several methods in one model: a low-rank update with a prefix, with adapters, with gated prompts.

Each puts its modules in, the low-rank one first, because it wraps linear layers where the others stand beside modules.
They train together and are saved as one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, WithJsonSchema, field_validator
from torch import Tensor, nn

from lit_lora.config import did_you_mean
from lit_lora.peft.core.added import AddedMethod, own_state
from lit_lora.peft.core.capabilities import (
    ScalesLearningRate,
    TakesText,
    TrainsModulesInFull,
    lr_factors,
    rows_for_init,
    with_modules_to_save,
    with_text,
)
from lit_lora.peft.core.method import Method
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.table import METHODS, methods

__all__ = ["ComposedConfig"]

_ALONE = ("composed", "residual", "longlora")  # longlora: its groups do not go with what stands before a document
_ITEMS = WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["name"]}})


class ComposedConfig(AddedMethod, TakesText, TrainsModulesInFull, ScalesLearningRate):
    """Several methods at once, such as lora with prefix; each with its own settings."""

    default_lr: ClassVar[float | None] = 1e-3
    name: Literal["composed"] = Field("composed", description="The method.")
    methods: Annotated[list[SerializeAsAny[Method]], _ITEMS] = Field(
        default_factory=lambda: _parsed([{"name": "lora"}, {"name": "prefix"}]),
        description="The methods, each as it would stand in peft; one of the low-rank ones comes first. Each learns at "
        "optimizer.lr times what its own default is to 1e-3.",
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list) or len(value) < 2:
            raise ValueError(f"expected a list of two methods or more, got {value!r}")
        return _parsed(value)

    @property
    def about(self) -> str:
        """All of them."""
        return " with ".join(method.about for method in self.methods)

    def with_text(self, encode: Callable[[str], list[int]]) -> ComposedConfig:
        """These settings with all texts as token ids."""
        return self.model_copy(update={"methods": [with_text(method, encode) for method in self.methods]})

    def with_modules_to_save(self, names: Sequence[str]) -> ComposedConfig:
        """These settings with ``names`` among the modules that train in full, by the first method that can.

        Raises:
            UsageError: None can.
        """
        able = [number for number, method in enumerate(self.methods) if isinstance(method, TrainsModulesInFull)]
        chosen = able[0] if able else 0
        methods = list(self.methods)
        methods[chosen] = with_modules_to_save(methods[chosen], names)
        return self.model_copy(update={"methods": methods})

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Every parameter's factor: its method's own learning rate as a multiple of 1e-3, times the method's factor."""
        assert self.default_lr is not None
        factors: dict[str, float] = {}
        for method in self.methods:
            own = lr_factors(method, model)
            mine = (method.lr or self.default_lr) / self.default_lr
            factors |= {name: mine * own.get(name, 1.0) for name in own_state(model, method.name)}
        return {name: factor for name, factor in factors.items() if factor != 1}

    def add(self, model: nn.Module) -> None:
        """Put all in, in order.

        Raises:
            UsageError: One does not fit the model, or not with those before it.
        """
        for method in self.methods:
            before = set(own_modules(model).values())
            method.apply(model)
            for module in own_modules(model).values():
                if module not in before:
                    module.owner = method.name

    def apply(self, model: nn.Module) -> None:
        """Put all in, in order; each stays marked as its own method's."""
        self.add(model)

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of all methods by their names in the model."""
        return own_state(model)


def _parsed(items: list[Any]) -> list[Method]:
    """Settings of every method by its name.

    Raises:
        ValueError: A name is not known, settings are wrong, or methods do not go together.
    """
    known = [name for name, (kind, _) in METHODS.items() if kind != "full" and name not in _ALONE]
    found: list[Method] = []
    for number, item in enumerate(items):
        name = item.get("name") if isinstance(item, dict) else getattr(item, "name", None)
        if name not in known:
            raise ValueError(f"unknown name {name!r}{did_you_mean(str(name), known)}, known: {', '.join(known)}")
        try:
            found.append(item if isinstance(item, Method) else methods()[name].model_validate(item))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{number}: {name}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    names = [method.name for method in found]
    looking = next((method for method in found if rows_for_init(method)), None)
    if looking is not None:
        raise ValueError(f"{looking.name}: a start that looks at rows (eva, lora-ga) is for recipe: lora or qlora")
    if len(set(names)) < len(names):
        raise ValueError(f"a method is there twice: {', '.join(names)}")
    if any(method.kind == "mergeable" for method in found[1:]):
        raise ValueError("expected at most one low-rank method, and that first")
    return found
