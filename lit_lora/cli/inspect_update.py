"""``lit-lora inspect-update``: the singular values of what finetuning changed."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_lora.merge import Change

__all__ = ["command"]

_ENERGY = 0.9
"""Share of the energy for which the table shows the rank."""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run or adapter folder, or a checkpoint with --base.")],
    base: options.Base = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PNG file to write; RUN/update.png if omitted.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every tensor and its singular values as JSON instead of the table.")
    ] = False,
) -> None:
    """Show how low-rank the update of a run is.

    For each changed matrix: the Frobenius norm of the change, also relative to the weight's; the stable rank, which is
    1 for one direction and n for n equally strong ones; and the rank that contains 90 % of the change's energy, the sum
    of its squared singular values. If that is close to the adapter's rank, a higher rank may learn more; if it is far
    below, a lower rank suffices. The plot has a line per layer. A fully finetuned model is compared with its base.

    Examples:
        lit-lora inspect-update out/quickstart

        lit-lora inspect-update out/full --plot spectrum.png

        lit-lora inspect-update checkpoints/tuned --base checkpoints/original --json
    """
    from lit_lora.merge import find_changes
    from lit_lora.merge.spectrum_plot import plot_spectra

    pending = find_changes(run, base=base)
    log.note(f"{pending.about}: {len(pending)} of {len(pending.base)} tensors changed")
    changes = list(log.progress(pending, total=len(pending), what="inspecting", unit="tensor"))
    if not any(change.norm for change in changes):
        log.warn(f"{run}: base and result are identical")
    if as_json:
        print(json.dumps({"about": pending.about, "tensors": [_record(change) for change in changes]}, indent=1))
    else:
        _show(changes)
    if not any(change.stable_rank for change in changes):
        log.note("no matrix changed, so there is nothing to plot")
        return
    target = plot or run / "update.png"
    plot_spectra(changes, target)
    log.note(f"wrote {target}")


def _record(change: Change) -> dict[str, object]:
    return {
        "name": change.name,
        "kind": change.kind,
        "layer": change.layer,
        "shape": change.shape,
        "norm": change.norm,
        "relative_norm": change.relative,
        "stable_rank": change.stable_rank,
        f"rank_{_ENERGY:.0%}".rstrip("%"): change.rank_holding(_ENERGY),
        "singular_values": change.singular_values,
    }


def _show(changes: Sequence[Change]) -> None:
    """Print one row per kind of module, and one for all."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)
    rows = [_row(kind, changes_of_kind) for kind, changes_of_kind in kinds.items()]
    if len(kinds) > 1:
        rows.append([*_row("all", changes)[:4], "", "", ""])
    columns = ["modules", "count", "norm", "relative norm", "stable rank", f"rank for {_ENERGY:.0%}", "maximum rank"]
    log.table("Changes", columns, rows, right=range(1, 7))


def _row(kind: str, changes: Sequence[Change]) -> list[str]:
    """The norm of all changes together, and the median and the range of their ranks."""
    norm = math.hypot(*(change.norm for change in changes))
    weight_norm = math.hypot(*(change.weight_norm for change in changes))
    relative = f"{norm / weight_norm:.3%}" if weight_norm else "-"

    stable_ranks = [change.stable_rank for change in changes if change.stable_rank is not None]
    stable = "-"
    if stable_ranks:
        stable = f"{statistics.median(stable_ranks):.2f} ({min(stable_ranks):.2f}-{max(stable_ranks):.2f})"

    energy_ranks = [rank for rank in (change.rank_holding(_ENERGY) for change in changes) if rank is not None]
    energy = "-"
    if energy_ranks:
        energy = f"{statistics.median_low(energy_ranks)} ({min(energy_ranks)}-{max(energy_ranks)})"

    maximum = max(len(change.singular_values) for change in changes)
    return [kind, str(len(changes)), f"{norm:.4g}", relative, stable, energy, str(maximum) if maximum else "-"]
