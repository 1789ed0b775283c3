"""LitGPT's LoRA finetuning: its GPT, its Fabric set-up, its loss and its steps in the order of its own recipe.

Its recipe weighs every micro-batch alike; here each is weighed by its target tokens, at the same cost, so that all
contenders minimize the same loss. Variants: ``precision`` bf16-true, bf16-mixed, 32-true; ``micro_batch`` rows.
"""

from __future__ import annotations

import lightning
import torch
from harness import Recorder, Row, lora_a_start, micro_batches, pad, read_orders
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.utils import chunked_cross_entropy, load_checkpoint

PARTS = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def main() -> None:
    """Train as ordered and write the record."""
    orders = read_orders()
    variant = orders.variant
    config = Config.from_file(
        orders.model / "model_config.yaml",
        lora_r=orders.rank,
        lora_alpha=orders.alpha,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        lora_head=False,
    )
    fabric = lightning.Fabric(devices=1, accelerator=orders.device, precision=variant["precision"])
    fabric.launch()
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trainable, lr=orders.learning_rate, weight_decay=0.0))
    load_checkpoint(fabric, model, orders.model / "lit_model.pth", strict=False)
    start_lora(model, orders.rank)
    model.max_seq_length = max(len(row.ids) for step in orders.steps for row in step)
    model.train()

    def train_step(rows: list[Row]) -> float:
        targets = sum(row.targets for row in rows)
        total = 0.0
        batches = micro_batches(rows, variant["micro_batch"])
        for number, micro_batch in enumerate(batches):
            batch = {name: tensor.to(orders.device) for name, tensor in pad(micro_batch).items()}
            share = sum(row.targets for row in micro_batch) / targets
            with fabric.no_backward_sync(model, enabled=number + 1 < len(batches)):
                logits = model(batch["input_ids"], lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, batch["labels"][..., 1:]) * share
                fabric.backward(loss)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    recorder = Recorder(orders, packages=("litgpt", "lightning"))
    recorder.extra["trainable_parameters"] = sum(parameter.numel() for parameter in trainable)
    recorder.run(train_step)
    recorder.finish()


def start_lora(model: torch.nn.Module, rank: int) -> None:
    """Give LitGPT's LoRA layers the benchmark's start values; its q, k and v share one layer."""
    for name, parameter in model.named_parameters():
        layer, found, _ = name.partition(".lora_A")
        if not found:
            continue
        number, _, part = layer.partition("transformer.h.")[2].partition(".")
        starts = [
            lora_a_start(f"model.layers.{number}.{hugging_face}", rank, parameter.shape[1])
            for hugging_face in PARTS[part]
        ]
        parameter.data.copy_(torch.cat(starts))


if __name__ == "__main__":
    main()
