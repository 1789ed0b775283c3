"""Finetune an encoder or an encoder-decoder on labeled rows: ``python finetune/classify.py --config FILE``.

BERT, RoBERTa, DeBERTa and the like get a head, which trains in full beside the method; T5 and the like learn to write
the label. The models are transformers'; methods, loop and files are those of the other recipes.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.classify.checkpoint import head_of, load_with_head, read_pretrained
from lit_lora.classify.run import (
    ClassifyConfig,
    apply_with_head,
    checkpoint_activations,
    load_labeled,
    plan_labeled,
    prediction_samples,
    save_result,
)
from lit_lora.config import OneOf
from lit_lora.peft import Method, freeze, lr_factors, methods
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.recipe import Options, begin, finish, main, start
from lit_lora.train.config import TrainConfig
from lit_lora.train.loop import fit

__all__ = ["Config", "finetune"]


class Config(ClassifyConfig):
    """A run on rows with labels."""

    recipe: Literal["classify"] = Field("classify", description="The recipe to run.")
    peft: Annotated[Method, OneOf(methods("mergeable", "added", "full"))] = Field(
        LoRAConfig(), description="The method."
    )
    train: TrainConfig = Field(
        TrainConfig(batch_size=32, micro_batch_tokens=4096), description="Training length, batches and validation."
    )


def finetune(config: Config, options: Options) -> Path:
    """Train head and method, save them as ``adapter/`` (the whole model as ``model/``), and return the run folder."""
    run = start(config, options)
    shape = read_pretrained(config.model.path)
    data = load_labeled(config, shape)

    model, fresh = load_with_head(shape, data.task, dtype=run.dtype, device=run.device)
    freeze(model)
    method = apply_with_head(run, model, head_of(model, fresh, data.task), data.task)
    checkpoint_activations(model, config.train.activation_checkpointing)

    plan_labeled(run, model, data)
    if not begin(run, model, method):  # a dry run
        return run.folder

    show = prediction_samples(model, shape, config, data)
    result = fit(run.training, model, data, data.task.objective, lr_factors=lr_factors(method, model), sample=show)
    written = save_result(run, model, shape, method, data, result)
    use = f"lit-lora classify {run.folder}"
    return finish(run, result, written, f"{use} TEXT   or   {use} --file FILE")


if __name__ == "__main__":
    main(finetune, Config)
