"""The steps that recipes share: config, rows, applying the method, the plan, the run from start to result.

A recipe in ``finetune/`` is the only place where model, method, data and training loop meet.
"""

from lit_lora.recipe.config import (
    RECIPES,
    FinetuneConfig,
    ModelSettings,
    RunConfig,
    config_schema,
    load_recipe,
    load_settings,
    recipe_for,
)
from lit_lora.recipe.data import RunData, answer_samples, lengths_of, load_data, load_tokenizer, row_lengths
from lit_lora.recipe.entry import execute, main
from lit_lora.recipe.plan import (
    duration,
    in_words,
    planned_rows,
    planned_steps,
    setup_for,
    show_plan,
    show_what_trains,
    step_duration,
    warn_of,
)
from lit_lora.recipe.run import Options, Run, begin, card_of_model, finish, start, summary, write_adapter

__all__ = [
    "FinetuneConfig",
    "ModelSettings",
    "Options",
    "RECIPES",
    "Run",
    "RunConfig",
    "RunData",
    "answer_samples",
    "begin",
    "card_of_model",
    "config_schema",
    "duration",
    "execute",
    "finish",
    "in_words",
    "lengths_of",
    "load_data",
    "load_recipe",
    "load_settings",
    "load_tokenizer",
    "main",
    "planned_rows",
    "planned_steps",
    "recipe_for",
    "row_lengths",
    "setup_for",
    "show_plan",
    "show_what_trains",
    "start",
    "step_duration",
    "summary",
    "warn_of",
    "write_adapter",
]
