"""Several methods in one model, such as a low-rank update with a prefix, adapters or gated prompts.

Each puts its modules in. A low-rank method comes first, because it wraps linear layers, while the others add modules.
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

# Methods that cannot be part of several: residual is for convolutional networks, longlora's groups allow no prefix.
_ALONE = ("composed", "residual", "longlora")
_ITEMS = WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["name"]}})


class ComposedConfig(AddedMethod, TakesText, TrainsModulesInFull, ScalesLearningRate):
    """Several methods at once, such as lora with prefix, each with its own settings."""

    default_lr: ClassVar[float | None] = 1e-3
    name: Literal["composed"] = Field("composed", description="The method.")
    methods: Annotated[list[SerializeAsAny[Method]], _ITEMS] = Field(
        default_factory=lambda: _parsed([{"name": "lora"}, {"name": "prefix"}]),
        description="The methods, each with the settings that it has in peft alone; a low-rank method comes first. The "
        "learning rate of each is optimizer.lr × its own default / 1e-3.",
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list) or len(value) < 2:
            raise ValueError(f"expected a list of at least two methods, got {value!r}")
        if any(isinstance(part, dict) and part.get("init_adapter") is not None for part in value):
            raise ValueError("init_adapter is a setting of all methods together: peft.init_adapter")
        return _parsed(value)

    @property
    def about(self) -> str:
        """A few words on each."""
        return " with ".join(method.about for method in self.methods)

    def with_text(self, encode: Callable[[str], list[int]]) -> ComposedConfig:
        """These settings with all texts turned into token ids."""
        return self.model_copy(update={"methods": [with_text(method, encode) for method in self.methods]})

    def with_modules_to_save(self, names: Sequence[str]) -> ComposedConfig:
        """These settings with ``names`` among the modules that the first method able to trains in full.

        Raises:
            UsageError: No method can train other modules.
        """
        chosen = 0  # if none is able, the first refuses
        for index, method in enumerate(self.methods):
            if isinstance(method, TrainsModulesInFull):
                chosen = index
                break
        methods = list(self.methods)
        methods[chosen] = with_modules_to_save(methods[chosen], names)
        return self.model_copy(update={"methods": methods})

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Learning rate of each parameter's method as a multiple of 1e-3, times the factor that the method gives it."""
        assert self.default_lr is not None
        factors: dict[str, float] = {}
        for method in self.methods:
            method_factor = (method.lr or self.default_lr) / self.default_lr
            within_method = lr_factors(method, model)
            for name in own_state(model, method.name):
                factors[name] = method_factor * within_method.get(name, 1.0)
        return {name: factor for name, factor in factors.items() if factor != 1}

    def add(self, model: nn.Module) -> None:
        """Put the modules of all methods in, in order and in place, and mark each with its method.

        Raises:
            UsageError: A method does not fit the model, or not with those before it.
        """
        for method in self.methods:
            modules_before = set(own_modules(model).values())
            method.apply(model)
            for module in own_modules(model).values():
                if module not in modules_before:
                    module.owner = method.name

    def apply(self, model: nn.Module) -> None:
        """As :meth:`add`: the modules belong to the single methods, not to this one."""
        self.add(model)

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of all methods by their names in the model."""
        return own_state(model)


def _parsed(items: list[Any]) -> list[Method]:
    """The settings of each method.

    Raises:
        ValueError: A name is unknown, settings are wrong, or methods cannot be combined.
    """
    parsed = [_parsed_one(index, item) for index, item in enumerate(items)]
    names = [method.name for method in parsed]
    for method in parsed:
        if rows_for_init(method):
            raise ValueError(f"{method.name}: init eva and lora-ga are only for recipe: lora or qlora")
    if len(set(names)) < len(names):
        raise ValueError(f"expected each method once, got {', '.join(names)}")
    if any(method.kind == "mergeable" for method in parsed[1:]):
        raise ValueError("expected at most one low-rank method, and that first")
    return parsed


def _parsed_one(index: int, item: Any) -> Method:
    """The settings of the method at an index of the list.

    Raises:
        ValueError: The name is unknown, or settings are wrong.
    """
    supported = [name for name, (kind, _) in METHODS.items() if kind != "full" and name not in _ALONE]
    name = item.get("name") if isinstance(item, dict) else getattr(item, "name", None)
    if name not in supported:
        suggestion = did_you_mean(str(name), supported)
        raise ValueError(f"unknown name {name!r}{suggestion}, expected one of: {', '.join(supported)}")
    if isinstance(item, Method):
        return item
    try:
        return methods()[name].model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{index}: {name}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
