"""Evaluation of the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_lora.data import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.prepare import read_samples
from lit_lora.data.source import locate
from lit_lora.evaluate import evaluate_generation, evaluate_options
from lit_lora.evaluate.options import read_option_rows
from lit_lora.open.decoder import OpenedModel, open_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> OpenedModel:
    given = Path(os.environ.get("LIT_LORA_TEST_WEIGHTS", "unset"))
    for folder in (given, *(given.parent.iterdir() if given.parent.is_dir() else ())):
        if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
            return open_model(folder, device="cpu")
    pytest.skip("LIT_LORA_TEST_WEIGHTS is not set to a converted SmolLM2 folder, nor lies beside one")


# Published for the unquantized model (its model card): HellaSwag 40.9, PIQA 66.3, in per cent; ARC easy about 55.
@pytest.mark.parametrize(
    ("name", "prompt", "chance", "least"),
    [("arc_easy_validation", "Question: {question}\nAnswer:", 0.25, 0.4), ("piqa_validation", "{goal}", 0.5, 0.58)],
)
def test_multiple_choice_is_answered_about_as_well_as_published(
    smollm2: OpenedModel, real_data: Path, name: str, prompt: str, chance: float, least: float
) -> None:
    rows = read_option_rows([real_data / "evals" / f"{name}.jsonl"], {"prompt": prompt}, limit=100)
    scores = evaluate_options(smollm2.model, smollm2.tokenizer, rows, chat=False)
    assert scores.chance == pytest.approx(chance, abs=0.01)
    assert least <= scores.by_sum.value <= least + 0.25


def test_the_base_model_cannot_write_tickets(smollm2: OpenedModel, tmp_path: Path) -> None:
    config = DataConfig(path="tickets_heldout", limit=20)
    samples = [sample for sample, _ in read_samples(config, locate(config.path, tmp_path).train, Findings())][:20]
    conversations = [sample for sample in samples if not isinstance(sample, str)]
    scores = evaluate_generation(smollm2.model, smollm2.tokenizer, conversations)
    assert scores.exact_match.value <= 0.05
