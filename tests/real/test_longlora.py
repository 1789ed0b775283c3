"""SmolLM2-135M taken from its 8,192 tokens to 16,384 on real text: minutes, so slow. ``-s`` shows loss by position."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from lit_lora import IGNORE_INDEX, peft
from lit_lora.checkpoint.load import load_model
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import reuse_memory
from lit_lora.train.loss import cross_entropy_sum
from tests.real.test_learning import finetuned

pytestmark = pytest.mark.slow

LENGTH, HELD_OUT, STEPS = 16_384, 3, 8
EDGES = [0, 1024, 2048, 4096, 8192, 12_288, LENGTH]


@pytest.fixture
def documents(smollm2: Path, real_data: Path) -> list[list[int]]:
    """WikiText-2's articles, one after the other, in pieces of the longer context."""
    with gzip.open(real_data / "text" / "wikitext2_raw_test.txt.gz", "rt", encoding="utf-8") as file:
        ids = Tokenizer.load(smollm2).encode(file.read())
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]


@torch.no_grad()
def by_position(model: CausalLM, documents: list[list[int]], name: str) -> list[float]:
    """Perplexity between the edges, each token seen behind all before it in its document."""
    model.eval()
    losses = torch.zeros(len(EDGES) - 1)
    for ids in documents:
        hidden = model.hidden_states(torch.tensor([ids]))[0, :-1]
        for number, (start, stop) in enumerate(itertools.pairwise(EDGES)):
            part, labels = hidden[start:stop], torch.tensor(ids[start + 1 : stop + 1])
            chunks = zip(torch.split(part, 512), torch.split(labels, 512), strict=True)
            loss = sum(float(cross_entropy_sum(model.lm_head(rows), wanted)) for rows, wanted in chunks)
            assert not (labels == IGNORE_INDEX).any()
            losses[number] += loss / len(labels) / len(documents)
    perplexities = [math.exp(loss) for loss in losses]
    print(f"\n| {name} | " + " | ".join(f"{value:.2f}" for value in perplexities) + " |", flush=True)
    return perplexities


def stretched(base: Path, rope_type: str) -> CausalLM:
    model = load_model(base, dtype=torch.bfloat16)
    model.config = model.config.extended(2, rope_type)
    return model


def test_perplexity_before_training(smollm2, documents):
    reuse_memory()
    held_out = documents[-HELD_OUT:]
    plain = by_position(load_model(smollm2, dtype=torch.bfloat16), held_out, "as it is")
    linear = by_position(stretched(smollm2, "linear"), held_out, "linear, not trained")
    by_position(stretched(smollm2, "yarn"), held_out, "yarn, not trained")
    assert plain[-1] > plain[3]  # beyond its context it falls off
    assert linear[0] > plain[0]  # interpolation alone costs something everywhere


def test_longlora_makes_the_longer_context_usable(tmp_path, smollm2, documents):
    rows = tmp_path / "wiki.jsonl"
    tokenizer = Tokenizer.load(smollm2)
    texts = [tokenizer.decode(ids[:-16]) for ids in documents[:-HELD_OUT]]  # the end of a row takes a token
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run = finetuned(
        tmp_path,
        smollm2,
        rows,
        data={"max_seq_length": LENGTH, "validation": None},
        peft={"name": "longlora", "rank": 8, "rope_type": "linear"},
        optimizer={"lr": 5e-4},
        schedule={"warmup": 2},
        train={"max_steps": STEPS, "batch_size": 1, "micro_batch_tokens": LENGTH, "activation_checkpointing": "full"},
    )
    held_out, model = documents[-HELD_OUT:], load_model(smollm2, dtype=torch.bfloat16)
    peft.load_adapter(model, run / "adapter")
    assert model.context == LENGTH
    after = by_position(model, held_out, f"linear, {STEPS} steps of LongLoRA")
    plain = by_position(load_model(smollm2, dtype=torch.bfloat16), held_out, "as it is")
    assert after[-1] < plain[-1]
