"""Finetune by added modules or prompts: ``python finetune/adapter.py --config configs/adapter.yaml``.

The base keeps its weights and its shape; small modules beside it train: adapters after a block's parts, keys and values
or embeddings before every document, gated prompts. What they compute depends on the input, so they do not merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.checkpoint.load import load_model
from lit_lora.config import OneOf
from lit_lora.peft import Method, freeze, lr_factors, methods, with_text
from lit_lora.peft.adapters.bottleneck import HoulsbyConfig
from lit_lora.recipe.config import FinetuneConfig
from lit_lora.recipe.data import answer_samples, load_data
from lit_lora.recipe.entry import main
from lit_lora.recipe.plan import show_plan
from lit_lora.recipe.run import Options, begin, finish, start, write_adapter
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]


class Config(FinetuneConfig):
    """A run by a method that adds modules or prompts."""

    recipe: Literal["adapter"] = Field("adapter", description="The recipe that runs.")
    peft: Annotated[Method, OneOf(methods("added"))] = Field(HoulsbyConfig(), description="The method; name picks it.")


def finetune(config: Config, options: Options) -> Path:
    """Train what the method adds, save it as ``adapter/``, and return the run folder."""
    run = start(config, options)
    tokenizer = Tokenizer.load(config.model.path)
    method = with_text(config.peft, tokenizer.encode)
    data = load_data(config, tokenizer)
    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    method.apply(model)
    model.checkpoint_activations(config.train.activation_checkpointing)
    show_plan(run, model, data)
    if not begin(run, model, method):  # a dry run
        return run.folder
    objective = NextToken(graph_safe=method.graph_safe)
    show = answer_samples(model, tokenizer, data)
    result = fit(run.training, model, data, objective, lr_factors=lr_factors(method, model), sample=show)
    adapter = write_adapter(run, model, method, tokenizer, result, data=data.about)
    return finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora evaluate {run.folder} --data FILE")


if __name__ == "__main__":
    main(finetune, Config)
