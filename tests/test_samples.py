"""The bundled task is what it claims to be: reproducible, well formed, and held out in every respect."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from lit_lora.scripts import generate_samples
from lit_lora.scripts.sample_phrases import HELDOUT, TRAIN, Phrases

SAMPLES = Path(__file__).resolve().parent.parent / "data" / "samples"
FIELDS = ["product", "intent", "urgency", "order", "customer"]


def _rows(name: str) -> list[tuple[str, dict[str, str | None]]]:
    """Message and ticket of every row."""
    lines = (SAMPLES / name).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], json.loads(answer["content"])) for _, user, answer in turns]


TRAIN_ROWS = _rows("tickets_train.jsonl")
HELDOUT_ROWS = _rows("tickets_heldout.jsonl")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _runs(texts: list[str], length: int = 5) -> set[tuple[str, ...]]:
    """All runs of ``length`` words."""
    words = [_words(text) for text in texts]
    return {tuple(row[start : start + length]) for row in words for start in range(len(row) - length + 1)}


def _product_phrases(phrases: Phrases) -> list[str]:
    return [word.removeprefix("*").lower() for words in phrases.products.values() for word in words]


def _masked(message: str, ticket: dict[str, str | None], phrases: Phrases) -> str:
    """The message as its template: product, order number, name and other numbers replaced by placeholders."""
    for field in ("order", "customer"):
        if ticket[field]:
            message = message.replace(str(ticket[field]), field)
    message = message.lower()
    for phrase in sorted(_product_phrases(phrases), key=len, reverse=True):
        message = message.replace(phrase, "product")
    return re.sub(r"\d+", "number", message)


def _sentences(phrases: Phrases) -> set[str]:
    """Every phrase of a pool, normalized; names and product words apart."""
    pools = [value for name, value in vars(phrases).items() if not name.endswith("names") and name != "products"]
    lists = [pool for value in pools for pool in (value.values() if isinstance(value, dict) else [value])]
    return {" ".join(_words(phrase)) for pool in lists for phrase in pool}


def test_the_files_are_the_output_of_the_generator() -> None:
    assert generate_samples.main(["--check"]) == 0


def test_the_generator_also_runs_as_a_plain_script(monkeypatch: pytest.MonkeyPatch) -> None:
    script = SAMPLES.parent.parent / "scripts" / "generate_samples.py"
    monkeypatch.setattr("sys.argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_.value.code == 0


def test_check_notices_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in generate_samples.FILES.items():
        (tmp_path / name).write_text(generate_samples.render(file), encoding="utf-8", newline="\n")
    monkeypatch.setattr(generate_samples, "ROOT", tmp_path)
    assert generate_samples.main(["--check"]) == 0
    changed = tmp_path / "tickets_train.jsonl"
    changed.write_text(changed.read_text(encoding="utf-8").replace("refund", "refand", 1), encoding="utf-8")
    assert generate_samples.main(["--check"]) == 1


@pytest.mark.parametrize(("rows", "count"), [(TRAIN_ROWS, 1600), (HELDOUT_ROWS, 200)], ids=["train", "heldout"])
def test_every_ticket_is_complete_and_true_to_its_message(
    rows: list[tuple[str, dict[str, str | None]]], count: int
) -> None:
    assert len(rows) == count == len({message for message, _ in rows})
    for message, ticket in rows:
        assert list(ticket) == FIELDS
        assert ticket["product"] in TRAIN.products
        assert ticket["intent"] in TRAIN.requests
        assert ticket["urgency"] in ("low", "high")
        for field in ("order", "customer"):
            assert ticket[field] is None or str(ticket[field]) in message
        # A number of five digits or more is always the order number: nothing else looks like one.
        assert re.findall(r"\d{5,}", message) == ([ticket["order"]] if ticket["order"] else [])
        assert "{" not in message


@pytest.mark.parametrize("rows", [TRAIN_ROWS, HELDOUT_ROWS], ids=["train", "heldout"])
def test_no_answer_is_right_by_guessing_the_commonest_value(rows: list[tuple[str, dict[str, str | None]]]) -> None:
    for field, most in {"product": 0.25, "intent": 0.25, "urgency": 0.6, "order": 0.3, "customer": 0.45}.items():
        (_, count), *_ = Counter(ticket[field] for _, ticket in rows).most_common(1)
        assert count / len(rows) <= most, field
    (_, count), *_ = Counter(json.dumps(ticket) for _, ticket in rows).most_common(1)
    assert count / len(rows) <= 0.02


def test_held_out_rows_share_no_phrase_with_training_rows() -> None:
    assert sorted(_sentences(TRAIN) & _sentences(HELDOUT)) == []


@pytest.mark.parametrize("mask", [False, True], ids=["as written", "as templates"])
def test_held_out_rows_share_no_run_of_five_words_with_training_rows(mask: bool) -> None:
    def texts(rows: list[tuple[str, dict[str, str | None]]], phrases: Phrases) -> list[str]:
        return [_masked(message, ticket, phrases) if mask else message for message, ticket in rows]

    shared = _runs(texts(TRAIN_ROWS, TRAIN)) & _runs(texts(HELDOUT_ROWS, HELDOUT))
    assert sorted(shared) == []


def test_held_out_rows_share_no_order_number_with_training_rows() -> None:
    orders = [{ticket["order"] for _, ticket in rows} - {None} for rows in (TRAIN_ROWS, HELDOUT_ROWS)]
    assert not orders[0] & orders[1]


@pytest.mark.parametrize("of", [lambda phrases: [*phrases.first_names, *phrases.last_names], _product_phrases])
def test_no_held_out_name_or_product_word_occurs_in_training(of: Callable[[Phrases], list[str]]) -> None:
    training = {word for message, _ in TRAIN_ROWS for word in _words(message)}
    training |= {word for phrase in of(TRAIN) for word in _words(phrase)}
    heldout = {word for phrase in of(HELDOUT) for word in _words(phrase)}
    assert sorted(heldout & training) == []
