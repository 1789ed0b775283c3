"""``lit-lora finetune``: run a recipe from a config."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file, or name of a shipped config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as peft.rank=16.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything up to the first step.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the folder.")] = False,
) -> None:
    """Finetune a model: by LoRA, or in full, as the config says.

    Examples:
        lit-lora finetune --config lora data.path=mine.jsonl --dry-run

        lit-lora finetune --config my.yaml peft.rank=16 train.max_steps=200

        lit-lora finetune --config my.yaml --resume
    """
    from lit_lora.recipe import Options, execute, load_recipe

    recipe, settings = load_recipe(config, overrides or [])
    execute(recipe, settings, Options(dry_run=dry_run, resume=resume, overwrite=overwrite))
