"""PEFT + transformers on rows with labels: LoRA beside a new head, a plain loop over padded batches.

python peft_classify.py --model FOLDER --train ROWS.jsonl.gz --validation ROWS.jsonl --limit 12800

The rows of each step, the schedule and the optimizer are those of ``recipe: classify``; the head and the factors are
drawn by PEFT and transformers themselves. The figures are printed as one line of JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging


def rows_of(path: Path, limit: int | None) -> list[dict]:
    """The rows of a file of JSON Lines."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()][:limit]


def factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def main() -> None:
    """Train one epoch, validate at intervals, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "train", "validation"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=False)
    base = AutoModelForSequenceClassification.from_pretrained(
        asked.model, num_labels=2, dtype=torch.float32, trust_remote_code=False
    )
    linears = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"]
    settings = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules=linears, task_type="SEQ_CLS")
    model = get_peft_model(base, settings)
    train, held_out = rows_of(asked.train, asked.limit), rows_of(asked.validation, None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.lr, weight_decay=0.0)
    order = np.random.Generator(np.random.PCG64([asked.seed, 0])).permutation(len(train))
    total, curve, started, training = -(-len(train) // asked.batch_size), [], time.perf_counter(), 0.0

    def inputs(rows: list[dict]) -> dict:
        return tokenizer([row["sentence"] for row in rows], padding=True, truncation=True, return_tensors="pt")

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            parts = [held_out[start : start + 64] for start in range(0, len(held_out), 64)]
            right = [model(**inputs(p)).logits.argmax(1) == torch.tensor([r["label"] for r in p]) for p in parts]
        model.train()
        return float(torch.cat(right).float().mean())

    model.train()
    for step in range(total):
        begun = time.perf_counter()
        rows = [train[i] for i in order[step * asked.batch_size : (step + 1) * asked.batch_size]]
        for group in optimizer.param_groups:
            group["lr"] = asked.lr * factor(step, total, round(0.03 * total))
        model(**inputs(rows), labels=torch.tensor([row["label"] for row in rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        training += time.perf_counter() - begun
        if (step + 1) % asked.eval_every == 0 or step + 1 == total:
            curve.append((step + 1, accuracy()))
    figures = {
        "trainable": sum(parameter.numel() for parameter in trained),
        "best_accuracy": max(value for _, value in curve),
        "curve": curve,
        "training_seconds": round(training, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": asked.seed,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
