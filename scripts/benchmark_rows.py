"""The rows that all contenders of the benchmark train on: real ones, or random ones for a model of random weights."""

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
    """Tokenise GSM8K rows once and write the rows of every step, so that all contenders train the very same ids.

    A row is a conversation in the model's chat template; the answer and the token that ends it are learned.
    ``validation`` rows follow those of the steps.

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
    tokens, targets = [], []
    for sample in samples[:count]:
        messages = [("user", sample["question"]), ("assistant", sample["answer"])]
        encoded = encode_chat(tokenizer, [Message(role=role, content=content) for role, content in messages])
        prompt = encoded.loss_mask.index(True)
        length = prompt + sum(encoded.loss_mask)  # what the template puts after the last answer is left out
        rows.append({"ids": encoded.ids[:length], "prompt": prompt})
        tokens.append(length)
        targets.append(length - prompt)
    trained = [rows[start : start + batch] for start in range(0, steps * batch, batch)]
    write_text(target, json.dumps({"steps": trained, "validation": rows[steps * batch :]}))
    return {"tokens a row": statistics.mean(tokens), "targets a row": statistics.mean(targets), "longest": max(tokens)}


def write_random_model(shape: str, folder: Path, *, device: str = "cpu", tokenizer: Path | None = None) -> None:
    """A model of random weights in ``folder``, drawn on ``device``, with the tokenizer of another folder.

    Raises:
        UsageError: The shape is not known.
    """
    config = model_shape(shape).model_copy(update={"dtype": "bfloat16"})
    folder.mkdir()
    torch.manual_seed(0)
    with CheckpointWriter(folder) as writer:
        for name, parameter in empty_model(config).named_parameters():
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            writer.add(name, (weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)).cpu())
    write_text(folder / "config.json", json.dumps(config.to_hf()))
    if tokenizer is not None:
        for path in tokenizer.glob("tokenizer*.json"):
            shutil.copy(path, folder / path.name)


def write_random_rows(folder: Path, *, length: int, batch: int, steps: int, target: Path) -> dict[str, float]:
    """Rows of random tokens of the model in ``folder``, all learned: for lengths that no data is for."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (steps, batch, length)).tolist()
    rows = [[{"ids": row, "prompt": 1} for row in step] for step in ids]
    write_text(target, json.dumps({"steps": rows, "validation": []}))
    return {"tokens a row": length, "targets a row": length - 1}
