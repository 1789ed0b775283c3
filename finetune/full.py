"""Finetune the model's own weights, all or some: ``python finetune/full.py --config configs/full.yaml``.

Weights in bfloat16 get float32 masters, so that updates smaller than bfloat16's rounding are not lost.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.checkpoint import load_model
from lit_lora.checkpoint.save import save_model
from lit_lora.config import OneOf
from lit_lora.data.trained import save_reading
from lit_lora.peft import freeze, methods
from lit_lora.peft.selective.full import FullConfig
from lit_lora.recipe import FinetuneConfig, Options, begin, card_of_model, finish, main, show_plan, start, summary
from lit_lora.recipe.data import answer_samples, load_data, load_tokenizer
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.optim.build import AdamWConfig, AnyOptimizer

__all__ = ["Config", "finetune"]


class Config(FinetuneConfig):
    """A run that trains the model's own weights."""

    recipe: Literal["full"] = Field("full", description="The recipe to run.")
    peft: Annotated[FullConfig, OneOf(methods("full"))] = Field(FullConfig(), description="The weights to train.")
    optimizer: AnyOptimizer = Field(AdamWConfig(lr=2e-5), description="The optimizer, by name.")


def finetune(config: Config, options: Options) -> Path:
    """Train the weights, save the whole model as ``model/``, and return the run folder."""
    run = start(config, options)
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)

    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    config.peft.apply(model)
    model.checkpoint_activations(config.train.activation_checkpointing)

    show_plan(run, model, data)
    if not begin(run, model, config.peft):  # a dry run
        return run.folder

    result = fit(run.training, model, data, NextToken(), sample=answer_samples(model, tokenizer, data))
    card = card_of_model(run, data.about, summary(result))
    saved = save_model(model, run.folder / "model", side_files=config.model.path, card=card)
    if tokenizer.changed:
        tokenizer.save(saved)
    save_reading(config.data, saved)
    return finish(run, result, saved, f"lit-lora chat {saved}   or   lit-lora evaluate {saved} --data FILE")


if __name__ == "__main__":
    main(finetune, Config)
