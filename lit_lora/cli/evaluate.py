"""``lit-lora evaluate``: compare base, adapter and merged models by loss and accuracy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.prepare import parse_columns
from lit_lora.config import did_you_mean, validate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import require_new, write_text

if TYPE_CHECKING:
    from lit_lora.data import DataConfig
    from lit_lora.evaluate.compare import Candidate, Result
    from lit_lora.evaluate.tasks import Dataset
    from lit_lora.quantize import QuantizeConfig

__all__ = ["command"]


def command(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Model, run or adapter folders.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Held-out rows, as for lit-lora prepare; the run's own if omitted."),
    ] = None,
    adapter: options.Adapter = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Tasks: loss, exact_match, json_fields, options; those that suit the rows if omitted."
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option(metavar="K", min=0, help="Also evaluate the base with K examples in the prompt.")
    ] = 0,
    examples: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows to draw --shots from; the run's training rows if omitted.")
    ] = None,
    skip_base: Annotated[
        bool, typer.Option("--skip-base", help="Evaluate only runs and adapters, not their base.")
    ] = False,
    limit: options.Limit = None,
    format_: options.Format = None,
    columns: options.Columns = None,
    system: options.System = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Score multiple choice as plain text, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum length of an answer, in tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts answered together.")] = 50,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the choice of examples for --shots.")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Number of rows whose answers are printed.")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all metrics and answers to this file (JSON).")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    drop_layers: options.DropLayers = 0,
) -> None:
    """Evaluate models on held-out rows, side by side.

    A run folder gives two columns: its base, quantised as in training, and its adapter. --shots adds the base with
    examples in its prompt, which finetuning has to beat. Shares come with their 95 % interval. Answers are compared
    after Unicode normalisation (NFC), without surrounding white space or a code fence; JSON is compared as JSON.

    Rows are read as by lit-lora prepare. Multiple-choice rows (prompt, options, answer) are scored by likelihood.

    Examples:
        lit-lora evaluate out/quickstart --data tickets_heldout --shots 4

        lit-lora evaluate checkpoints/base out/run out/run/merged --data heldout.jsonl --out results.json

        lit-lora evaluate checkpoints/base --data arc_easy.jsonl --columns prompt=question --columns options=choices
    """
    from lit_lora.evaluate.compare import compare, report, same_scores
    from lit_lora.evaluate.tasks import EvaluateSettings, default_tasks
    from lit_lora.open.decoder import open_model

    if out is not None:
        require_new(out)
    tasks = _tasks(task)
    settings = {"format": format_, "columns": parse_columns(columns or []) or None, "system": system}
    run_data = _run_data(models)
    config = _data_config(run_data, data, {key: value for key, value in settings.items() if value is not None})
    if skip_base and shots:
        raise UsageError("--shots evaluates the base with examples, which --skip-base excludes")
    candidates = _candidates(models, adapter, shots, as_trained=quantize is None, skip_base=skip_base)
    dataset = _read(config, tasks, limit)
    tasks = tasks or default_tasks(dataset)
    shot_rows = _examples(config, examples or run_data.get("path"), shots, tasks, dataset)
    log.note(f"{config.path}: {len(dataset):,} rows, tasks: {', '.join(tasks)}")

    def open_candidate(candidate: Candidate) -> Any:
        opened = open_model(
            candidate.model,
            adapter=candidate.adapter,
            dtype=dtype,
            device=device,
            quantize=quantize or candidate.quantize,
            drop_layers=drop_layers,
        )
        return opened.model, opened.tokenizer, opened.description

    results = compare(
        candidates,
        open_candidate,
        dataset,
        tasks,
        examples=shot_rows,
        seed=seed,
        settings=EvaluateSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, plain=plain),
    )
    _print(results, config.path, samples)
    for earlier, later in same_scores(results):
        log.warn(
            f"{later.candidate.label} has exactly the scores of {earlier.candidate.label}; check that it is the right "
            "model or adapter, and that training changed it"
        )
    if out is not None:
        about = {"data": config.path, "rows": len(dataset), "tasks": tasks, "seed": seed}
        write_text(out, json.dumps(report(results, about), ensure_ascii=False, indent=1) + "\n")
        log.say(f"wrote {out}")
    unmerged = [path for path in models if (path / "adapter").is_dir() and not (path / "merged").is_dir()]
    if unmerged:
        log.say(f"next: lit-lora merge {shlex.quote(str(unmerged[0]))}")
    else:
        log.say(f"next: lit-lora chat {shlex.quote(str(models[-1]))}")


def _tasks(text: str | None) -> list[str]:
    """The requested tasks; empty if none was requested.

    Raises:
        UsageError: There is no such task.
    """
    from lit_lora.evaluate import TASKS

    tasks = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in tasks:
        if name not in TASKS:
            raise UsageError(
                f"--task {name}: unknown task{did_you_mean(name, TASKS)}", hint=f"known: {', '.join(TASKS)}"
            )
    return list(dict.fromkeys(tasks))


def _run_data(models: list[Path]) -> dict[str, Any]:
    """The data section of the first run among the models; empty without a run.

    Raises:
        UsageError: It is a run of recipe classify.
    """
    from lit_lora.config import read_yaml

    for path in models:
        if (path / "config.yaml").is_file():
            config = dict(read_yaml(path / "config.yaml"))
            if config.get("recipe") == "classify":
                raise UsageError(f"{path}: a run of recipe classify", hint=f"lit-lora classify {path} --file DATA")
            section = config.get("data")
            return section if isinstance(section, dict) else {}
    return {}


def _data_config(run_data: dict[str, Any], data: str | None, settings: dict[str, Any]) -> DataConfig:
    """The rows to read and how: by the options, else as in training.

    Raises:
        UsageError: No data was given, and the run has no file of held-out rows.
    """
    from lit_lora.data import DataConfig

    path = data
    if path is None and isinstance(run_data.get("validation"), str):  # a file, not a share of the training rows
        path = run_data["validation"]
    if path is None:
        raise UsageError("no rows to evaluate on", hint="give held-out rows: --data heldout.jsonl")
    if not settings:
        settings = {key: run_data[key] for key in ("format", "columns", "values", "system") if run_data.get(key)}
    return validate({**settings, "path": path}, DataConfig, name="evaluate")


def _candidates(
    models: list[Path], adapter: Path | None, shots: int, *, as_trained: bool, skip_base: bool
) -> list[Candidate]:
    """The columns of the table: each base once, with its shots, and the adapters and models made from it.

    Args:
        models: Model, run or adapter folders.
        adapter: An adapter for the only model.
        shots: Examples in the prompt of a second column for each base; none if 0.
        as_trained: Quantise a base as the adapter beside it was trained.
        skip_base: Leave out the bases.

    Raises:
        InputError: A folder contains no model.
        UsageError: ``--adapter`` was given with several models.
    """
    from lit_lora.evaluate.compare import Candidate
    from lit_lora.open.folders import find_folders, held_base

    if adapter is not None and len(models) > 1:
        raise UsageError("--adapter needs exactly one MODEL", hint="give runs and adapters as further MODELs")
    candidates: list[Candidate] = []
    bases: set[tuple[Path, QuantizeConfig | None]] = set()
    for number, path in enumerate(models):
        base, adapter_folder = find_folders(path, adapter=adapter)
        quantize = None
        if as_trained and adapter_folder is not None:
            quantize = held_base(base, adapter_folder)
        skip = skip_base and adapter_folder is not None
        if not skip and (base.resolve(), quantize) not in bases:
            bases.add((base.resolve(), quantize))
            label = _base_label(base, adapter_folder, quantize, candidates)
            candidates.append(Candidate(label, base, quantize=quantize))
            # Of models without an adapter, only the first is a base; the others are results of finetuning.
            if shots and (adapter_folder is not None or number == 0):
                candidates.append(Candidate(f"{label} + {shots} shots", base, shots=shots, quantize=quantize))
        if adapter_folder is not None:
            candidates.append(Candidate(_label(adapter_folder, candidates), base, adapter_folder))
    return candidates


def _base_label(base: Path, adapter: Path | None, quantize: QuantizeConfig | None, others: list[Candidate]) -> str:
    """A base's label, which says how it differs from the checkpoint itself."""
    label = _label(base, others)
    if quantize is not None:
        return f"{label} in {quantize}"
    # A method that chooses the codes of its base saves them beside the adapter.
    if adapter is not None and base.resolve() == (adapter.parent / "base").resolve():
        return f"{adapter.resolve().parent.name}/{label}, the codes without their update"
    return label


