"""``lit-lora evaluate``: loss and accuracy of base, adapter and merged models, side by side."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import answering as options
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
        str | None, typer.Option(metavar="DATA", help="Held-out rows, as for lit-lora prepare; a run's own if omitted.")
    ] = None,
    adapter: options.Adapter = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="loss, exact_match, json_fields, options; if omitted, those that suit the rows."
        ),
    ] = None,
    shots: Annotated[int, typer.Option(metavar="K", min=0, help="Also the base with K examples in its prompt.")] = 0,
    examples: Annotated[
        str | None, typer.Option(metavar="DATA", help="Training rows for --shots; a run's own if omitted.")
    ] = None,
    skip_base: Annotated[
        bool, typer.Option("--skip-base", help="Measure runs and adapters only, not the base they are on.")
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Instead of looking at the columns.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="The format's column A is your column B; may be repeated.")
    ] = None,
    system: options.System = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Multiple choice as plain text, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="Where an answer is cut off.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts answered at once.")] = 50,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which examples --shots takes.")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Rows whose answers are printed.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures and answers as JSON.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    drop_layers: options.DropLayers = 0,
) -> None:
    """Measure models on held-out rows, side by side.

    A run folder gives two columns, its base (quantised as in training) and its adapter; --shots adds the base with
    examples in its prompt, which finetuning has to beat. Shares come with their 95 % interval. Answers are compared
    after Unicode NFC, without white space at the ends and without a code fence; JSON is compared as JSON.

    Rows are read as by lit-lora prepare. Rows of multiple choice (prompt, options, answer) are scored by likelihood.

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
    given = {"format": format_, "columns": parse_columns(columns or []) or None, "system": system}
    trained_on = _run_data(models)
    config = _data_config(trained_on, data, {key: value for key, value in given.items() if value is not None})
    if skip_base and shots:
        raise UsageError("--shots asks the base with examples, which --skip-base leaves out")
    candidates = _candidates(models, adapter, shots, as_trained=quantize is None, skip_base=skip_base)
    dataset = _read(config, tasks, limit)
    tasks = tasks or default_tasks(dataset)
    drawn_from = _examples(config, examples or trained_on.get("path"), shots, tasks, dataset)
    log.note(f"{config.path}: {len(dataset):,} rows, tasks: {', '.join(tasks)}")

    def open_candidate(candidate: Candidate) -> Any:
        how: dict[str, Any] = {"dtype": dtype, "device": device, "drop_layers": drop_layers}
        how["quantize"] = quantize or candidate.quantize
        opened = open_model(candidate.model, adapter=candidate.adapter, **how)
        return opened.model, opened.tokenizer, opened.description

    settings = EvaluateSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, plain=plain)
    results = compare(candidates, open_candidate, dataset, tasks, examples=drawn_from, seed=seed, settings=settings)
    _print(results, config.path, samples)
    for earlier, later in same_scores(results):
        log.warn(
            f"{later.candidate.label} scores exactly as {earlier.candidate.label} in everything: "
            "is it the right model or adapter, and did its training do anything?"
        )
    if out is not None:
        about = {"data": config.path, "rows": len(dataset), "tasks": tasks, "seed": seed}
        write_text(out, json.dumps(report(results, about), ensure_ascii=False, indent=1) + "\n")
        log.say(f"wrote {out}")
    unmerged = next((path for path in models if (path / "adapter").is_dir() and not (path / "merged").is_dir()), None)
    next_command = f"merge {shlex.quote(str(unmerged))}" if unmerged else f"chat {shlex.quote(str(models[-1]))}"
    log.say(f"next: lit-lora {next_command}")


def _tasks(text: str | None) -> list[str]:
    """The tasks that were asked for; none means those that suit the rows.

    Raises:
        UsageError: One is not known.
    """
    from lit_lora.evaluate import TASKS

    tasks = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"--task {name}: not known{did_you_mean(name, TASKS)}", hint=f"known: {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks))


def _run_data(models: list[Path]) -> dict[str, Any]:
    """The data section that the first run among the models was trained with; empty without a run."""
    from lit_lora.config import read_yaml

    for path in models:
        if (path / "config.yaml").is_file():
            config = dict(read_yaml(path / "config.yaml"))
            if config.get("recipe") == "classify":
                raise UsageError(f"{path}: a run of recipe classify", hint=f"lit-lora classify {path} --file DATA")
            section = config.get("data")
            return section if isinstance(section, dict) else {}
    return {}


