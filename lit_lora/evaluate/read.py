"""The rows of an evaluation: which they are, how they are read, and those that examples are drawn from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.config import read_yaml, validate
from lit_lora.data import DataConfig, cache_folder
from lit_lora.data.findings import Findings
from lit_lora.data.prepare import Part, Prepared, prepare, read_samples, samples_of
from lit_lora.data.read import read_rows
from lit_lora.data.source import locate
from lit_lora.data.trained import read_reading, run_of
from lit_lora.errors import InputError, UsageError
from lit_lora.evaluate.options import has_options, read_option_rows
from lit_lora.evaluate.tasks import Dataset
from lit_lora.open.decoder import load_tokenizer
from lit_lora.open.folders import find_folders
from lit_lora.tokenizer import Tokenizer

__all__ = ["TrainedRun", "default_config", "find_run", "read_dataset", "read_examples", "read_held_out"]


@dataclass(frozen=True)
class TrainedRun:
    """A run, and the rows that it learned from and held out."""

    folder: Path
    data: DataConfig
    seed: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its rows.

        Raises:
            InputError: It cannot be read.
        """
        return load_tokenizer(*find_folders(self.folder))

    @cached_property
    def prepared(self) -> Prepared:
        """Its rows, split as in training.

        Raises:
            InputError: They cannot be read any more.
        """
        return prepare(self.data, self.tokenizer, cache=cache_folder(), seed=self.seed)


def find_run(models: Iterable[Path]) -> TrainedRun | None:
    """The first run among the models, which may be its adapter or its merged model; None without one.

    Raises:
        UsageError: It is a run of recipe classify, or its config is not valid.
    """
    for path in models:
        for folder in (path, run_of(path)):
            if folder is None or not (folder / "config.yaml").is_file():
                continue
            file = folder / "config.yaml"
            config = read_yaml(file)
            if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
                continue
            if config.get("recipe") == "classify":
                raise UsageError(f"{path}: a run of recipe classify", hint=f"lit-lora classify {path} --file DATA")
            data = validate(config["data"], DataConfig, name=f"{file}: data")
            return TrainedRun(folder, data, int(config.get("seed", 0)))
    return None


def default_config(
    models: Sequence[Path], adapter: Path | None, data: str, settings: Mapping[str, Any]
) -> tuple[DataConfig, str | None]:
    """How to read rows: as the first trained model's training did, except for what the settings say.

    Args:
        models: Model, run or adapter folders.
        adapter: An adapter for the only model.
        data: The rows.
        settings: Keys of the config section ``data``.

    Returns:
        The config, and a line on what training decides, if anything.

    Raises:
        InputError: What is saved beside the weights cannot be used.
        UsageError: A setting is not valid.
    """
    readings = [read_reading(*find_folders(path, adapter=adapter), settings) for path in models]
    trained = [reading for reading in readings if reading.is_trained]
    reading = (trained or readings)[0]
    if any(other.config != reading.config for other in trained):
        log.warn("the models were trained with different settings of data; all are asked as the first of them")
    settings = {**reading.config.model_dump(exclude_defaults=True), **settings, "path": data}
    return validate(settings, DataConfig, name="evaluate"), reading.about


def read_held_out(run: TrainedRun, settings: Mapping[str, Any], limit: int | None = None) -> tuple[DataConfig, Dataset]:
    """Exactly the rows that a run held out, and how they are read.

    Args:
        run: The run.
        settings: Keys of the config section ``data`` to read them otherwise.
        limit: The most rows.

    Raises:
        InputError: The rows cannot be read any more.
        UsageError: The run held out no rows.
    """
    parts = run.prepared.validation_parts
    if not parts:
        raise UsageError(f"{run.folder}: held out no rows", hint="give held-out rows: --data heldout.jsonl")
    read_otherwise = []
    for part in parts:
        config = validate({**part.config.model_dump(), **settings}, DataConfig, name="evaluate")
        read_otherwise.append(replace(part, config=config))
    dataset = _dataset_of(run, read_otherwise)
    config = read_otherwise[0].config
    return config, Dataset(dataset.conversations[:limit], dataset.texts[:limit], learn=config.learn)


