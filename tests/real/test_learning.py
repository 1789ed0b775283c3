"""SmolLM2-135M learns real tasks: minutes on two cores, so slow. ``-s`` shows the figures."""

from __future__ import annotations

import gzip
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora.generate import Answer, Sampling, answer_all
from lit_lora.open.decoder import OpenedModel, open_model
from lit_lora.recipe import Options, load_recipe
from lit_lora.tokenizer import encode_prompt
from lit_lora.train.run_log import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize anew."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))


def finetuned(folder: Path, model: Path, rows: Path, **sections: Any) -> Path:
    """A run on ``rows`` in ``folder``."""
    config = {
        "model": {"path": str(model)},
        "data": {"path": str(rows), **sections.pop("data", {})},
        "peft": {"rank": 16},
        "optimizer": {"lr": 1e-3},
        "out": str(folder / "run"),
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    recipe, settings = load_recipe(path, [])
    started = time.perf_counter()
    run = recipe(settings, Options())
    records = [record for record in read_metrics(run / "metrics.jsonl") if "tokens" in record]
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    print(
        f"\n{rows.name}: {len(records)} steps, {tokens} tokens in {seconds:.0f} s ({tokens / seconds:.0f} tokens/s), "
        f"the whole command {time.perf_counter() - started:.0f} s"
    )
    return run


def answers(opened: OpenedModel, questions: list[str], sampling: Sampling) -> list[Answer]:
    """What the model answers."""
    prompts = [encode_prompt(opened.tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return answer_all(opened.model, opened.tokenizer, prompts, sampling)


def last_rows(path: Path, start: int, count: int) -> list[dict[str, Any]]:
    """Rows that lie behind those that are trained on."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, start, start + count)]


CASES = {
    "train/dolly_15k.jsonl.gz": lambda row: "\n\n".join(filter(None, [row["instruction"], row["context"]])),
    "train/alpaca_union_subset.jsonl.gz": lambda row: "\n\n".join(filter(None, [row["instruction"], row["input"]])),
    "train/gsm8k_train.jsonl.gz": lambda row: row["question"],
}


@pytest.mark.parametrize("name", CASES)
def test_validation_loss_falls_on_real_rows_and_answers_end_by_themselves(tmp_path, smollm2, real_data, name):
    data = real_data / name
    run = finetuned(
        tmp_path,
        smollm2,
        data,
        data={"limit": 300, "max_seq_length": 512, "validation": 24},
        train={"max_steps": 16, "batch_size": 8, "eval_every": 8, "samples": 0},
        optimizer={"lr": 5e-4},
    )
    losses = [
        record["validation_loss"] for record in read_metrics(run / "metrics.jsonl") if "validation_loss" in record
    ]
    print(name, "validation losses", losses)
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    # Drawn, because a model as small as this turns in circles where it always takes the most likely token.
    sampling = Sampling(max_new_tokens=300, temperature=0.7, seed=0)
    given = answers(open_model(run), [CASES[name](row) for row in last_rows(data, 300, 16)], sampling)
    ended = sum(answer.ended == "stop" for answer in given)
    print(f"{ended} of {len(given)} answers end by themselves; the first: {given[0].text!r}")
    assert ended >= 11


@pytest.mark.parametrize("base", ["smollm2", "gemma"])
def test_snips_intents_from_nothing_to_85_percent_exact_match(tmp_path, base, real_data, request):
    checkpoint = request.getfixturevalue(base)
    with open(real_data / "tasks" / "snips_validation.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    questions, intents = [row["text"] for row in rows], [row["intent"] for row in rows]

    def exact_match(model: Path, stride: int) -> float:
        given = answers(open_model(model), questions[::stride], Sampling(max_new_tokens=12))
        right = sum(answer.text == intent for answer, intent in zip(given, intents[::stride], strict=True))
        return right / len(given)

    run = finetuned(
        tmp_path,
        checkpoint,
        real_data / "tasks" / "snips_train.jsonl.gz",
        data={"columns": {"prompt": "text", "completion": "intent"}, "validation": 60},
        train={"max_steps": 75, "batch_size": 16, "samples": 1},
    )
    before, after = exact_match(checkpoint, stride=7), exact_match(run, stride=1)
    print(f"exact match on intents {before:.1%} before, {after:.1%} after")
    assert before <= 0.02
    assert after >= 0.85