def _data_config(trained_on: dict[str, Any], data: str | None, given: dict[str, Any]) -> DataConfig:
    """What to read and how: as given, else as the run was trained.

    Raises:
        UsageError: No data was named, and the run has no file of held-out rows.
    """
    from lit_lora.data import DataConfig

    held_out = trained_on.get("validation")
    path = data or (held_out if isinstance(held_out, str) else None)
    if path is None:
        raise UsageError("no rows to evaluate on", hint="name them: --data heldout.jsonl")
    reading = ("format", "columns", "values", "system")
    kept = {} if given else {key: trained_on[key] for key in reading if trained_on.get(key)}
    return validate({**kept, **given, "path": path}, DataConfig, name="evaluate")


def _candidates(
    models: list[Path], adapter: Path | None, shots: int, *, as_trained: bool, skip_base: bool
) -> list[Candidate]:
    """The columns: each base once, as the adapter beside it was trained, with its shots, and what was made of it.

    With ``skip_base`` only the latter.

    Raises:
        InputError: A folder holds no model.
        UsageError: ``--adapter`` was given with several models.
    """
    from lit_lora.evaluate.compare import Candidate
    from lit_lora.open.folders import find_folders, held_base

    if adapter is not None and len(models) > 1:
        raise UsageError("--adapter goes with one MODEL", hint="name runs and adapters as further MODELs")
    found: list[Candidate] = []
    for number, path in enumerate(models):
        base, folder = find_folders(path, adapter=adapter)
        held = held_base(base, folder) if as_trained and folder is not None else None
        known = {(other.model.resolve(), other.quantize) for other in found if other.adapter is None}
        if (base.resolve(), held) not in known and not (skip_base and folder is not None):
            found.append(Candidate(_base_label(base, folder, held, found), base, quantize=held))
            # of plain models only the first is a base; the others are what finetuning made
            if shots and (folder is not None or number == 0):
                found.append(Candidate(f"{found[-1].label} + {shots} shots", base, shots=shots, quantize=held))
        if folder is not None:
            found.append(Candidate(_label(folder, found), base, folder))
    return found


def _base_label(base: Path, adapter: Path | None, held: QuantizeConfig | None, taken: list[Candidate]) -> str:
    """A base's label, with what it is where that is not the checkpoint itself."""
    label = _label(base, taken)
    if held is not None:
        return f"{label} in {held}"
    if adapter is not None and base.resolve() == (adapter.parent / "base").resolve():  # it chose the codes itself
        return f"{adapter.resolve().parent.name}/{label}, the codes without their update"
    return label


def _label(folder: Path, taken: list[Candidate]) -> str:
    """A short name that no other column has."""
    plain_names = ("adapter", "model", "merged")
    name = f"{folder.parent.name}/{folder.name}" if folder.name in plain_names else folder.resolve().name
    return name if all(candidate.label != name for candidate in taken) else str(folder)


def _read(config: DataConfig, tasks: list[str], limit: int | None) -> Dataset:
    """The rows, as conversations, texts or multiple choice.

    Raises:
        InputError: A file or row cannot be read, or there is no row.
    """
    from itertools import islice

    from lit_lora.data import cache_folder
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.read import read_rows
    from lit_lora.data.source import locate
    from lit_lora.evaluate.options import has_options, read_option_rows
    from lit_lora.evaluate.tasks import Dataset

    source = locate(config.path, cache_folder())
    files = list(source.validation or source.train)
    first = next((row for file in files for _, row in read_rows(file)), None)
    if first is None:
        raise InputError(f"{config.path}: no rows in it", hint="expected one row per line or a list")
    if tasks == ["options"] or (not tasks and config.format == "auto" and has_options(first, config.columns)):
        return Dataset(options=read_option_rows(files, config.columns, limit=limit))
    samples = [sample for sample, _ in islice(read_samples(config, files), limit)]
    texts = [sample for sample in samples if isinstance(sample, str)]
    return Dataset(conversations=[sample for sample in samples if not isinstance(sample, str)], texts=texts)


def _examples(config: DataConfig, path: str | None, shots: int, tasks: list[str], dataset: Dataset) -> Dataset | None:
    """The rows that shots are drawn from.

    Raises:
        UsageError: There is no file of examples, or the rows cannot have any.
    """
    if not shots:
        return None
    if path is None:
        raise UsageError(f"--shots {shots} needs rows to draw from", hint="--examples train.jsonl: the training rows")
    if dataset.texts:
        raise UsageError("--shots needs rows with a prompt and an answer, these are plain texts")
    found = _read(config.model_copy(update={"path": path}), ["options"] if dataset.options else tasks, None)
    shown = {json.dumps(each.messages) for each in found.conversations}
    shared = sum(json.dumps(each.messages) in shown for each in dataset.conversations)
    if shared:
        log.warn(f"{shared:,} rows are also among the examples: the scores with shots will look better than they are")
    return found


def _print(results: list[Result], path: str, samples: int) -> None:
    """The table, what the figures are, and some answers."""
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
