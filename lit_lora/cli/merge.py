"""``lit-lora merge``: merge an adapter into its base model, and verify the result."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.errors import UsageError

if TYPE_CHECKING:
    from lit_lora.merge import MergePlan

__all__ = ["command"]


class _Into(str, Enum):
    dequantized = "dequantized"
    original = "original"
    quantized = "quantized"


class _Dtype(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run or adapter folder.")],
    base: options.Base = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; RUN/merged if omitted.")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Dtype of the merged weights; the base's if omitted.")] = None,
    into: Annotated[
        _Into | None,
        typer.Option(
            help="For an adapter trained on a quantized base: merge into the dequantized base (default), into its "
            "16-bit original, or quantize the result. The last two change the model's outputs, and report how much."
        ),
    ] = None,
    subtract: Annotated[
        Path | None,
        typer.Option(metavar="RUN_OR_ADAPTER", help="Adapter to remove from a base that it was merged into before."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what each dtype would preserve; write nothing.")
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Write the result even if rounding loses the update.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Accept a base that the adapter was not trained on.")] = False,
) -> None:
    """Merge an adapter into its base model and verify the result.

    The update is added in float32 and rounded once, tensor by tensor, so little memory is needed, whatever the size of
    the model. The new folder is written only if the verification passes: every tensor preserves the update, and every
    block gives the outputs of base + adapter. transformers, vLLM and llama.cpp's converter read the folder as it is.

    Examples:
        lit-lora merge out/quickstart

        lit-lora merge out/quickstart --dry-run

        lit-lora merge my-peft-adapter --base checkpoints/SmolLM2-135M-Instruct --out merged --dtype bf16

        lit-lora merge out/task2 --base out/task1/merged --subtract out/task1 --out out/task2/merged
    """
    from lit_lora.merge import find_places, merge, plan_merge
    from lit_lora.model import DTYPES
    from lit_lora.open.folders import find_adapter

    places = find_places(source, base=base, out=out)
    subtracted = None if subtract is None else find_adapter(subtract)
    plan = plan_merge(
        places,
        subtract=subtracted,
        dtype=DTYPES[dtype.value] if dtype else None,
        into=into.value if into else None,
        force=force,
    )
    log.note(f"base {places.base}, adapter {places.adapter}: {len(plan.updates)} of {len(plan.names)} tensors change")
    if dry_run and plan.into == "quantized":
        raise UsageError("--dry-run measures rounding to 16 and 32 bits, and cannot be used with --into quantized")
    if dry_run:
        _forecast(plan)
        log.say(f"dry run: nothing was written; without --dry-run, the merged model goes to {places.out}")
        return
    report = merge(plan, places.out, allow_lossy=allow_lossy)
    for line in report.lines():
        log.say(line)
    log.say(f"wrote {places.out}")
    log.say(f"next: lit-lora chat {places.out}")


def _forecast(plan: MergePlan) -> None:
    """Print what each dtype costs and preserves."""
    from dataclasses import replace

    from lit_lora.errors import NumericalError
    from lit_lora.files import human_bytes
    from lit_lora.merge import forecast
    from lit_lora.model import DTYPES

    rows = []
    for name, dtype in DTYPES.items():
        size = human_bytes(replace(plan, dtype=dtype).bytes())
        try:
            report = forecast(plan, dtype)
        except NumericalError:
            rows.append([name, size, "out of range", "", ""])
            continue
        totals = report.totals
        rows.append([name, size, f"{report.proof.lost:.2%}", f"{totals.relative_error:.2%}", f"{totals.kept:.1%}"])
    columns = ["dtype", "size", "effect lost", "update error", "values preserved"]
    log.table("Merged", columns, rows, right=[1, 2, 3, 4])
