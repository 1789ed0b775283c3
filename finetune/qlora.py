"""Finetune by a low-rank method on a quantised base: ``python finetune/qlora.py --config configs/qlora.yaml``.

``y = deq(codes) x + (alpha / r) B A x``: the base weights are held in about 4 bits and dequantised for each product, in
the forward and again in the backward; only the small ``A`` and ``B`` train. Source: QLoRA, arXiv:2305.14314, section 3.
Methods that choose codes and update together (LoftQ, LQ-LoRA) start from the weights in full, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.peft import save_adapter
from lit_lora.recipe import (
    Options,
    QLoRAConfig,
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
from lit_lora.recipe.method import finalize
from lit_lora.recipe.quantized_base import keep_base, load_base
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]

Config = finetune_config("qlora", "mergeable", "quantized", base=QLoRAConfig)


def finetune(config: QLoRAConfig, options: Options) -> Path:
    """Train an adapter and save it, in PEFT's format, as ``adapter/`` in the run folder.

    Returns:
        The run folder.
    """
    run = start(config, options)
    tokenizer = Tokenizer.load(config.model.path)
    chosen = config.peft.for_quantized_base(config.quantize)  # not every method is for every base
    method = chosen.with_token_ids(tokenizer.add_tokens)
    data = load_data(run, tokenizer)
    model, applied = load_base(run, config, method, data)  # quantised, with the method applied
    model.checkpoint_activations(config.train.activation_checkpointing)
    plan(run, model, data)
    if options.dry_run:
        return run.folder
    claim_folder(run, model, applied)
    base = keep_base(run, applied, model)
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
    save_adapter(model, applied, adapter, base=base, data=data.about, metrics=summary(result))
    if method is not chosen:  # tokens were added: the adapter needs its own tokenizer
        tokenizer.save(adapter)
    finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora merge {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(finetune, Config)
