"""Which files of a folder are trained on: by their names, and what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_lora.data import DataConfig
from lit_lora.data.folder import find_files, role_of
from lit_lora.data.source import held_out_files, locate
from lit_lora.errors import InputError
from tests.data.conftest import Prepare, WriteRows, question

MANY = [question(n) for n in range(40)]


def _names(files: object) -> list[str]:
    return [Path(str(file)).name for file in files]  # type: ignore[attr-defined]


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    return folder


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train.jsonl", "train"),
        ("training.jsonl", "train"),
        ("TRAIN.JSONL", "train"),
        ("trainset_v2.json", "train"),
        ("my-train-data.csv", "train"),
        ("TrainData.csv", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("train2.jsonl", "train"),
        ("valid.jsonl", "validation"),
        ("validation.json", "validation"),
        ("val_rows.csv", "validation"),
        ("eval.jsonl", "validation"),
        ("evaluation.jsonl", "validation"),
        ("evalset.jsonl", "validation"),
        ("dev-00000-of-00002.parquet", "validation"),
        ("squad.dev.csv", "validation"),
        ("devSet.jsonl", "validation"),
        ("held_out.jsonl", "validation"),
        ("heldout.jsonl", "validation"),
        ("tickets_holdout.jsonl", "validation"),
        ("test.jsonl", "test"),
        ("testset.csv", "test"),
        ("tests.jsonl", "test"),
        ("gsm8kTest.jsonl", "test"),
        ("snips_test.jsonl.gz", "test"),
        ("my_test_train.jsonl", "train"),
        ("squad_dev_test.jsonl", "test"),
        ("latest.jsonl", None),
        ("contest.jsonl", None),
        ("retrieval.jsonl", None),
        ("developer.jsonl", None),
        ("developers_chat.jsonl", None),
        ("evaluate_answers.jsonl", None),
        ("values.csv", None),
        ("testimonials.csv", None),
        ("trainer.csv", None),
        ("constraints.csv", None),
        ("devices.csv", None),
        ("valley.jsonl", None),
        ("rows.jsonl", None),
    ],
)
def test_a_name_says_what_a_file_is_for(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_a_cloned_dataset_repository_gives_its_rows_and_no_documents(run: Prepare, tmp_path: Path) -> None:
    folder = _touch(
        tmp_path / "set", "README.md", "LICENSE.txt", "dataset_infos.json", ".gitattributes", ".git/x.json", "a.sha256"
    )
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(MANY[:30]), folder / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(MANY[30:]), folder / "data" / "validation-00000-of-00001.parquet")
    prepared = run(folder)
    assert (len(prepared.train), len(prepared.validation or ())) == (30, 10)


def test_what_is_validation_and_what_is_left_out_is_said(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(MANY[:20], name="set/training.jsonl")
    write_rows(MANY[20:25], name="set/eval.jsonl")
    write_rows(MANY[25:30], name="set/testset.jsonl")
    folder = write_rows(MANY[30:], name="set/more.jsonl").parent
    prepared = run(folder)
    assert (len(prepared.train), len(prepared.validation or ())) == (20, 5)
    said = capsys.readouterr().err
    assert f"validation, by name: {folder}/eval.jsonl" in said
    assert f"not used, because named as test data: {folder}/testset.jsonl" in said
    assert f"not used: {folder}/more.jsonl (data.mix names" in said

    assert len(run(folder, validation=3).train) == 17
    assert f"not used, because data.validation is set: {folder}/eval.jsonl" in capsys.readouterr().err


def test_a_test_file_is_never_trained_on(run: Prepare, write_rows: WriteRows) -> None:
    folder = write_rows(MANY, name="set/test.jsonl").parent
    with pytest.raises(InputError, match=r"no training file, found .*test\.jsonl") as error:
        run(folder)
    assert error.value.hint == "to train on one of these files, give its own path"
    assert len(run(folder / "test.jsonl").train) == 40  # the hint works


def test_a_file_named_as_test_data_that_is_named_alone_is_trained_on_with_a_warning(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write_rows(MANY, name="rows_test.jsonl"))
    assert "rows_test.jsonl: named as test data, but it is trained on" in capsys.readouterr().err
    run(write_rows(MANY, name="latest.jsonl"))
    assert "named as" not in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "data/"])
def test_folders_are_named_as_files_are(below: str, write_rows: WriteRows, tmp_path: Path) -> None:
    for name in ("train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/a.jsonl"):
        write_rows(MANY, name=f"set/{below}{name}")
    _touch(tmp_path / "set", "README.md")
    source = find_files(tmp_path / "set")
    found = [sorted(file.parent.name + "/" + file.name for file in files) for files in (source.train, source.test)]
    assert found == [["train/a.jsonl", "train/b.jsonl"], ["test/a.jsonl"]]
    assert _names(source.validation) == ["a.jsonl"]


def test_several_folders_with_data_are_named(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows(MANY, name="set/main/train.jsonl")
    write_rows(MANY, name="set/socratic/train.jsonl")
    with pytest.raises(InputError, match="several folders with data: main, socratic") as error:
        find_files(tmp_path / "set")
    assert str(tmp_path / "set" / "main") in str(error.value.hint)


def test_a_folder_of_texts_is_text(tmp_path: Path) -> None:
    folder = _touch(tmp_path, "README.md", "one.txt", "two.md", "licence.txt")
    assert _names(find_files(folder).train) == ["one.txt", "two.md"]


def test_text_beside_rows_is_left_out_and_said(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows(MANY, name="set/rows.jsonl")
    _touch(tmp_path / "set", "notes.md", "README.md")
    source = find_files(tmp_path / "set")
    assert (_names(source.train), _names(source.unused)) == (["rows.jsonl"], ["notes.md"])


def test_a_folder_of_documents_alone_has_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data file in this folder"):
        find_files(_touch(tmp_path, "README.md", "LICENSE.txt", "config.json", "dataset_info.json"))


def test_files_of_several_formats_and_containers_are_all_read(run: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    alpaca = [{"instruction": "Who are you?", "input": "", "output": "A helper."}]
    (folder / "identity.json").write_text(json.dumps(alpaca))
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    (folder / "messages.json").write_text(json.dumps(chat))
    (folder / "more.csv").write_text("prompt,completion\nWhat?,That.\n")
    prepared = run(folder)
    assert len(prepared.train) == 3
    assert set(prepared.report.files[0].format.split(", ")) == {"alpaca", "messages", "prompt_completion"}


@pytest.mark.parametrize("copies", [("rows.json", "rows.jsonl"), ("rows.csv", "rows.csv.gz")])
def test_the_same_name_twice_may_be_the_same_rows(
    copies: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_files(_touch(tmp_path, *copies))
    assert "the same rows may be read twice" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("2.5 %", 0.025)])
def test_a_percentage_of_the_rows_is_held_out(text: str, share: float) -> None:
    assert DataConfig(path="x", validation=text).validation == share


@pytest.mark.parametrize("text", ["0%", "100%", "250%"])
def test_a_percentage_that_leaves_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a fraction between 0 and 1"):
        DataConfig(path="x", validation=text)


def test_validation_may_be_a_folder(run: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows(MANY[:3], name="held/valid.jsonl")
    write_rows(MANY[3:9], name="held/train.jsonl")
    assert _names(held_out_files(str(tmp_path / "held"), tmp_path)) == ["valid.jsonl"]
    prepared = run(write_rows(MANY[10:]), validation=str(tmp_path / "held"))
    assert len(prepared.validation or ()) == 3


def test_a_folder_of_training_data_alone_can_be_validation(write_rows: WriteRows, tmp_path: Path) -> None:
    folder = write_rows(MANY, name="held/rows.jsonl").parent
    assert _names(held_out_files(str(folder), tmp_path)) == _names(locate(str(folder), tmp_path).train)
