"""``lit-lora classify``: predict labels with a finetuned encoder or encoder-decoder, and measure the predictions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.prepare import parse_columns
from lit_lora.config import read_yaml, validate
from lit_lora.errors import UsageError
from lit_lora.files import require_new, write_text

if TYPE_CHECKING:
    from lit_lora.classify import OpenedClassifier, Prediction
    from lit_lora.data.config import LabeledConfig
    from lit_lora.data.labeled import Example

__all__ = ["command"]


def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Run, adapter or model folder that recipe classify wrote.")
    ],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Text to classify.")] = None,
    pair: Annotated[str | None, typer.Option(metavar="TEXT", help="Second text of a pair.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="DATA", help="Rows to classify, in a form that training reads.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="A=B", help="Read text, pair or label from your column B; may be repeated."),
    ] = None,
    limit: options.Limit = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the predictions to this file (JSON Lines).")
    ] = None,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
) -> None:
    """Predict the label of a text, of a pair of texts, or of every row of a file.

    MODEL is a result of lit-lora finetune with recipe: classify: the run folder, its adapter or its whole model. Rows
    are read as in training, unless --columns says otherwise. If they have labels, metrics are printed: accuracy with
    its 95 % interval, F1 and Matthews' correlation; correlations for regression, exact match for seq2seq.

    Examples:
        lit-lora classify out/classify "a charming and often affecting journey"

        lit-lora classify out/classify "It rained." --pair "The street was dry."

        lit-lora classify out/classify --file validation.jsonl --out predictions.jsonl
    """
    from lit_lora.classify import open_classifier
    from lit_lora.data.labeled import Example
    from lit_lora.data.source import locate
    from lit_lora.files import cache_folder

    if (text is None) == (file is None):
        raise UsageError("expected either a TEXT or --file DATA")
    if out is not None and file is None:
        raise UsageError("--out needs --file")
    if out is not None:
        require_new(out)
    section, model_section = _training_sections(model, file or "", parse_columns(columns or []))
    if file is None:
        examples = [Example(str(text), pair, None, "command line")]
    else:
        examples = _examples(section, list(locate(file, cache_folder()).train), limit)
    opened = open_classifier(model, adapter=adapter, dtype=dtype or model_section.get("dtype"), device=device)
    log.note(opened.description)
    predictions, metrics = _predict(opened, section, examples)
    if file is None:
        _show_one(opened, predictions[0])
        return

    if out is not None:
        lines = [_line(opened, *pair) for pair in zip(examples, predictions, strict=True)]
        write_text(out, "".join(lines))
        log.say(f"wrote {out}")
    elif not metrics:
        for prediction in predictions:
            log.say(prediction.answer)
    if metrics:
        rows = [[name.replace("_", " "), value] for name, value in metrics.items()]
        log.table(f"{file}, {len(examples):,} rows (shares with 95 % interval)", ["metric", "value"], rows, right=(1,))
        if out is None:
            again = shlex.join(["lit-lora", "classify", str(model), "--file", file, "--out", "predictions.jsonl"])
            log.say(f"next: {again}")


def _training_sections(model: Path, path: str, columns: dict[str, str]) -> tuple[LabeledConfig, dict[str, Any]]:
    """The data section for reading ``path``, as in training or by ``columns``; and the training's model section.

    Raises:
        UsageError: The run is of another recipe, or a column is not known.
    """
    from lit_lora.data.config import LabeledConfig
    from lit_lora.data.trained import rename_values

    # An adapter or model folder lies in its run folder.
    files = [folder / "config.yaml" for folder in (model, model.parent)]
    config_file = next((file for file in files if file.is_file()), None)
    config: dict[str, Any] = dict(read_yaml(config_file)) if config_file is not None else {}
    if config.get("recipe", "classify") != "classify":
        raise UsageError(
            f"{model}: a run of recipe {config['recipe']}, expected classify",
            hint=f"lit-lora evaluate {model} --data FILE, or lit-lora chat {model}",
        )
    data = dict(config.get("data") or {})
    data.pop("validation", None)
    data.pop("limit", None)
    if columns:
        data["values"] = rename_values(data.get("values") or {}, data.get("columns") or {}, columns)
        data["columns"] = columns
    return validate({**data, "path": path}, LabeledConfig, name="classify"), config.get("model") or {}


def _examples(section: LabeledConfig, files: list[Path], limit: int | None) -> list[Example]:
    from lit_lora.data.labeled import read_examples

    examples, mapping = read_examples(files, section, labeled=None, limit=limit)
    log.note(f"{section.path}: {len(examples):,} rows; {mapping}")
    return examples


def _predict(
    opened: OpenedClassifier, section: LabeledConfig, examples: list[Example]
) -> tuple[list[Prediction], dict[str, str]]:
    """A prediction for each row and, if the rows have labels, the metrics as they are printed."""
    from lit_lora.classify import predict
    from lit_lora.classify.run import encode_rows
    from lit_lora.data.padded import by_length
    from lit_lora.evaluate import Share

    labeled = all(example.label is not None for example in examples)
    if section.too_long == "drop":  # every row gets a prediction
        section = section.model_copy(update={"too_long": "truncate"})
    rows = encode_rows(examples, opened.shape, opened.task, section, labeled=labeled)
    batches = by_length(rows, opened.shape.layout, 4096)
    predictions = predict(
        opened.model,
        opened.shape.tokenizer,
        opened.task,
        batches,
        max_target_length=opened.shape.target_tokens(section.max_target_length),
    )
    if not labeled:
        return predictions, {}
    metrics = opened.task.objective.validate(opened.model, batches)
    shown = {name: f"{value:.4f}" for name, value in metrics.items()}
    for name in {"accuracy", "exact_match"} & metrics.keys():
        shown[name] = str(Share(round(metrics[name] * len(rows)), len(rows)))
    return predictions, shown


def _show_one(opened: OpenedClassifier, prediction: Prediction) -> None:
    """Print one prediction and the probabilities of the ten most likely labels."""
    log.say(prediction.answer, style="bold")
    if prediction.probabilities:
        ranked = sorted(zip(opened.task.labels, prediction.probabilities, strict=True), key=lambda pair: -pair[1])
        rows = [[label, f"{probability:.4f}"] for label, probability in ranked[:10]]
        log.table("Probabilities", ["label", "probability"], rows, right=(1,))


def _line(opened: OpenedClassifier, example: Example, prediction: Prediction) -> str:
    """One row and its prediction as a JSON line."""
    record: dict[str, Any] = {"text": example.text}
    if example.pair is not None:
        record["pair"] = example.pair
    is_number = opened.task.kind == "regression"
    record["prediction"] = float(prediction.answer) if is_number else prediction.answer
    if prediction.probability is not None:
        record["probability"] = round(prediction.probability, 6)
    if example.label is not None:
        record["label"] = example.label
    return json.dumps(record, ensure_ascii=False) + "\n"
