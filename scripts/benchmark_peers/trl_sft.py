"""TRL's SFTTrainer with packing (best-fit decreasing), on the same tokens and targets.

The trainer draws its own batches, so a step holds about as many rows as the others' steps, not the very same ones;
the tokens of each timed step are counted from the batches that it trained on.
Variants: ``precision`` fp32, bf16, autocast, or both (autocast over bf16 weights); ``max_length`` tokens of a packed
row; ``packed_rows`` in a micro-batch; ``accumulation`` micro-batches a step; ``packing`` false pads ``packed_rows``
rows instead; ``checkpointing``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from harness import IGNORE_INDEX, Clock, Recorder, Row, lora_a_start, read_orders
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer


class StepClock(TrainerCallback):
    """Times the trainer's steps and counts what each one trained on."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.tokens = self.targets = 0
        self.clock = Clock()

    def count(self, batch: dict[str, Any]) -> None:
        """Count the tokens of a collated batch: no padding, and no first tokens among the targets."""
        if "attention_mask" in batch:
            self.tokens += int(batch["attention_mask"].sum())
        else:
            self.tokens += batch["input_ids"].numel()
        self.targets += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock; the loss follows in ``on_log``."""
        self.recorder.add(**self.clock.read(), tokens=self.tokens, targets=self.targets, loss=float("nan"))
        self.tokens = self.targets = 0

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Take the step's loss."""
        if "loss" in logs:
            self.recorder.steps[-1]["loss"] = float(logs["loss"])


def main() -> None:
    """Train as ordered and write the record."""
    logging.disable_progress_bar()
    orders = read_orders()
    variant = orders.variant
    precision = variant["precision"]
    packing = variant.get("packing", True)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=orders.device == "cpu",
            bf16="autocast" in precision,
            packing=packing,
            packing_strategy="bfd",
            max_length=variant["max_length"],
            per_device_train_batch_size=variant["packed_rows"],
            gradient_accumulation_steps=variant["accumulation"],
            gradient_checkpointing=variant.get("checkpointing", False),
            num_train_epochs=1,
            learning_rate=orders.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        rows: list[Row] = [row for step in orders.steps for row in step]
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                orders.model,
                dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32,
                trust_remote_code=False,
            ),
            args=config,
            train_dataset=Dataset.from_dict(
                {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}
            ),
            processing_class=AutoTokenizer.from_pretrained(orders.model, trust_remote_code=False),
            peft_config=LoraConfig(
                r=orders.rank,
                lora_alpha=orders.alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        for name, parameter in trainer.model.named_parameters():
            if ".lora_A." in name:
                layer = name.partition("base_model.model.")[2].partition(".lora_A.")[0]
                parameter.data.copy_(lora_a_start(layer, *parameter.shape))
        recorder = Recorder(orders, packages=("transformers", "peft", "trl"))
        clock = StepClock(recorder)
        trainer.add_callback(clock)
        training_step = trainer.training_step

        def counting_step(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            clock.count(inputs)
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = counting_step
        trainer.train()
        recorder.finish()


if __name__ == "__main__":
    main()
