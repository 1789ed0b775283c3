"""A dataset to rows: splits, duplicates, reports, and errors before any model is loaded."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_lora.data import Rows, show_rows
from lit_lora.data.export import export
from lit_lora.data.source import locate
from lit_lora.errors import DiskError, InputError, UsageError
from lit_lora.tokenizer import Tokenizer
from tests.data.conftest import Prepare, WriteRows, question

MANY = [question(n) for n in range(40)]


def _sources(rows: Rows | None) -> list[str]:
    return [row.source for row in rows or ()]


def test_without_validation_every_row_is_trained_on(run: Prepare, write_rows: WriteRows) -> None:
    prepared = run(write_rows(MANY))
    assert _sources(prepared.train) == [f"rows.jsonl:{n + 1}" for n in range(40)]
    assert prepared.validation is None


@pytest.mark.parametrize(("validation", "count"), [(0.25, 10), (7, 7), (1, 1), (39, 39)])
def test_a_share_or_a_number_of_rows_is_held_out(
    run: Prepare, write_rows: WriteRows, validation: Any, count: int
) -> None:
    prepared = run(write_rows(MANY), validation=validation)
    held_out = _sources(prepared.validation)
    assert len(held_out) == count
    assert sorted([*held_out, *_sources(prepared.train)]) == sorted(f"rows.jsonl:{n + 1}" for n in range(40))


def test_the_seed_decides_which_rows_are_held_out(run: Prepare, write_rows: WriteRows) -> None:
    path = write_rows(MANY)
    splits = [_sources(run(path, validation=10, seed=seed).validation) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_validation_can_be_a_file_of_its_own(run: Prepare, write_rows: WriteRows) -> None:
    held_out = write_rows([question(n) for n in range(100, 103)], name="held_out.jsonl")
    prepared = run(write_rows(MANY), validation=str(held_out))
    assert len(prepared.train) == 40
    assert _sources(prepared.validation) == [f"held_out.jsonl:{n}" for n in (1, 2, 3)]


def test_a_folder_gives_its_train_and_validation_files(run: Prepare, write_rows: WriteRows) -> None:
    write_rows(MANY[:20], name="set/train-00000.jsonl")
    write_rows(MANY[20:30], name="set/train-00001.jsonl")
    write_rows(MANY[30:35], name="set/validation.jsonl")
    folder = write_rows(MANY[35:], name="set/test.jsonl").parent
    (folder / "README.txt.bak").write_text("not data")
    prepared = run(folder)
    assert (len(prepared.train), len(prepared.validation or ())) == (30, 5)
    assert _sources(prepared.train)[20] == "train-00001.jsonl:1"
    assert len(run(folder, validation=3).train) == 27  # what the config says wins over the folder


def test_a_folder_without_such_names_is_all_for_training(run: Prepare, write_rows: WriteRows) -> None:
    write_rows(MANY[:20], name="set/a.jsonl")
    folder = write_rows(MANY[20:], name="set/b.jsonl").parent
    assert len(run(folder).train) == 40


def test_every_kind_of_file_gives_the_same_tokens(run: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("".join(f"{row['prompt']},{row['completion']}\n" for row in [HEADER, *MANY]))
    (tmp_path / "rows.json").write_text(json.dumps(MANY))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in MANY).encode()))
    pq.write_table(pa.Table.from_pylist(MANY), tmp_path / "rows.parquet")
    names = [write_rows(MANY).name, "rows.csv", "rows.json", "rows.jsonl.gz", "rows.parquet"]
    assert len({run(tmp_path / name).train.fingerprint for name in names}) == 1


HEADER = {"prompt": "prompt", "completion": "completion"}


def test_the_limit_takes_the_first_rows(run: Prepare, write_rows: WriteRows) -> None:
    assert _sources(run(write_rows(MANY), limit=3).train) == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_duplicates_are_counted_and_left_out_when_asked_for(run: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([*MANY[:5], MANY[1], MANY[1], MANY[3]])
    assert (run(path).report.files[0].duplicates, len(run(path).train)) == (3, 8)
    prepared = run(path, deduplicate=True)
    assert (len(prepared.train), prepared.report.deduplicated) == (5, 3)
    assert _sources(prepared.train) == [f"rows.jsonl:{n}" for n in range(1, 6)]


def test_validation_rows_that_are_also_training_rows_are_warned_of(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_rows([MANY[2], MANY[7], question(99)], name="held_out.jsonl")
    prepared = run(write_rows(MANY), validation=str(held_out))
    assert prepared.report.overlap == 2
    assert "2 of 3 validation rows are also training rows" in capsys.readouterr().err


def test_tools_that_the_template_does_not_know_are_warned_of(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_rows([{"messages": messages, "tools": [{"name": "search"}]}])
    for _ in range(2):  # from the cache too
        run(path)
        warning = "1 row with tools, for which the model's chat template has no place: rows.jsonl:1"
        assert warning in capsys.readouterr().err


def test_the_report_counts_what_is_there(run: Prepare, write_rows: WriteRows) -> None:
    rows = [*MANY[:3], {"prompt": "x", "completion": None}, {"prompt": "long " * 200, "completion": "y", "extra": 1}]
    report = run(write_rows(rows), max_seq_length=100, validation=1).report
    (file,) = report.files
    assert (file.rows, file.format) == (5, "prompt_completion")
    assert (file.nothing_to_learn, file.too_long, file.truncated) == (["rows.jsonl:4"], ["rows.jsonl:5"], [])
    assert file.longest > 200
    assert report.validation is not None
    assert (report.train.rows, report.validation.rows) == (2, 1)
    text = "\n".join(report.lines())
    assert "1 too long, dropped" in text
    assert "rows.jsonl:5" in text
    assert "1 with no target tokens, dropped: rows.jsonl:4" in text
    json.dumps(report.as_dict())


def test_counts_of_tokens_and_targets_are_those_of_the_rows(run: Prepare, write_rows: WriteRows) -> None:
    prepared = run(write_rows(MANY), validation=5)
    for rows in (prepared.train, prepared.validation):
        assert rows is not None
        assert rows.token_counts.tolist() == [len(row.input_ids) for row in rows]
        assert rows.target_counts.tolist() == [int(row.loss_mask[1:].sum()) for row in rows]
    assert sum(prepared.report.train.lengths.values()) == len(prepared.train)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "x " * 90, "completion": "y"}] * 3, {"max_seq_length": 40}, "3 of 3 rows are longer than max_seq"),
        ([{"prompt": "x", "completion": ""}] * 2, {}, "2 of 2 rows have no target tokens"),
        ([{"messages": [{"role": "user", "content": "x"}]}], {}, "1 of 1 rows have no target tokens"),
        ([], {}, "no rows in it"),
        (MANY, {"validation": 40}, "holds out 40 rows, but there are only 40"),
        (MANY, {"validation": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
    ],
)
def test_pain_02_data_to_learn_nothing_from_is_an_error_before_a_model_is_loaded(
    run: Prepare, write_rows: WriteRows, rows: Any, settings: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(write_rows(rows), **settings)
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("count", [1, 3, 7])
def test_pain_43_very_few_rows_are_enough(run: Prepare, write_rows: WriteRows, count: int) -> None:
    assert len(run(write_rows(MANY[:count])).train) == count


def test_pain_43_an_empty_validation_split_is_said_and_not_made(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = run(write_rows(MANY[:3]), validation=0.1)
    assert (len(prepared.train), prepared.validation) == (3, None)
    assert "0.1 of 3 rows rounds to 0, so there is no validation set" in capsys.readouterr().err


def test_pain_44_a_row_that_fits_no_format_is_named_with_file_and_line(run: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([MANY[0], {"prompt": "x", "verdict": "y"}])
    with pytest.raises(InputError, match=rf"{path}:2: the columns \(prompt, verdict\) fit no format"):
        run(path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.jsonl", InputError, "no such file or folder"),
        ("alpacca", InputError, "did you mean 'alpaca'"),
        ("hub:a/b/c", UsageError, "expected hub:OWNER/NAME"),
        ("hub:..", UsageError, "expected hub:OWNER/NAME"),
        ("rows.jsnol", InputError, r"did you mean 'rows\.jsonl'"),
    ],
)
def test_pain_44_a_path_that_is_nothing_is_an_error(
    path: str, error: type[Exception], message: str, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_rows(MANY).parent)
    with pytest.raises(error, match=message):
        locate(path, Path("cache"))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data file in this folder"):
        locate(str(tmp_path), tmp_path)


def test_pain_45_local_files_are_prepared_without_a_socket(
    run: Prepare, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(run(write_rows(MANY), validation=2).train) == 38


def test_a_hub_dataset_that_was_fetched_is_read_without_the_hub(
    run: Prepare, write_rows: WriteRows, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "hub" / "tatsu-lab-alpaca"
    folder.mkdir(parents=True)
    row = {"instruction": "Add", "input": "1 2", "output": "3", "text": "Below is an instruction …"}
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "train.parquet")
    prepared = run("alpaca")
    assert (prepared.report.files[0].format, len(prepared.train)) == ("alpaca", 3)
    assert prepared.report.files[0].unused_columns == {}


def test_the_bundled_rows_are_found_by_name(run: Prepare) -> None:
    prepared = run("tickets_train", limit=20)
    assert (prepared.report.files[0].format, len(prepared.train)) == ("messages", 20)


def test_shown_rows_mark_what_is_learned(
    run: Prepare, write_rows: WriteRows, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    show_rows(run(write_rows([{"prompt": "Say [b]hi[/b] 😀", "completion": "hi 😀"}])).train, tokenizer, 3)
    out = capsys.readouterr().out
    assert "rows.jsonl:1" in out
    assert "<|im_start|>user\nSay [b]hi[/b] 😀<|im_end|>\n<|im_start|>assistant\n⟦hi 😀<|im_end|>⟧\n" in out


def test_exported_rows_are_prepared_to_the_same_tokens(run: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([*MANY, {"prompt": "x", "completion": ""}])
    prepared = run(path, validation=0.2, system="Be brief.")
    files = export(prepared, tmp_path / "plain")
    assert [file.name for file in files] == ["train.jsonl", "validation.jsonl"]
    again = run(tmp_path / "plain")
    assert again.report.files[0].format == "messages"
    assert again.train.fingerprint == prepared.train.fingerprint
    assert again.validation is not None
    assert prepared.validation is not None
    assert again.validation.fingerprint == prepared.validation.fingerprint
    with pytest.raises(DiskError, match="already exists"):
        export(prepared, tmp_path / "plain")


@pytest.mark.parametrize(
    ("too_long", "remedy"),
    [("drop", "or set too_long: truncate_prompt"), ("truncate_prompt", "their answers alone are too long")],
)
def test_the_remedy_for_rows_that_are_all_too_long_is_none_that_was_taken_already(
    run: Prepare, write_rows: WriteRows, too_long: str, remedy: str
) -> None:
    rows = write_rows([{"prompt": "x", "completion": "word " * 50}])
    with pytest.raises(InputError) as raised:
        run(rows, max_seq_length=20, too_long=too_long)
    assert remedy in str(raised.value.hint)
