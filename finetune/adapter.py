"""Finetune by added modules or prompts: ``python finetune/adapter.py --config configs/adapter.yaml``.

The base keeps its weights and its shape; small modules beside it train: adapters after a block's parts, keys and values
or embeddings before every document, gated prompts. What they compute depends on the input, so they do not merge.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.checkpoint.load import load_model
from lit_lora.peft import freeze, save_adapter
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
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]

Config = finetune_config("adapter", "added")


def finetune(config: FinetuneConfig, options: Options) -> Path:
    """Train what the method adds and save it as ``adapter/`` in the run folder, in PEFT's format where it has one.

    Returns:
        The run folder.
    """
    run = start(config, options)
    tokenizer = Tokenizer.load(config.model.path)
    method = config.peft.with_text(tokenizer.encode)
    data = load_data(run, tokenizer)
    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    method.apply(model)
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
        lr_factors=method.lr_factors(model),
        objective=NextToken(graph_safe=method.graph_safe),
    )
    adapter = run.folder / "adapter"
    save_adapter(model, method, adapter, base=config.model.path, data=data.about, metrics=summary(result))
    finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora evaluate {run.folder} --data FILE")
    return run.folder


if __name__ == "__main__":
    main(finetune, Config)
