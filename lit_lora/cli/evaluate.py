"""``lit-lora evaluate``: compare base, adapter and merged models by loss and accuracy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.answering import choose_template
from lit_lora.cli.prepare import reading_options
from lit_lora.errors import UsageError
from lit_lora.files import require_new, write_text

if TYPE_CHECKING:
    from lit_lora.evaluate.compare import Candidate, Result

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
    values: options.Values = None,
    bad_rows: options.BadRows = None,
    system: options.System = None,
    template: options.Template = None,
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

    A run folder gives two columns: its base, quantized as in training, and its adapter. --shots adds the base with
    examples in its prompt, which finetuning has to beat. Without --data, the rows are those that the run held
    out. Shares come with their 95 % interval. Answers are compared after Unicode normalization (NFC), without
    surrounding white space or a code fence; JSON is compared as JSON.

    Rows are read as in the training of the first trained model, except for the options given; without a training, as
    by lit-lora prepare. Multiple-choice rows (prompt, options, answer) are scored by likelihood.

    Examples:
        lit-lora evaluate out/quickstart --data tickets_heldout --shots 4

        lit-lora evaluate checkpoints/base out/run out/run/merged --data heldout.jsonl --out results.json

        lit-lora evaluate checkpoints/base --data arc_easy.jsonl --columns prompt=question --columns options=choices
    """
    from lit_lora.evaluate.candidates import find_candidates
    from lit_lora.evaluate.compare import compare, report, same_scores, unlike_losses
    from lit_lora.evaluate.read import default_config, find_run, read_dataset, read_examples, read_held_out
    from lit_lora.evaluate.tasks import EvaluateSettings, default_tasks
    from lit_lora.open.decoder import open_model

    if out is not None:
        require_new(out)
    tasks = _tasks(task)
    settings = reading_options(format_, columns, values, system)
    if bad_rows is not None:
        settings["bad_rows"] = bad_rows
    run = find_run(models)
    if skip_base and shots:
        raise UsageError("--shots evaluates the base with examples, which --skip-base excludes")
    candidates = find_candidates(models, adapter, shots=shots, as_trained=quantize is None, skip_base=skip_base)
    if data is not None:
        config, about_training = default_config(models, adapter, data, settings)
        dataset = read_dataset(config, tasks, limit, given=settings)
    elif run is not None:
        config, dataset = read_held_out(run, settings, limit)
        about_training = f"the rows that {run.folder} held out, read as in training"
        if settings:
            about_training += f", except for: {', '.join(settings)}"
    else:
        raise UsageError("no rows to evaluate on", hint="give held-out rows: --data heldout.jsonl")
    if about_training:
        log.note(about_training)
    tasks = tasks or default_tasks(dataset)
    shot_rows = read_examples(config, examples, run, shots, tasks, dataset)
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
        if template is not None:
            choose_template(opened.tokenizer, template)
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
    unlike = unlike_losses(results)
    if unlike:
        log.warn(f"the losses are over different tokens and cannot be compared: {'; '.join(unlike)}")
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
    from lit_lora.evaluate import check_tasks

    return check_tasks([name.strip() for name in (text or "").split(",") if name.strip()], option="--task ")


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
