"""``lit-lora finetune``: finetune a model as a config says."""

from __future__ import annotations

from typing import Annotated

import typer

from lit_lora.cli import options

__all__ = ["command"]


def command(
    config: options.Config,
    overrides: options.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run in the folder.")] = False,
) -> None:
    """Finetune a model with the recipe and the method that the config names.

    Examples:
        lit-lora finetune --config lora data.path=mine.jsonl --dry-run

        lit-lora finetune --config my.yaml peft.rank=16 train.max_steps=200

        lit-lora finetune --config my.yaml --resume
    """
    from lit_lora.recipe import Options, execute, load_recipe

    recipe, settings = load_recipe(config, overrides or [])
    execute(recipe, settings, Options(dry_run=dry_run, resume=resume, overwrite=overwrite))
