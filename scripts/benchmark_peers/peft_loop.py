"""PEFT + transformers: a plain training loop over padded (or packed) batches with the model's own loss.

Variants: ``precision`` fp32, tf32 (fp32 whose products may run in bf16), bf16, autocast; ``micro_batch`` rows;
``attention`` sdpa or eager; ``packed`` rows joined to one with restarting positions; ``checkpointing``.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from harness import IGNORE_INDEX, Recorder, Row, lora_a_start, micro_batches, pad, read_orders
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    """Train as ordered and write the record."""
    logging.disable_progress_bar()
    orders = read_orders()
    variant = orders.variant
    precision = variant["precision"]
    if precision == "tf32":
        torch.set_float32_matmul_precision("medium")
    model = AutoModelForCausalLM.from_pretrained(
        orders.model,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        attn_implementation=variant.get("attention", "sdpa"),
    )
    model = get_peft_model(
        model,
        LoraConfig(
            r=orders.rank,
            lora_alpha=orders.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    start_lora(model)
    if variant.get("checkpointing"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=orders.learning_rate, weight_decay=0.0)
    collate = join if variant.get("packed") else pad

    def train_step(rows: list[Row]) -> float:
        targets = sum(row.targets for row in rows)
        total = 0.0
        for micro_batch in micro_batches(rows, variant["micro_batch"]):
            with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
                loss = model(**collate(micro_batch), num_items_in_batch=targets, use_cache=False).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    recorder = Recorder(orders, packages=("transformers", "peft"))
    recorder.extra["trainable_parameters"] = sum(parameter.numel() for parameter in trainable)
    recorder.run(train_step)
    recorder.finish()


def start_lora(model: torch.nn.Module) -> None:
    """Give PEFT's LoRA layers the benchmark's start values."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            layer = name.partition("base_model.model.")[2].partition(".lora_A.")[0]
            parameter.data.copy_(lora_a_start(layer, *parameter.shape))


def join(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows joined to one sequence: transformers takes the restarting positions as document boundaries."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row.ids))]]),
        "labels": torch.tensor([[IGNORE_INDEX if i == 0 else t for row in rows for i, t in enumerate(row.labels)]]),
    }


if __name__ == "__main__":
    main()
