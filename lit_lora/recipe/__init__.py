"""What the recipes share: the config, a run from start to result, its rows, the plan printed before it.

A recipe in ``finetune/`` is the one place where a model, a method, data and the loop meet; this package holds the steps
that would otherwise be written in each.
"""

from lit_lora.recipe.config import (
    RECIPES,
    FinetuneConfig,
    ModelSettings,
    QLoRAConfig,
    RunConfig,
    config_schema,
    finetune_config,
    load_recipe,
    load_settings,
    recipe_for,
)
from lit_lora.recipe.data import RunData, answer_samples, lengths_of, load_data, row_lengths
from lit_lora.recipe.entry import execute, main
from lit_lora.recipe.plan import (
    duration,
    in_words,
    plan,
    planned_rows,
    planned_steps,
    show_what_trains,
    step_duration,
    warn_of,
)
from lit_lora.recipe.run import Options, Run, claim_folder, finish, start, summary

__all__ = [
    "FinetuneConfig",
    "ModelSettings",
    "Options",
    "QLoRAConfig",
    "RECIPES",
    "Run",
    "RunConfig",
    "RunData",
    "answer_samples",
    "claim_folder",
    "config_schema",
    "duration",
    "execute",
    "finetune_config",
    "finish",
    "in_words",
    "lengths_of",
    "load_data",
    "load_recipe",
    "load_settings",
    "main",
    "plan",
    "planned_rows",
    "planned_steps",
    "recipe_for",
    "row_lengths",
    "show_what_trains",
    "start",
    "step_duration",
    "summary",
    "warn_of",
]
