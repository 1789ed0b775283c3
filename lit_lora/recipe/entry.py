"""Run a recipe, from a command or as a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_lora.config import load_config
from lit_lora.errors import LitLoraError, OutOfMemoryError, disk_error
from lit_lora.estimate import estimate
from lit_lora.estimate.advice import advise
from lit_lora.hf import read_config
from lit_lora.recipe.config import FinetuneConfig, RunConfig
from lit_lora.recipe.data import row_lengths
from lit_lora.recipe.plan import in_words, setup_for
from lit_lora.recipe.run import Options
from lit_lora.train.device import choose_device, choose_dtype

__all__ = ["execute", "main"]


def execute(recipe: Callable[[Any, Options], Path], config: RunConfig, options: Options) -> Path:
    """Run a recipe and return its run folder.

    Raises:
        OutOfMemoryError: With settings that would fit.
    """
    try:
        return recipe(config, options)
    except OutOfMemoryError as error:
        if not isinstance(config, FinetuneConfig):
            raise
        device = choose_device(config.model.device)
        setup = setup_for(
            config,
            shape=read_config(config.model.path),
            rows=row_lengths(config),
            dtype=choose_dtype(config.model.dtype, device),
            device=device,
        )
        # How much memory was free is unknown by now. The estimated need was too much, so look for clearly less.
        advice = advise(setup, 0.8 * estimate(setup).peak_bytes)
        raise OutOfMemoryError(str(error), hint=f"{in_words(advice)} by lit-lora estimate") from error


def main(recipe: Callable[[Any, Options], Path], config: type[RunConfig]) -> None:
    """The ``__main__`` of a recipe file: ``python finetune/lora.py --config FILE [key=value …]``.

    Raises:
        SystemExit: With the error's exit code.
    """
    parser = argparse.ArgumentParser(description=sys.modules[recipe.__module__].__doc__)
    parser.add_argument("--config", required=True, help="path of a YAML file, or name of a shipped config")
    parser.add_argument("--dry-run", action="store_true", help="stop before the first step and write nothing")
    parser.add_argument("--resume", action="store_true", help="continue after the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder already contains")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.max_steps=20")
    arguments = parser.parse_args()
    options = Options(arguments.dry_run, arguments.resume, arguments.overwrite)
    try:
        execute(recipe, load_config(arguments.config, config, arguments.overrides), options)
    except LitLoraError as error:
        raise SystemExit(error.report()) from None
    except OSError as error:
        raise SystemExit(disk_error(error).report()) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