def _label(folder: Path, others: list[Candidate]) -> str:
    """A short name that no other column has."""
    name = folder.resolve().name
    if folder.name in ("adapter", "model", "merged"):  # the same in every run
        name = f"{folder.parent.name}/{folder.name}"
    is_free = all(candidate.label != name for candidate in others)
    return name if is_free else str(folder)


def _read(config: DataConfig, tasks: list[str], limit: int | None) -> Dataset:
    """The rows, as conversations, texts or multiple choice.

    Raises:
        InputError: A file or row cannot be read, or there is no row.
    """
    from itertools import chain, islice

    from lit_lora.data import cache_folder
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.read import read_rows
    from lit_lora.data.source import locate
    from lit_lora.evaluate.options import has_options, read_option_rows
    from lit_lora.evaluate.tasks import Dataset

    source = locate(config.path, cache_folder())
    files = list(source.validation or source.train)
    _, first_row = next(chain.from_iterable(map(read_rows, files)), (0, None))
    if first_row is None:
        raise InputError(f"{config.path}: no rows in it", hint="expected one row per line or a list")
    if tasks == ["options"] or (not tasks and config.format == "auto" and has_options(first_row, config.columns)):
        return Dataset(options=read_option_rows(files, config.columns, limit=limit))

    dataset = Dataset()
    for sample, _ in islice(read_samples(config, files), limit):
        if isinstance(sample, str):
            dataset.texts.append(sample)
        else:
            dataset.conversations.append(sample)
    return dataset


