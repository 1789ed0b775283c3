"""Write the rows that all contenders of the benchmark train on: real ones, or random ones for a random model."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import statistics
from pathlib import Path

import torch

from lit_lora.checkpoint import CheckpointWriter
from lit_lora.checkpoint.load import empty_model
from lit_lora.errors import InputError
from lit_lora.estimate import model_shape
from lit_lora.files import write_text
from lit_lora.tokenizer import Message, Tokenizer, encode_chat

__all__ = ["write_random_model", "write_random_rows", "write_rows"]


def write_rows(
    data: Path, model: Path, *, batch: int, steps: int, seed: int, target: Path, validation: int = 0
) -> dict[str, float]:
    """Tokenize GSM8K rows and write the rows of every step, so that all contenders train on exactly the same ids.

    A row is a conversation in the model's chat template; its targets are the answer and the token that ends it.
    ``validation`` rows follow those of the steps. The means and the maximum of their lengths are returned.

    Raises:
        InputError: The data or the tokenizer is missing, or there are too few rows.
    """
    for path in (data, model / "tokenizer.json", model / "config.json"):
        if not path.is_file():
            raise InputError(f"{path}: not found")
    with gzip.open(data, "rt", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    tokenizer = Tokenizer.load(model)
    count = steps * batch + validation
    if len(samples) < count:
        raise InputError(f"{data}: {len(samples)} rows, expected at least {count}")
    random.Random(seed).shuffle(samples)
    rows = []
    tokens = []
    targets = []
    for sample in samples[:count]:
        messages = [("user", sample["question"]), ("assistant", sample["answer"])]
        encoded = encode_chat(tokenizer, [Message(role=role, content=content) for role, content in messages])
        prompt = encoded.loss_mask.index(True)
        length = prompt + sum(encoded.loss_mask)  # without what the template writes after the last answer
        rows.append({"ids": encoded.ids[:length], "prompt": prompt})
        tokens.append(length)
        targets.append(length - prompt)
    step_rows = [rows[start : start + batch] for start in range(0, steps * batch, batch)]
    write_text(target, json.dumps({"steps": step_rows, "validation": rows[steps * batch :]}))
    return {
        "tokens per row": statistics.mean(tokens),
        "targets per row": statistics.mean(targets),
        "longest": max(tokens),
    }


def write_random_model(shape: str, folder: Path, *, device: str = "cpu", tokenizer: Path | None = None) -> None:
    """Write a model with random weights, drawn on ``device``, and the tokenizer of another folder.

    Raises:
        UsageError: There is no such shape.
    """
    config = model_shape(shape).model_copy(update={"dtype": "bfloat16"})
    folder.mkdir()
    torch.manual_seed(0)
    with CheckpointWriter(folder) as writer:
        for name, parameter in empty_model(config).named_parameters():
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            else:  # a norm
                weight.fill_(1)
            writer.add(name, weight.cpu())
    write_text(folder / "config.json", json.dumps(config.to_hf()))
    if tokenizer is not None:
        for path in tokenizer.glob("tokenizer*.json"):
            shutil.copy(path, folder / path.name)


def write_random_rows(folder: Path, *, length: int, batch: int, steps: int, target: Path) -> dict[str, float]:
    """Write rows of random tokens for the model in ``folder``, all of them targets: any length, without data."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(1)
    step_rows = []
    for step_ids in torch.randint(vocabulary, (steps, batch, length)).tolist():
        step_rows.append([{"ids": ids, "prompt": 1} for ids in step_ids])
    write_text(target, json.dumps({"steps": step_rows, "validation": []}))
    return {"tokens per row": length, "targets per row": length - 1}