def _dataset_of(run: TrainedRun, parts: Sequence[Part]) -> Dataset:
    """The samples of a run's rows; of a plain text that was split into pieces, only the pieces that are among them."""
    dataset = Dataset()
    for part in parts:
        texts: set[str] = set()
        for sample, (file, line) in samples_of(part, part.config):
            if isinstance(sample, str):
                texts.add(f"{file}:{line}")
            else:
                dataset.conversations.append(sample)
        for row in part.rows if texts else ():
            if row.source in texts:
                dataset.texts.append(run.tokenizer.decode(row.input_ids.tolist(), skip_special=True))
    return dataset


def read_dataset(
    config: DataConfig, tasks: Sequence[str] = (), limit: int | None = None, *, given: Mapping[str, Any] | None = None
) -> Dataset:
    """The rows, as conversations, texts or multiple choice.

    Args:
        config: Where they are, and how to read them. Of a folder with held-out rows, these are read.
        tasks: Rows of multiple choice are read as such for the task ``options``, or for no tasks at all.
        limit: The most rows.
        given: Those of the settings that the user gave; the others are as in training, whose rows may be of another
            kind. All if omitted.

    Raises:
        InputError: A file or row cannot be read, or there is no row.
    """
    source = locate(config.path, cache_folder())
    files = list(source.validation or source.train)
    findings = Findings(config.bad_rows)
    _, first_row = next(chain.from_iterable(read_rows(file, findings) for file in files), (0, None))
    findings.check()
    if first_row is None:
        raise InputError(f"{config.path}: no rows in it", hint="expected one row per line or a list")
    option_columns = config.columns
    format_ = config.format
    if given is not None and "columns" in given:
        option_columns = given["columns"]
        format_ = given.get("format", "auto")
    detected = not tasks and format_ == "auto" and has_options(first_row, option_columns)
    if list(tasks) == ["options"] or detected:
        return Dataset(options=read_option_rows(files, option_columns, limit=limit, bad_rows=config.bad_rows))

    dataset = Dataset(learn=config.learn)
    findings = Findings(config.bad_rows)
    for sample, _ in islice(read_samples(config, files, findings), limit):
        if isinstance(sample, str):
            dataset.texts.append(sample)
        else:
            dataset.conversations.append(sample)
    findings.log_warnings()
    if not len(dataset):
        raise InputError(f"{config.path}: no row is left to evaluate on", hint="lit-lora prepare names what is wrong")
    return dataset


def read_examples(
    config: DataConfig, path: str | None, run: TrainedRun | None, shots: int, tasks: Sequence[str], dataset: Dataset
) -> Dataset | None:
    """The rows that shots are drawn from, the run's training rows without a path; None without shots.

    Raises:
        UsageError: There is no file of examples, or the rows are plain texts.
    """
    if not shots:
        return None
    if path is None and (run is None or (dataset.options and not run.data.path)):
        raise UsageError(f"--shots {shots} needs rows to draw from", hint="give training rows: --examples train.jsonl")
    if dataset.texts:
        raise UsageError("--shots needs rows with a prompt and an answer, got plain texts")
    if path is None and run is not None and not dataset.options:
        examples = _dataset_of(run, run.prepared.train_parts)
    else:
        path = path or (run.data.path if run else "")
        examples = read_dataset(config.model_copy(update={"path": path}), ["options"] if dataset.options else tasks)
    example_texts = {json.dumps(conversation.messages) for conversation in examples.conversations}
    shared = sum(json.dumps(conversation.messages) in example_texts for conversation in dataset.conversations)
    if shared:
        log.warn(f"{shared:,} rows are also among the examples: scores with shots will be optimistic")
    return examples