def _examples(config: DataConfig, path: str | None, shots: int, tasks: list[str], dataset: Dataset) -> Dataset | None:
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
    examples = _read(config.model_copy(update={"path": path}), ["options"] if dataset.options else tasks, None)
    example_texts = {json.dumps(conversation.messages) for conversation in examples.conversations}
    shared = sum(json.dumps(conversation.messages) in example_texts for conversation in dataset.conversations)
    if shared:
        log.warn(f"{shared:,} rows are also among the examples: scores with shots will be optimistic")
    return examples


def _print(results: list[Result], path: str, samples: int) -> None:
    """Print some answers, the table, and what its metrics mean."""
    from lit_lora.evaluate.compare import comparison_table

    header, lines = comparison_table(results)
    for number, answer in enumerate(results[0].answers[:samples]):
        log.say(f"{number + 1}. {log.shortened(str(answer.messages[-1]['content']), 300)}", style="bold")
        log.say(f"   expected: {log.shortened(answer.reference, 300)}")
        for result in results:
            other = result.answers[number]
            mark = "=" if other.right else "≠"
            log.say(f"   {mark} {result.candidate.label}: {log.shortened(other.answer, 300)}")
    log.table(f"{path} (shares with 95 % interval)", header, lines, right=range(1, len(header)))
    for metric in results[0].metrics:
        if metric.why:
            log.note(f"{metric.name}: {metric.why}")
    for result in results:
        if result.adapter_sha256:
            log.say(f"{result.candidate.label}: {result.candidate.adapter}, sha256 {result.adapter_sha256[:16]}")
