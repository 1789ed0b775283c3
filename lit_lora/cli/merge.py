"""``lit-lora merge``: an adapter into its base model, proved."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
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
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder, or an adapter folder.")],
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model, if not the one it names.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write; RUN/merged when omitted.")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Of the merged weights; as the base's when omitted.")] = None,
    into: Annotated[
        _Into | None,
        typer.Option(
            help="After training over a quantised base: add to it dequantised (default: what was trained), to its "
            "16-bit original, or quantise again; the last two change what the model does, and say how much."
        ),
    ] = None,
    subtract: Annotated[
        Path | None,
        typer.Option(metavar="RUN_OR_ADAPTER", help="Take this task back out of a base it was merged into before."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be kept in each dtype; write nothing.")
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Write even if rounding loses the update.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Take a base that the adapter was not trained on.")] = False,
) -> None:
    """Merge an adapter into its base model and prove the result.

    The update is added in float32 and rounded once, tensor by tensor, so memory stays small however large the model.
    The new folder appears only when the proof holds: how much of the update every tensor kept, and that every block
    gives the outputs of base + adapter. It opens in transformers, vLLM and llama.cpp's converter as it is.

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
    taken = None if subtract is None else find_adapter(subtract)
    plan = plan_merge(
        places,
        subtract=taken,
        dtype=DTYPES[dtype.value] if dtype else None,
        into=into.value if into else None,
        force=force,
    )
    log.note(f"base {places.base}, adapter {places.adapter}: {len(plan.updates)} of {len(plan.names)} tensors change")
    if dry_run and plan.into == "quantized":
        raise UsageError("--dry-run: measures rounding to 16 and 32 bits, it does not apply to --into quantized")
    if dry_run:
        _forecast(plan)
        log.say(f"dry run: nothing written; without --dry-run the merged model goes to {places.out}")
        return
    report = merge(plan, places.out, allow_lossy=allow_lossy)
    for line in report.lines():
        log.say(line)
    log.say(f"wrote {places.out}; next: lit-lora chat {places.out}")


def _forecast(plan: MergePlan) -> None:
    """A table of what each dtype costs and keeps."""
    from dataclasses import replace

    from lit_lora.errors import NumericalError
    from lit_lora.files import human_bytes
    from lit_lora.merge import forecast
    from lit_lora.model import DTYPES

    rows = []
    for name, dtype in DTYPES.items():
        size = human_bytes(replace(plan, dtype=dtype).bytes())
        try:
            found = forecast(plan, dtype)
        except NumericalError:
            rows.append([name, size, "does not fit", "", ""])
            continue
        whole = found.totals
        rows.append([name, size, f"{found.proof.lost:.2%}", f"{whole.relative_error:.2%}", f"{whole.kept:.1%}"])
    columns = ["dtype", "size", "effect lost", "update off by", "values kept"]
    log.table("Merged", columns, rows, right=[1, 2, 3, 4])
