"""``lit-lora combine``: a weighted sum of LoRA adapters as one adapter."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.errors import UsageError
from lit_lora.files import require_new

__all__ = ["command"]


class _How(str, Enum):
    concatenate = "concatenate"
    linear = "linear"
    svd = "svd"


def command(
    sources: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run folders or adapter folders.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Adapter folder to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="A,B", help="Factor of each adapter, such as 1,-0.5; 1 if omitted.")
    ] = None,
    how: Annotated[
        _How,
        typer.Option(
            help="Way to add them. concatenate: exact, with the sum of the ranks; svd: the best approximation of rank "
            "--rank; linear: sum of the factors, like PEFT's linear, which keeps the rank but adds cross terms."
        ),
    ] = _How.concatenate,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="Rank of the result, for --how svd.")] = None,
    base: options.Base = None,
) -> None:
    """Combine LoRA adapters of one base into a new adapter: several tasks together, or one task minus another.

    The result is in PEFT's format and works like any adapter: chat, evaluate, merge. A negative weight removes what an
    adapter learned. Adapters may have different ranks and targets.

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
        raise UsageError(f"--weights {weights}: expected numbers separated by commas, such as 1,-0.5") from None
    result = combine(sources, factors, out, how=how.value, rank=rank, base=base)
    lowest, highest = result.ranks
    ranks = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
    log.say(f"{len(sources)} adapters, {result.modules} modules, {ranks}, {result.lost:.2%} off the exact sum")
    log.say(f"wrote {out}")
    log.say(f"next: lit-lora chat {out}, or lit-lora merge {out}")
