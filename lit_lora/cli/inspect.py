"""``lit-lora inspect``: what a folder, file, adapter, run or Hub repository is, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.files import human_bytes

if TYPE_CHECKING:
    from lit_lora.inspection import AdapterFacts, Inspection, ModelFacts, Part, Target, TokenizerFacts

__all__ = ["command"]

_Rows = Iterator[tuple[str, str]]


def command(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder, weights file, adapter, run, or OWNER/NAME of the Hub."),
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the Hub repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Show what a model, adapter or run is, and what is wrong with it, without loading weights.

    Family and the code that will run it, context, rope, special tokens, chat template and quantization; the size of
    each part by dtype; the modules that peft.target_modules can name, with their shapes; problems, such as a missing
    shard, a truncated file or the tokenizer of another model. Of a Hub repository only configuration, tokenizer and the
    headers of the weights are downloaded. Exit code 3 means that it cannot be used.

    To see what finetuning changed, use inspect-update.

    Examples:
        lit-lora inspect checkpoints/smollm2

        lit-lora inspect Qwen/Qwen3-0.6B

        lit-lora inspect out/quickstart --json
    """
    from lit_lora.inspection import inspect

    report = inspect(path, revision=revision)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _show(report)
    if not report.usable:
        raise typer.Exit(InputError.exit_code)


def _show(report: Inspection) -> None:
    rows = [("what", report.kind), ("format", report.format or "unknown"), *_run_rows(report.run)]
    if report.adapter is not None:
        rows += _adapter_rows(report.adapter)
    if report.model is not None:
        rows += _model_rows(report.model)
    if report.tokenizer is not None:
        rows += _tokenizer_rows(report.tokenizer)
    log.table(report.path, ["fact", "value"], rows)

    if report.parts:
        log.table("Sizes", ["part", "parameters", "stored", "by dtype"], _size_rows(report.parts), right=(1, 2))
    if report.targets:
        log.table(
            "Modules",
            ["name", "shape", "count", "in all-linear", "named by"],
            _target_rows(report.targets),
            right=(1, 2),
        )
    if report.problems:
        problems = [
            ["error" if problem.fatal else "warning", problem.text, problem.hint or ""] for problem in report.problems
        ]
        log.table("Problems", ["severity", "problem", "remedy"], problems)


def _size_rows(parts: Sequence[Part]) -> list[list[str]]:
    rows = [[part.name, f"{part.parameters:,}", _size(part.bytes), _by_dtype(part.dtypes)] for part in parts]
    if len(parts) > 1:
        parameters = sum(part.parameters for part in parts)
        rows.append(["all", f"{parameters:,}", _size(sum(part.bytes for part in parts)), ""])
    return rows


def _size(count: int) -> str:
    """Stored bytes; nothing for a format that does not say."""
    return human_bytes(count) if count else ""


def _target_rows(targets: Sequence[Target]) -> list[list[str]]:
    in_all_linear = {True: "yes", False: "no", None: ""}
    rows = []
    for target in targets:
        shape = "×".join(map(str, target.shape))
        rows.append([target.name, shape, f"×{target.count}", in_all_linear[target.all_linear], target.setting or ""])
    return rows


def _run_rows(run: Mapping[str, object]) -> _Rows:
    if not run:
        return
    yield "recipe", str(run["recipe"])
    yield "data", str(run["data"])
    yield "complete", "yes" if run["complete"] else "no"


def _adapter_rows(adapter: AdapterFacts) -> _Rows:
    rank = "" if adapter.rank is None else f", rank {adapter.rank}"
    alpha = "" if adapter.alpha is None else f", alpha {adapter.alpha:g}"
    yield "method", f"{adapter.method}{rank}{alpha}"
    yield "targets", ", ".join(adapter.targets) or "none"
    if adapter.modules_to_save:
        yield "trained in full", ", ".join(adapter.modules_to_save)
    found = f", found at {adapter.base_folder}" if adapter.base_folder not in (None, adapter.base) else ""
    yield "base", f"{adapter.base or 'not named'}{found}"
    if adapter.data:
        yield "trained on", adapter.data
    yield "size", f"{adapter.parameters:,} parameters, {_by_dtype(adapter.dtypes) or 'no weights'}"


def _model_rows(model: ModelFacts) -> _Rows:
    yield "family", model.model_type + (f" ({model.architecture})" if model.architecture else "")
    yield "runs by", model.runs_by
    experts = f", {model.experts} experts" if model.experts else ""
    yield "layers", f"{model.layers} of width {model.width}{experts}"
    if model.layer_types:
        yield "layer types", ", ".join(f"{name} ×{count}" for name, count in model.layer_types.items())
    yield "context", "not limited" if model.context is None else f"{model.context:,} tokens"
    if model.window is not None:
        yield "sliding window", f"{model.window:,} tokens"
    if model.rope:
        yield "rope", _rope(model.rope)
    yield "embedding", f"{model.rows:,} rows; the head is {'tied to it' if model.tied else 'not tied'}"
    yield "quantization", model.quantization or "none"


def _rope(rope: Mapping[str, object]) -> str:
    """``default, theta 10000``; with several kinds of layers, ``KIND (default, theta 10000)`` for each."""
    words = []
    for key, value in sorted(rope.items(), key=lambda item: item[0] != "rope_type"):
        name = key.removeprefix("rope_")
        if isinstance(value, dict):
            words.append(f"{name} ({_rope(value)})")
        elif name == "type":
            words.append(str(value))
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


def _tokenizer_rows(tokenizer: TokenizerFacts) -> _Rows:
    yield "vocabulary", f"{tokenizer.vocabulary:,} tokens"
    for purpose, (token, token_id) in tokenizer.special_tokens.items():
        yield purpose, f"{token} ({token_id})"
    yield "plain text begins with bos", "yes" if tokenizer.starts_with_bos else "no"
    yield "chat template", tokenizer.template or "none"


def _by_dtype(dtypes: Mapping[str, int]) -> str:
    return ", ".join(f"{human_bytes(size)} {dtype}" for dtype, size in dtypes.items())
