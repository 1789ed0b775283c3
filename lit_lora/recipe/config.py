"""The config file: the sections that all recipes share, and the table of recipes."""

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
from lit_lora.errors import InputError, UsageError
from lit_lora.peft import METHODS, Method, methods
from lit_lora.peft.files.init_adapter import settings_from
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.config import TrainConfig
from lit_lora.train.optim.build import AdamWConfig, AnyOptimizer
from lit_lora.train.schedule import ScheduleConfig

__all__ = [
    "DecoderSettings",
    "FinetuneConfig",
    "ModelSettings",
    "RECIPES",
    "RunConfig",
    "config_schema",
    "load_recipe",
    "load_settings",
    "recipe_for",
]

RECIPES: dict[str, str] = {
    "lora": "lit_lora.finetune.lora",
    "qlora": "lit_lora.finetune.qlora",
    "adapter": "lit_lora.finetune.adapter",
    "full": "lit_lora.finetune.full",
    "classify": "lit_lora.finetune.classify",
}
"""``recipe:`` in a config: the module that runs it. Names instead of modules, because recipes import this package."""


class ModelSettings(Settings):
    """The base model, its precision and its device."""

    path: Path = Field(description="Checkpoint folder, as written by lit-lora download or convert.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Precision of the base weights; auto is bf16 if the hardware supports it."
    )
    device: str = Field("auto", description="Device to train on: auto, cpu, cuda, cuda:1 or mps.")


class DecoderSettings(ModelSettings):
    """A base model that answers in a conversation."""

    chat_template: str | None = Field(
        None,
        description="Chat template: a name such as chatml, or a Jinja file; if omitted, the checkpoint's own.",
    )


class RunConfig(Settings):
    """The config of a finetuning run. Each recipe declares its own ``Config``, a subclass of this."""

    recipe: str = Field("lora", description="The recipe to run: lora, qlora, adapter, full or classify.")
    model: ModelSettings = Field(description="The base model.")
    data: RowsConfig = Field(description="The training data.")
    peft: Method = Field(description="The method.")
    train: TrainConfig = Field(TrainConfig(), description="Training length, batches and validation.")
    optimizer: AnyOptimizer = Field(AdamWConfig(), description="The optimizer, by name.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate schedule.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds the split, row order, initialization and dropout.")
    out: Path = Field(Path("out/finetune"), description="The run folder.")

    @property
    def quantization(self) -> QuantizeConfig | None:
        """How the base is quantized when it is loaded; ``None`` if it is not."""
        return None

    @classmethod
    def method_table(cls) -> Mapping[str, type[Settings]]:
        """The methods that the recipe can run, by name; the first is the default."""
        return next(marker.models for marker in cls.model_fields["peft"].metadata if isinstance(marker, OneOf))

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_method(cls, data: Any) -> Any:
        """Complete the section by those of ``init_adapter``, and the learning rate by the method's own.

        A method of another recipe is refused by naming that recipe.
        """
        section = data.get("peft", {}) if isinstance(data, dict) else None
        if not isinstance(section, dict):
            return data  # reported when the section itself is validated
        if "init_adapter" in section:
            section = _with_settings_of_adapter(section, cls.method_table())
            data = {**data, "peft": section}
        default_method = next(iter(cls.method_table()))
        name = section.get("name", default_method)
        if name not in METHODS:
            return data  # likewise
        if name not in cls.method_table():
            message = f"{name!r} is not for this recipe (did you mean recipe: {recipe_for(name)}?)"
            raise problem_at(("peft", "name"), message)

        optimizer = data.get("optimizer", {})
        if not isinstance(optimizer, dict) or "lr" in optimizer:
            return data
        try:
            lr = methods()[name].model_validate(section).lr
        except ValidationError:
            return data  # likewise
        return data if lr is None else {**data, "optimizer": {**optimizer, "lr": lr}}


def _with_settings_of_adapter(section: dict[str, Any], method_table: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """The section ``peft`` with the settings of its ``init_adapter`` for those that it omits.

    A folder that is not readable changes nothing: a finished run can be opened without it, and one to start refuses it.

    Raises:
        ValidationError: The recipe trains the model itself.
    """
    name = section.get("name", next(iter(method_table)) if len(method_table) == 1 else None)
    if name == "full":
        raise problem_at(
            ("peft", "init_adapter"), "full starts from model.path: give the folder of a model, such as RUN/model"
        )
    try:
        settings = settings_from(Path(section["init_adapter"]))
    except (InputError, OSError, TypeError):
        return section
    if section.get("name", settings["name"]) != settings["name"]:
        return section  # reported when the run starts
    return {**settings, **section}


class FinetuneConfig(RunConfig):
    """The config of a run that trains a decoder to answer."""

    model: DecoderSettings = Field(description="The base model.")
    data: DataConfig = Field(description="The training data.")


def load_settings(recipe: str) -> type[RunConfig]:
    """The settings class of a recipe."""
    config: type[RunConfig] = importlib.import_module(RECIPES[recipe]).Config
    return config


def recipe_for(method: str) -> str:
    """The first recipe that can run a method of ``METHODS``."""
    return next(recipe for recipe in RECIPES if method in load_settings(recipe).method_table())


def load_recipe(source: str | Path, overrides: Sequence[str]) -> tuple[Callable[..., Path], RunConfig]:
    """The recipe that a config file names, and its config as an instance of the recipe's ``Config``.

    Args:
        source: Path of a YAML file, or name of a shipped config.
        overrides: Settings such as ``train.max_steps=20``.

    Raises:
        UsageError: Unknown recipe, or problems in the config, all at once.
    """
    # Problems of the YAML are ignored until load_config reports them with all others.
    data = read_yaml(find_config(source), problems=[])
    if not isinstance(data, dict):
        data = {}
    if "runs" in data:
        raise UsageError(f"{source}: is a comparison of runs", hint=f"lit-lora compare --config {source}")

    where, name = str(source), str(data.get("recipe", "lora"))
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "recipe":
            where, name = repr(override), value
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise UsageError(f"{where}: unknown recipe {name!r}{did_you_mean(name, RECIPES)}, known: {known}")
    config = load_config(source, load_settings(name), overrides)
    return importlib.import_module(RECIPES[name]).finetune, config


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for completion and checks in an editor. ``recipe`` selects the subschema."""
    configs = {name: load_settings(name) for name in RECIPES}
    parts, schema = models_json_schema([(config, "validation") for config in configs.values()])
    cases = []
    for name, config in configs.items():
        case: dict[str, Any] = {"properties": {"recipe": {"const": name}}}
        if name != RunConfig.model_fields["recipe"].default:
            case["required"] = ["recipe"]  # without it, a config with no recipe would match every case
        cases.append({"if": case, "then": parts[config, "validation"]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lit-lora config",
        "type": "object",
        "properties": {"recipe": {"enum": list(configs)}},
        "allOf": cases,
        **schema,
    }
