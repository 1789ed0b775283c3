"""``lit-lora classify``: predictions of a finetuned encoder or encoder-decoder, and how well they agree with labels."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import answering as options
from lit_lora.cli.prepare import parse_columns
from lit_lora.config import read_yaml, validate
from lit_lora.errors import UsageError
from lit_lora.files import require_new, write_text

if TYPE_CHECKING:
    from lit_lora.classify import OpenedClassifier, Prediction
    from lit_lora.data.config import LabelledConfig
    from lit_lora.data.labelled import Example

__all__ = ["command"]


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, adapter or model folder of recipe classify.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to classify.")] = None,
    pair: Annotated[str | None, typer.Option(metavar="TEXT", help="The second text of a pair.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="DATA", help="Rows, as those of training.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="text, pair or label is your column B; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write predictions as JSON Lines.")] = None,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
) -> None:
    """Predict the label of a text, of a pair of texts, or of every row of a file.

    MODEL is what lit-lora finetune with recipe: classify wrote: its run folder, its adapter, or its whole model. Rows
    are read as those that the run was trained on, unless --columns says otherwise. Where they have labels, their
    agreement is printed: accuracy with its 95 % interval, F1 and Matthews' correlation; for numbers the correlations,
    for texts the share that is exactly right.

    Examples:
        lit-lora classify out/classify "a charming and often affecting journey"

        lit-lora classify out/classify "It rained." --pair "The street was dry."

        lit-lora classify out/classify --file validation.jsonl --out predictions.jsonl
    """
    from lit_lora.classify import open_classifier
    from lit_lora.data.labelled import Example
    from lit_lora.data.source import locate
    from lit_lora.files import cache_folder

    if (text is None) == (file is None):
        raise UsageError("give a TEXT or --file DATA, one of the two")
    if out is not None and file is None:
        raise UsageError("--out: needs --file")
    if out is not None:
        require_new(out)
    section, trained = _trained(model, file or "", parse_columns(columns or []))
    if file is None:
        examples = [Example(str(text), pair, None, "command line")]
    else:
        examples = _examples(section, list(locate(file, cache_folder()).train), limit)
    opened = open_classifier(model, adapter=adapter, dtype=dtype or trained.get("dtype"), device=device)
    log.note(opened.description)
    found, metrics = _predict(opened, section, examples)
    if file is None:
        _show_one(opened, found[0])
        return
    if out is not None:
        write_text(out, "".join(_line(opened, *both) for both in zip(examples, found, strict=True)))
        log.say(f"wrote {out}")
    elif not metrics:
        for prediction in found:
            log.say(prediction.answer)
    if metrics:
        rows = [[name.replace("_", " "), value] for name, value in metrics.items()]
        log.table(f"{file}, {len(examples):,} rows (shares with 95 % interval)", ["figure", "value"], rows, right=(1,))
    if out is None and metrics:
        log.say(f"next: lit-lora classify {shlex.quote(str(model))} --file {shlex.quote(file)} --out predictions.jsonl")


def _trained(model: Path, path: str, columns: dict[str, str]) -> tuple[LabelledConfig, dict[str, Any]]:
    """How rows are read, as the run was trained or as given; and the run's model section.

    Raises:
        UsageError: The run is of another recipe, or a column is not known.
    """
    from lit_lora.data.config import LabelledConfig

    config = next((p / "config.yaml" for p in (model, model.parent) if (p / "config.yaml").is_file()), None)
    trained: dict[str, Any] = dict(read_yaml(config)) if config is not None else {}
    if trained.get("recipe", "classify") != "classify":
        raise UsageError(
            f"{model}: a run of recipe {trained['recipe']}, expected classify",
            hint=f"lit-lora evaluate {model} --data FILE, or lit-lora chat {model}",
        )
    kept = {key: value for key, value in (trained.get("data") or {}).items() if key not in ("validation", "limit")}
    if columns:
        kept = {**kept, "columns": columns, "values": {}}
    return validate({**kept, "path": path}, LabelledConfig, name="classify"), trained.get("model") or {}


def _examples(section: LabelledConfig, files: list[Path], limit: int | None) -> list[Example]:
    from lit_lora.data.labelled import read_examples

    examples, about = read_examples(files, section, labelled=None, limit=limit)
    log.note(f"{section.path}: {len(examples):,} rows; {about}")
    return examples


def _predict(
    opened: OpenedClassifier, section: LabelledConfig, examples: list[Example]
) -> tuple[list[Prediction], dict[str, str]]:
    """A prediction for each row, and where rows have labels the figures as they are printed."""
    from lit_lora.classify import predict
    from lit_lora.classify.run import encode_rows
    from lit_lora.data.padded import by_length
    from lit_lora.evaluate import Share

    labelled = all(example.label is not None for example in examples)
    if section.too_long == "drop":  # every row gets an answer
        section = section.model_copy(update={"too_long": "truncate"})
    rows = encode_rows(examples, opened.shape, opened.task, section, labelled=labelled)
    batches = by_length(rows, opened.shape.layout, 4096)
    most = section.max_target_length
    found = predict(opened.model, opened.shape.tokenizer, opened.task, batches, max_target_length=most)
    if not labelled:
        return found, {}
    metrics = opened.task.objective.validate(opened.model, batches)
    shown = {name: f"{value:.4f}" for name, value in metrics.items()}
    for name in {"accuracy", "exact_match"} & metrics.keys():
        shown[name] = str(Share(round(metrics[name] * len(rows)), len(rows)))
    return found, shown


def _show_one(opened: OpenedClassifier, found: Prediction) -> None:
    """One answer: with the probability of every label, the likeliest first."""
    log.say(found.answer, style="bold")
    if found.probabilities:
        ranked = sorted(zip(opened.task.labels, found.probabilities, strict=True), key=lambda pair: -pair[1])
        log.table("Probabilities", ["label", "probability"], [[n, f"{p:.4f}"] for n, p in ranked[:10]], right=(1,))


def _line(opened: OpenedClassifier, example: Example, found: Prediction) -> str:
    record: dict[str, Any] = {"text": example.text}
    if example.pair is not None:
        record["pair"] = example.pair
    number = opened.task.kind == "regression"
    record["prediction"] = float(found.answer) if number else found.answer
    if found.probability is not None:
        record["probability"] = round(found.probability, 6)
    if example.label is not None:
        record["label"] = example.label
    return json.dumps(record, ensure_ascii=False) + "\n"
