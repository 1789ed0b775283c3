"""Finetune the model's own weights, all or some: ``python finetune/full.py --config configs/full.yaml``.

Weights in bfloat16 have float32 masters, so that updates smaller than their rounding are not lost.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import save_model
from lit_lora.peft import freeze, model_card
from lit_lora.recipe import (
    FinetuneConfig,
    Options,
    answer_samples,
    claim_folder,
    finetune_config,
    finish,
    load_data,
    main,
    plan,
    start,
    summary,
)
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.loop import fit
from lit_lora.train.optim.build import AdamWConfig

__all__ = ["Config", "finetune"]

Config = finetune_config("full", "full", optimizer=AdamWConfig(lr=2e-5))


def finetune(config: FinetuneConfig, options: Options) -> Path:
    """Train the weights and save the whole model as ``model/`` in the run folder.

    Returns:
        The run folder.
    """
    run = start(config, options)
    tokenizer = Tokenizer.load(config.model.path)
    data = load_data(run, tokenizer)
    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    config.peft.apply(model)
    model.checkpoint_activations(config.train.activation_checkpointing)
    plan(run, model, data)
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
        sample=answer_samples(model, tokenizer, data),
        resume=options.resume,
    )
    target = run.folder / "model"
    title = f"{config.model.path.name}, finetuned"
    card = model_card(
        title, base=str(config.model.path), method="full", data=data.about, metrics=summary(result), adapter=False
    )
    save_model(model, target, side_files=config.model.path, card=card)
    finish(run, result, target, f"lit-lora chat {target}   or   lit-lora evaluate {target} --data FILE")
    return run.folder


if __name__ == "__main__":
    main(finetune, Config)
