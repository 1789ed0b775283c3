"""From runs to a table: which learning rate is chosen, what is averaged, what is warned of."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_lora.compare import Job, Outcome, Variant, rows_of, summary_table, write_report
from lit_lora.config import dump_yaml
from lit_lora.recipe import load_settings


def variant(name: str, *rates: float, method: str = "lora", recipe: str = "lora") -> Variant:
    sections = {"model": {"path": "base"}, "data": {"path": "rows", "validation": 4}, "peft": {"name": method}}
    return Variant(name, load_settings(recipe).model_validate(sections), rates)


def outcome(of: Variant, rate: float, loss: float | None, seed: int = 0, **more: Any) -> Outcome:
    result = {
        "validation_loss": loss,
        "untrained_validation_loss": 3.0,
        "trainable": 1000,
        "tokens_per_second": 100.0 + seed,
        "seconds": 10.0,
        "peak_memory_bytes": 10**9 + seed,
        "written_bytes": 4000,
    }
    return Outcome(Job.of(of, rate, seed, Path("out")), {} if loss is None else result, **more)


def test_a_run_of_an_older_version_is_still_this_one_and_another_config_is_not(tmp_path: Path) -> None:
    """A version that knows more settings writes more defaults; only values count."""
    job = Job.of(variant("a", 1e-3), 1e-3, 0, tmp_path)
    assert job.check() is None
    job.folder.mkdir(parents=True)
    text = dump_yaml(job.config)
    (job.folder / "config.yaml").write_text(text.replace("  dropout: 0.0\n", ""))
    assert job.check() is None
    for other in (text.replace("rank: 8", "rank: 9"), text.replace("rank: 8", "rnk: 8"), ":"):
        assert other != text
        (job.folder / "config.yaml").write_text(other)
        assert "already contains a run with other settings" in (job.check() or "")


def test_the_lowest_validation_loss_of_the_first_seed_chooses_the_rate() -> None:
    a, b = variant("a", 1e-4, 1e-3, 1e-2), variant("b", 1e-4)
    runs = [outcome(a, 1e-4, 2.0), outcome(a, 1e-3, 1.0), outcome(a, 1e-2, 1.5), outcome(b, 1e-4, 0.5)]
    runs += [outcome(a, 1e-3, 1.4, seed=1)]
    second, first = sorted(rows_of(runs), key=lambda row: row.variant.name)
    assert [row.variant.name for row in rows_of(runs)] == ["b", "a"]
    assert (second.rate, second.loss, len(second.finished)) == (1e-3, pytest.approx(1.2), 2)
    assert (second.notes, first.notes) == ([], [])


def test_what_makes_results_doubtful_is_noted() -> None:
    a = variant("a", 1e-4, 1e-3)
    (row,) = rows_of([outcome(a, 1e-4, 2.0), outcome(a, 1e-3, 1.0)])
    assert row.notes == ["lr 0.001 is the highest that was tried"]
    (row,) = rows_of([outcome(a, 1e-4, 3.5), outcome(a, 1e-3, None, error="killed")])
    assert row.notes == ["failed at lr 0.001: killed", "the validation loss did not fall"]
    (row,) = rows_of([outcome(a, 1e-4, None, error="x"), outcome(a, 1e-3, None, error="y")])
    assert (row.rate, row.finished, row.notes) == (None, [], ["failed at lr 0.0001: x", "failed at lr 0.001: y"])


def test_the_table_has_means_and_spreads_and_the_base() -> None:
    a, gone = variant("a", 1e-3), variant("gone", 1e-3, method="houlsby", recipe="adapter")
    runs = [
        outcome(a, 1e-3, 1.0, scores={"loss": 0.5, "perplexity": 2.0, "exact match": 0.25}),
        outcome(a, 1e-3, 2.0, seed=1, scores={"loss": 0.7, "perplexity": 2.0, "exact match": 0.75}),
        outcome(gone, 1e-3, None, error="no memory"),
    ]
    runs[0].base_scores = {"loss": 4.0, "perplexity": 55.0, "exact match": 0.0}
    header, (first, second, base) = summary_table(rows_of(runs))
    table = dict(zip(header, first, strict=True))
    assert (table["lr"], table["trainable"], table["memory"], table["merges"]) == ("0.001", "1,000", "1.0 GB", "yes")
    assert table["validation loss"] == "1.5000 ± 0.7071"
    assert (table["held-out loss"], table["exact match"]) == ("0.6000 ± 0.1414", "50.0% ± 35.4")
    assert "perplexity" not in table
    assert second[:2] == ["gone", "failed"]
    assert dict(zip(header, base, strict=True))["validation loss"] == "3.0000"
    assert base[-2:] == ["4.0000", "0.0%"]


def test_the_files_hold_every_run_and_need_nothing_beside_them(tmp_path: Path) -> None:
    a, evil = variant("a", 1e-4, 1e-3), variant("<script>b", 1e-3)
    runs = [outcome(a, 1e-4, 2.0), outcome(a, 1e-3, 1.0), outcome(a, 1e-3, 1.2, seed=1)]
    runs += [outcome(evil, 1e-3, None, error="it <i>broke</i>")]
    written = write_report(tmp_path, runs, {"Day": "2026-11-24"})
    assert [path.name for path in written] == ["comparison.csv", "comparison.html", "comparison.png"]
    records = list(csv.DictReader(written[0].read_text(encoding="utf-8").splitlines()))
    assert [(r["name"], r["lr"], r["seed"], r["chosen"]) for r in records] == [
        ("a", "0.0001", "0", "False"),
        ("a", "0.001", "0", "True"),
        ("a", "0.001", "1", "True"),
        ("<script>b", "0.001", "0", "False"),
    ]
    assert records[3]["error"] == "it <i>broke</i>"
    page = written[1].read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;b" in page
    assert "it &lt;i&gt;broke&lt;/i&gt;" in page
    assert re.findall(r"(?:src|href)=.(.{10})", page) == ["data:image"], "nothing is fetched"
    with Image.open(written[2]) as image:
        assert image.size[0] > 500


def test_without_a_result_there_is_no_plot(tmp_path: Path) -> None:
    written = write_report(tmp_path, [outcome(variant("a", 1e-3), 1e-3, None, error="x")], {})
    assert [path.name for path in written] == ["comparison.csv", "comparison.html"]
