"""Public datasets as their authors publish them are read by themselves, or by a mapping of one line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lit_lora.data import DataConfig, prepare
from lit_lora.data.findings import Findings
from lit_lora.data.prepare import read_samples
from lit_lora.data.sample import Conversation
from lit_lora.tokenizer import Tokenizer

SENTIMENT = {
    "columns": {"prompt": "Is this review positive or negative? {sentence}", "completion": "label"},
    "values": {"label": {"0": "negative", "1": "positive"}},
}
PAIR = "{sentence1}\n{sentence2}\nDo they mean the same?"

CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("train/alpaca_union_subset.jsonl.gz", 15130, "alpaca", {}),
    ("train/dolly_15k.jsonl.gz", 15011, "dolly", {}),
    ("train/gsm8k_train.jsonl.gz", 7473, "prompt_completion", {}),
    ("train/gsm8k_test.jsonl", 1319, "prompt_completion", {}),
    ("train/lf_glaive_toolcall_en_demo.jsonl", 300, "sharegpt", {}),
    ("train/lf_kto_en_demo.jsonl", 150, "messages", {"bad_rows": "skip"}),
    (
        "train/lf_dpo_en_demo.jsonl.gz",
        300,
        "prompt_completion",
        {"columns": {"prompt": "conversations", "completion": "chosen"}},
    ),
    ("tasks/snips_train.jsonl.gz", 13784, "prompt_completion", {"columns": {"prompt": "text", "completion": "intent"}}),
    ("tasks/snips_validation.jsonl", 700, "prompt_completion", {"columns": {"prompt": "text", "completion": "slots"}}),
    ("tasks/banking77_test.jsonl", 3080, "prompt_completion", {"columns": {"prompt": "text", "completion": "label"}}),
    ("tasks/sst2_train.jsonl.gz", 67349, "prompt_completion", SENTIMENT),
    ("evals/sst2_validation.jsonl", 872, "prompt_completion", SENTIMENT),
    (
        "evals/mrpc_validation.jsonl",
        408,
        "prompt_completion",
        {"columns": {"prompt": PAIR, "completion": "label"}, "values": {"label": {"0": "no", "1": "yes"}}},
    ),
    ("evals/piqa_validation.jsonl", 1838, "prompt_completion", {"columns": {"prompt": "goal", "completion": "sol1"}}),
    ("text/tinyshakespeare.txt.gz", 1, "text", {}),
    ("text/wikitext2_raw_test.txt.gz", 1, "text", {}),
]


@pytest.mark.parametrize(("name", "count", "format_", "settings"), CASES, ids=[case[0] for case in CASES])
def test_a_public_dataset_is_read(
    real_data: Path, name: str, count: int, format_: str, settings: dict[str, Any]
) -> None:
    config = DataConfig(path=name, **settings)
    findings = Findings(config.bad_rows)
    samples = [sample for sample, _ in read_samples(config, [real_data / name], findings)]
    assert (len(samples), findings.format_names) == (count, format_)
    chats = [sample for sample in samples if isinstance(sample, Conversation)]
    assert format_ == "text" or sum(chat.has_answer for chat in chats) > 0.3 * count


def test_sentiment_rows_read_as_a_question_with_a_word_for_an_answer(real_data: Path) -> None:
    config = DataConfig(path="x", **SENTIMENT)
    sample, place = next(read_samples(config, [real_data / "evals/sst2_validation.jsonl"], Findings()))
    assert isinstance(sample, Conversation)
    assert place == ("sst2_validation.jsonl", 1)
    assert [message["content"] for message in sample.messages] == [
        "Is this review positive or negative? it 's a charming and often affecting journey . ",
        "positive",
    ]


def test_public_rows_are_learned_from_end_to_end(real_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = DataConfig(path=str(real_data / "train/dolly_15k.jsonl.gz"), limit=300, validation=0.1)
    prepared = prepare(config, tokenizer, cache=tmp_path, seed=0)
    (file,) = prepared.report.files
    assert prepared.validation is not None
    kept = len(prepared.train) + len(prepared.validation)
    assert kept + len(file.too_long) + len(file.nothing_to_learn) == file.rows == 300
    assert len(prepared.validation) == round(0.1 * kept)
    for row in prepared.train:
        text = tokenizer.decode(
            [int(i) for i, learned in zip(row.input_ids, row.loss_mask, strict=True) if learned], False
        )
        assert text.endswith("<|im_end|>")
        assert text.count("<|im_end|>") == 1


@pytest.mark.slow
def test_pain_30_alpaca_is_tokenized_in_a_minute_and_at_once_the_second_time(
    real_data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = DataConfig(path=str(real_data / "train/alpaca_union_subset.jsonl.gz"), validation=0.02)
    start = time.process_time()  # of all threads: what else runs on the machine does not count
    assert not prepare(config, tokenizer, cache=tmp_path, seed=0).report.files[0].from_cache
    assert time.process_time() - start < 60 * 15130 / 52002
    start = time.process_time()
    assert prepare(config, tokenizer, cache=tmp_path, seed=0).report.files[0].from_cache
    assert time.process_time() - start < 1
