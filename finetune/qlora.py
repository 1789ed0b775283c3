"""Finetune by a low-rank method on a quantized base: ``python finetune/qlora.py --config configs/qlora.yaml``.

``y = deq(codes) x + (alpha / r) B A x``: the base weights take about 4 bits each and are dequantized for every product,
forward and backward; only the small ``A`` and ``B`` train. Source: QLoRA, arXiv:2305.14314, section 3.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_lora.config import OneOf
from lit_lora.peft import Method, lr_factors, methods, with_token_ids
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.quantize import QuantizeConfig
from lit_lora.recipe import FinetuneConfig, Options, begin, finish, main, show_plan, start, write_adapter
from lit_lora.recipe.data import answer_samples, load_data, load_tokenizer
from lit_lora.recipe.method import finalize
from lit_lora.recipe.quantized_base import for_quantized_base, keep_base, load_base
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["Config", "finetune"]


class Config(FinetuneConfig):
    """A run by a low-rank method on a quantized base."""

    recipe: Literal["qlora"] = Field("qlora", description="The recipe to run.")
    peft: Annotated[Method, OneOf(methods("mergeable", "quantized"))] = Field(LoRAConfig(), description="The method.")
    quantize: QuantizeConfig = Field(QuantizeConfig(), description="Quantization of the base model's linear layers.")

    @property
    def quantization(self) -> QuantizeConfig:
        """The quantization of the base."""
        return self.quantize


def finetune(config: Config, options: Options) -> Path:
    """Train an adapter, save it as ``adapter/`` in PEFT's format, and return the run folder."""
    run = start(config, options)
    tokenizer = load_tokenizer(config)
    method = for_quantized_base(config.peft, config.quantize)
    method = with_token_ids(method, tokenizer.add_tokens)
    data = load_data(config, tokenizer)

    # LoftQ and LQ-LoRA choose codes and update together, so the base is quantized and the method applied in one step.
    model, method = load_base(run, config.quantize, method, data)
    model.checkpoint_activations(config.train.activation_checkpointing)

    show_plan(run, model, data)
    if not begin(run, model, method):  # a dry run
        return run.folder

    base = keep_base(run, method, model)
    objective = NextToken(graph_safe=method.graph_safe)
    show = answer_samples(model, tokenizer, data)
    result = fit(run.training, model, data, objective, lr_factors=lr_factors(method, model), sample=show)
    method = finalize(method, model, data)
    adapter = write_adapter(run, model, method, tokenizer, result, data=data.about, base=base)
    return finish(run, result, adapter, f"lit-lora chat {run.folder}   or   lit-lora merge {run.folder}")


if __name__ == "__main__":
    main(finetune, Config)
