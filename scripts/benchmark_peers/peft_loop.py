"""PEFT + transformers (+ bitsandbytes): a plain training loop over padded or packed batches, the model's own loss.

Variants: ``precision`` fp32, tf32 (fp32 whose products may run in bf16), bf16, autocast (over fp32 weights), or both
(autocast over bf16 weights, for the adapter's fp32 ones); ``micro_batch`` rows;
``attention`` sdpa or eager; ``packed`` rows joined to one with restarting positions; ``checkpointing``; ``quantize``
nf4 for a base in 4 bits with double quantization, ``prepared`` by PEFT for training on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from harness import IGNORE_INDEX, Orders, Recorder, Row, lora_a_start, micro_batches, pad, read_orders
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging


def main() -> None:
    """Train as ordered and write the record."""
    logging.disable_progress_bar()
    orders = read_orders()
    variant = orders.variant
    precision = variant["precision"]
    if precision == "tf32":
        torch.set_float32_matmul_precision("medium")
    model = load(orders)
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
    if variant.get("checkpointing") and not variant.get("prepared"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=orders.learning_rate, weight_decay=0.0)
    form = join if variant.get("packed") else pad

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(orders.device) for name, tensor in form(rows).items()}

    def run_in_precision() -> AbstractContextManager[object]:
        return torch.autocast(orders.device, torch.bfloat16) if "autocast" in precision else nullcontext()

    def train_step(rows: list[Row]) -> float:
        targets = sum(row.targets for row in rows)
        total = 0.0
        for micro_batch in micro_batches(rows, variant["micro_batch"]):
            with run_in_precision():
                loss = model(**collate(micro_batch), num_items_in_batch=targets, use_cache=False).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    recorder = Recorder(orders, packages=("transformers", "peft"))
    recorder.extra["trainable_parameters"] = sum(parameter.numel() for parameter in trainable)
    recorder.run(train_step)
    if orders.validation:
        model.eval()
        targets, total = sum(row.targets for row in orders.validation), 0.0
        for micro_batch in micro_batches(orders.validation, variant["micro_batch"]):
            with torch.no_grad(), run_in_precision():
                total += model(**collate(micro_batch), num_items_in_batch=targets, use_cache=False).loss.item()
        recorder.extra["validation_loss"] = total
    recorder.finish()


def load(orders: Orders) -> torch.nn.Module:
    """The base model as the variant holds it."""
    variant = orders.variant
    compute = torch.float32 if variant["precision"] in ("fp32", "tf32") else torch.bfloat16
    settings = {}
    if variant.get("quantize"):
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=variant["quantize"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    model = AutoModelForCausalLM.from_pretrained(
        orders.model,
        dtype=torch.bfloat16 if variant["precision"].startswith("bf16") else torch.float32,
        attn_implementation=variant.get("attention", "sdpa"),
        device_map=None if orders.device == "cpu" else {"": orders.device},
        trust_remote_code=False,
        **settings,
    )
    if variant.get("prepared"):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=variant.get("checkpointing", False))
    return model


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
