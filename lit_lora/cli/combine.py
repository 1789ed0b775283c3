"""``lit-lora combine``: a weighted sum of LoRA adapters as one adapter."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lit_lora import log
from lit_lora.errors import UsageError
from lit_lora.files import require_new

__all__ = ["command"]


class _How(str, Enum):
    concatenate = "concatenate"
    linear = "linear"
    svd = "svd"


def command(
    sources: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run folders or adapter folders.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The adapter folder to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="A,B", help="A factor for each, such as 1,-0.5; 1 each when omitted.")
    ] = None,
    how: Annotated[
        _How,
        typer.Option(
            help="concatenate: the exact sum, its rank the sum of the ranks; svd: the nearest to it of --rank; linear: "
            "the factors summed, as PEFT's linear, which keeps the rank and adds cross terms."
        ),
    ] = _How.concatenate,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="The rank of --how svd.")] = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model, if not the one they name.")] = None,
) -> None:
    """Combine LoRA adapters of one base into a new adapter: several tasks at once, or one task less another.

    The result is in PEFT's format and is used as any adapter: chat, evaluate, merge. A negative weight takes away what
    an adapter learned. Adapters may have different ranks and targets.

    Examples:
        lit-lora combine out/french out/legal --out out/both

        lit-lora combine out/task out/toxic --weights 1,-0.5 --out out/clean

        lit-lora combine out/a out/b out/c --weights 0.5,0.3,0.2 --how svd --rank 16 --out out/mix
    """
    from lit_lora.merge import combine

    require_new(out)
    try:
        factors = [1.0] * len(sources) if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights}: expected numbers with commas between, such as 1,-0.5") from None
    result = combine(sources, factors, out, how=how.value, rank=rank, base=base)
    low, high = result.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    log.say(f"{len(sources)} adapters in {result.modules} modules, {ranks}, {result.lost:.2%} off the exact sum")
    log.say(f"wrote {out}; next: lit-lora chat {out}   or   lit-lora merge {out}")
