"""What a config file says: the sections that all recipes share, and the recipe that it names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic.json_schema import models_json_schema

from lit_lora.config import OneOf, Settings, did_you_mean, find_config, load_config, problem_at, read_yaml
from lit_lora.data import DataConfig
from lit_lora.data.config import RowsConfig
from lit_lora.errors import UsageError
from lit_lora.peft import METHODS, Method, methods
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.config import TrainConfig
from lit_lora.train.optim.build import AdamWConfig, AnyOptimizer
from lit_lora.train.schedule import ScheduleConfig

__all__ = [
    "FinetuneConfig",
    "ModelSettings",
    "RECIPES",
    "RunConfig",
    "config_schema",
    "load_recipe",
    "load_settings",
    "recipe_for",
]

# `recipe:` in a config -> the file in finetune/ that runs it
RECIPES: dict[str, str] = {
    "lora": "lit_lora.finetune.lora",
    "qlora": "lit_lora.finetune.qlora",
    "adapter": "lit_lora.finetune.adapter",
    "full": "lit_lora.finetune.full",
    "classify": "lit_lora.finetune.classify",
}


class ModelSettings(Settings):
    """The base model, and how it is held."""

    path: Path = Field(description="Checkpoint folder, as written by lit-lora download or convert.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Precision of the base weights; auto is bf16 where the hardware multiplies it."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")


class RunConfig(Settings):
    """One finetuning run; the YAML file's sections. Each recipe declares a ``Config`` of its own on top of it."""

    recipe: str = Field("lora", description="Which recipe runs: lora, qlora, adapter, full or classify.")
    model: ModelSettings = Field(description="The base model.")
    data: RowsConfig = Field(description="The rows to learn from.")
    peft: Method = Field(description="The method and its settings; name picks it.")
    train: TrainConfig = Field(TrainConfig(), description="How long and in what portions.")
    optimizer: AnyOptimizer = Field(AdamWConfig(), description="The optimizer and its settings; name picks it.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over the run.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the split, the order of rows, initial values and dropout.")
    out: Path = Field(Path("out/finetune"), description="The run folder.")

    @property
    def quantization(self) -> QuantizeConfig | None:
        """How the recipe quantizes the base while it loads; ``None`` where it does not."""
        return None

    @classmethod
    def method_table(cls) -> Mapping[str, type[Settings]]:
        """The methods that the recipe runs, by name; the first is the default."""
        return next(mark.models for mark in cls.model_fields["peft"].metadata if isinstance(mark, OneOf))

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_method(cls, data: Any) -> Any:
        """Refuse a method of another recipe by naming that recipe; take the method's learning rate if none is given."""
        section = data.get("peft", {}) if isinstance(data, dict) else None
        name = section.get("name", next(iter(cls.method_table()))) if isinstance(section, dict) else None
        if name not in METHODS:
            return data  # reported with the section
        if name not in cls.method_table():
            message = f"{name!r} is not for this recipe (did you mean recipe: {recipe_for(name)}?)"
            raise problem_at(("peft", "name"), message)
        optimizer = data.get("optimizer", {})
        if not isinstance(optimizer, dict) or "lr" in optimizer:
            return data
        try:
            lr = methods()[name].model_validate(section).lr
        except ValidationError:
            return data  # reported with the section
        return data if lr is None else {**data, "optimizer": {**optimizer, "lr": lr}}


class FinetuneConfig(RunConfig):
    """A run of a decoder, which learns to answer."""

    data: DataConfig = Field(description="The rows to learn from.")


def load_settings(recipe: str) -> type[RunConfig]:
    """The settings class of a recipe."""
    config: type[RunConfig] = importlib.import_module(RECIPES[recipe]).Config
    return config


def recipe_for(method: str) -> str:
    """The first recipe that runs a method of the table."""
    return next(recipe for recipe in RECIPES if method in load_settings(recipe).method_table())


def load_recipe(source: str | Path, overrides: Sequence[str]) -> tuple[Callable[..., Path], RunConfig]:
    """The recipe that a config file names, and its config, of the recipe's own class.

    Args:
        source: Path of a YAML file or name of a shipped one.
        overrides: ``key.sub=value``.

    Raises:
        UsageError: Unknown recipe, or problems in the config, all at once.
    """
    # Problems of the YAML are reported by load_config, with all others.
    data = read_yaml(find_config(source), problems=[])
    given = [override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
    if isinstance(data, dict) and "runs" in data:
        raise UsageError(f"{source}: is a comparison of runs", hint=f"lit-lora compare --config {source}")
    name = str(given[-1] if given else data.get("recipe", "lora") if isinstance(data, dict) else "lora")
    if name not in RECIPES:
        raise UsageError(
            f"{source}: recipe {name!r} is not known{did_you_mean(name, RECIPES)}, known: {', '.join(RECIPES)}"
        )
    config = load_config(source, load_settings(name), overrides)
    return importlib.import_module(RECIPES[name]).finetune, config


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, by which an editor completes and checks the YAML; ``recipe`` picks the part."""
    configs = {name: load_settings(name) for name in RECIPES}
    parts, schema = models_json_schema([(config, "validation") for config in configs.values()])
    cases = []
    for name, config in configs.items():
        case: dict[str, Any] = {"properties": {"recipe": {"const": name}}}
        if name != RunConfig.model_fields["recipe"].default:
            case["required"] = ["recipe"]
        cases.append({"if": case, "then": parts[config, "validation"]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lit-lora config",
        "type": "object",
        "properties": {"recipe": {"enum": list(configs)}},
        "allOf": cases,
        **schema,
    }
