"""Finetune by a low-rank method on a full-precision base: ``python finetune/lora.py --config configs/lora.yaml``.

``y = W x + (alpha / r) B A x``: the base weight ``W`` keeps its value, only the small ``A`` and ``B`` train.
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
from lit_lora.recipe.method import apply_method, finalize
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]

Config = finetune_config("lora", "mergeable")


def finetune(config: FinetuneConfig, options: Options) -> Path:
    """Train an adapter and save it, in PEFT's format, as ``adapter/`` in the run folder.

    Returns:
        The run folder.
    """
    run = start(config, options)
    tokenizer = Tokenizer.load(config.model.path)
    method = config.peft.with_token_ids(tokenizer.add_tokens)
    data = load_data(run, tokenizer)
    model = load_model(config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    applied = apply_method(run, method, model, data)  # nothing that the model computes changes yet
    model.checkpoint_activations(config.train.activation_checkpointing)
    plan(run, model, data)
    if options.dry_run:
        return run.folder
    claim_folder(run, model, applied)
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
        lr_factors=applied.lr_factors(model),
        objective=NextToken(graph_safe=applied.graph_safe),
    )
    applied = finalize(applied, model, data)
    adapter = run.folder / "adapter"
    save_adapter(model, applied, adapter, base=config.model.path, data=data.about, metrics=summary(result))
    if method is not config.peft:  # tokens were added: the adapter needs its own tokenizer
        tokenizer.save(adapter)
    finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora merge {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(finetune, Config)
