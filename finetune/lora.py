"""Finetune by a low-rank method on a full-precision base: ``python finetune/lora.py --config configs/lora.yaml``.

``y = W x + (alpha / r) B A x``: the base weight ``W`` is frozen; only the small ``A`` and ``B`` train.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.checkpoint import load_model
from lit_lora.config import OneOf
from lit_lora.peft import Method, freeze, lr_factors, methods, with_token_ids
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.recipe import FinetuneConfig, Options, begin, finish, main, show_plan, start, write_adapter
from lit_lora.recipe.data import answer_samples, load_data, load_tokenizer
from lit_lora.recipe.method import apply_method, finalize
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]


class Config(FinetuneConfig):
    """A run by a low-rank method."""

    recipe: Literal["lora"] = Field("lora", description="The recipe to run.")
    peft: Annotated[Method, OneOf(methods("mergeable"))] = Field(LoRAConfig(), description="The method.")


def finetune(config: Config, options: Options) -> Path:
    """Train an adapter, save it as ``adapter/`` in PEFT's format, and return the run folder."""
    run = start(config, options)
    tokenizer = load_tokenizer(config)
    method = with_token_ids(config.peft, tokenizer.add_tokens)
    data = load_data(config, tokenizer)

    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    method = apply_method(run, method, model, data)  # the model still computes what the base does
    model.checkpoint_activations(config.train.activation_checkpointing)

    show_plan(run, model, data)
    if not begin(run, model, method):  # a dry run
        return run.folder

    objective = NextToken(graph_safe=method.graph_safe)
    show = answer_samples(model, tokenizer, data)
    result = fit(run.training, model, data, objective, lr_factors=lr_factors(method, model), sample=show)
    method = finalize(method, model, data)
    adapter = write_adapter(run, model, method, tokenizer, result, data=data.about)
    return finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora merge {run.folder}")


if __name__ == "__main__":
    main(finetune, Config)
