"""Finetune by added modules or prompts: ``python finetune/adapter.py --config configs/adapter.yaml``.

The base is frozen; small modules beside it train: adapters after attention and MLP, keys and values or embeddings
before every document, gated prompts. Their output depends on the input, so they cannot be merged.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.checkpoint import load_model
from lit_lora.config import OneOf
from lit_lora.peft import Method, freeze, lr_factors, methods, with_text
from lit_lora.peft.adapters.bottleneck import HoulsbyConfig
from lit_lora.recipe import FinetuneConfig, Options, begin, finish, main, show_plan, start, write_adapter
from lit_lora.recipe.data import answer_samples, load_data, load_tokenizer
from lit_lora.recipe.method import apply_method
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]


class Config(FinetuneConfig):
    """A run by a method that adds modules or prompts."""

    recipe: Literal["adapter"] = Field("adapter", description="The recipe to run.")
    peft: Annotated[Method, OneOf(methods("added"))] = Field(HoulsbyConfig(), description="The method.")


def finetune(config: Config, options: Options) -> Path:
    """Train what the method adds, save it as ``adapter/``, and return the run folder."""
    run = start(config, options)
    tokenizer = load_tokenizer(config)
    method = with_text(config.peft, tokenizer.encode)
    data = load_data(config, tokenizer)

    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    method = apply_method(run, method, model, data)
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
