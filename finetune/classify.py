"""Finetune an encoder or an encoder-decoder on rows with labels: ``python finetune/classify.py --config FILE``.

BERT, RoBERTa, DeBERTa and their like get a head that trains in full beside the method; T5 and its like learn to write
the label. The models are transformers'; methods, loop and files are those of the other recipes.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.classify import (
    ClassifyConfig,
    apply_with_head,
    checkpoint_activations,
    head_of,
    load_labelled,
    load_with_head,
    plan_labelled,
    prediction_samples,
    read_pretrained,
    save_result,
)
from lit_lora.peft import freeze
from lit_lora.recipe import Options, claim_folder, finetune_config, finish, main, start
from lit_lora.train.config import TrainConfig
from lit_lora.train.loop import fit

__all__ = ["Config", "finetune"]

Config = finetune_config(
    "classify",
    "mergeable",
    "added",
    "full",
    base=ClassifyConfig,
    train=TrainConfig(batch_size=32, micro_batch_tokens=4096),
)


def finetune(config: ClassifyConfig, options: Options) -> Path:
    """Train head and method, and save them as ``adapter/``, or of full finetuning the whole model as ``model/``.

    Returns:
        The run folder.
    """
    run = start(config, options)
    shape = read_pretrained(config.model.path)
    data = load_labelled(run, config, shape)
    model, fresh = load_with_head(shape, data.task, dtype=run.dtype, device=run.device)
    freeze(model)
    method = apply_with_head(config.peft, model, head_of(model, fresh, data.task))
    checkpoint_activations(model, config.train.activation_checkpointing)
    plan_labelled(run, model, data)
    if options.dry_run:
        return run.folder
    claim_folder(run, model)
    result = fit(
        model,
        data.batches,
        config.train,
        optimizer=config.optimizer,
        schedule=config.schedule,
        folder=run.folder,
        seed=config.seed,
        validation=data.validation,
        sample=prediction_samples(model, shape, config, data),
        resume=options.resume,
        lr_factors=method.lr_factors(model),
        objective=data.task.objective,
    )
    written = save_result(run, model, shape, method, data, result)
    use = f"lit-lora classify {run.folder}"
    finish(run, result, written, f"{use} TEXT   or   {use} --file FILE")
    return run.folder


if __name__ == "__main__":
    main(finetune, Config)
