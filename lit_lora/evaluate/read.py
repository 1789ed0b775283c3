"""The rows of an evaluation: which they are, how they are read, and those that examples are drawn from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.config import read_yaml, validate
from lit_lora.data import DataConfig, cache_folder
from lit_lora.data.findings import Findings
from lit_lora.data.prepare import read_samples
from lit_lora.data.read import read_rows
from lit_lora.data.source import locate
from lit_lora.errors import InputError, UsageError
from lit_lora.evaluate.options import has_options, read_option_rows
from lit_lora.evaluate.tasks import Dataset

__all__ = ["data_of_run", "read_dataset", "read_examples", "rows_config"]


def data_of_run(models: Iterable[Path]) -> dict[str, Any]:
    """The data section of the first run among the models; empty without a run.

    Raises:
        UsageError: It is a run of recipe classify.
    """
    for path in models:
        if (path / "config.yaml").is_file():
            config = dict(read_yaml(path / "config.yaml"))
            if config.get("recipe") == "classify":
                raise UsageError(f"{path}: a run of recipe classify", hint=f"lit-lora classify {path} --file DATA")
            section = config.get("data")
            return section if isinstance(section, dict) else {}
    return {}


def rows_config(run_data: Mapping[str, Any], data: str | None, settings: Mapping[str, Any]) -> DataConfig:
    """The rows to read and how: by the settings, else as in training.

    Args:
        run_data: From :func:`data_of_run`.
        data: The rows; the file of held-out rows of the run when omitted.
        settings: Keys of the config section ``data``; with any, none of the run's is used.

    Raises:
        UsageError: No data was given, and the run has no file of held-out rows.
    """
    path = data
    if path is None and isinstance(run_data.get("validation"), str):  # a file, not a share of the training rows
        path = run_data["validation"]
    if path is None:
        raise UsageError("no rows to evaluate on", hint="give held-out rows: --data heldout.jsonl")
    if not settings:
        settings = {
            key: run_data[key] for key in ("format", "columns", "roles", "values", "system") if run_data.get(key)
        }
    return validate({**settings, "path": path}, DataConfig, name="evaluate")


def read_dataset(config: DataConfig, tasks: Sequence[str] = (), limit: int | None = None) -> Dataset:
    """The rows, as conversations, texts or multiple choice.

    Args:
        config: Where they are, and how to read them. Of a folder with held-out rows, these are read.
        tasks: Rows of multiple choice are read as such for the task ``options``, or for no tasks at all.
        limit: The most rows.

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
    if list(tasks) == ["options"] or (not tasks and config.format == "auto" and has_options(first_row, config.columns)):
        return Dataset(options=read_option_rows(files, config.columns, limit=limit, bad_rows=config.bad_rows))

    dataset = Dataset()
    findings = Findings(config.bad_rows)
    for sample, _ in islice(read_samples(config, files, findings), limit):
        if isinstance(sample, str):
            dataset.texts.append(sample)
        else:
            dataset.conversations.append(sample)
    findings.log_warnings()
    return dataset


def read_examples(
    config: DataConfig, path: str | None, shots: int, tasks: Sequence[str], dataset: Dataset
) -> Dataset | None:
    """The rows that shots are drawn from; None without shots.

    Raises:
        UsageError: There is no file of examples, or the rows are plain texts.
    """
    if not shots:
        return None
    if path is None:
        raise UsageError(f"--shots {shots} needs rows to draw from", hint="give training rows: --examples train.jsonl")
    if dataset.texts:
        raise UsageError("--shots needs rows with a prompt and an answer, got plain texts")
    examples = read_dataset(config.model_copy(update={"path": path}), ["options"] if dataset.options else tasks)
    example_texts = {json.dumps(conversation.messages) for conversation in examples.conversations}
    shared = sum(json.dumps(conversation.messages) in example_texts for conversation in dataset.conversations)
    if shared:
        log.warn(f"{shared:,} rows are also among the examples: scores with shots will be optimistic")
    return examples
