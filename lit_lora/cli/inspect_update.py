"""``lit-lora inspect-update``: what a run changed in its base, as singular values."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_lora.merge import Change

__all__ = ["command"]

_SHARE = 0.9


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, an adapter folder, or a checkpoint with --base.")
    ],
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model, if not the one it names.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The PNG to write; RUN/update.png when omitted.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every tensor with its singular values as JSON in place of the table.")
    ] = False,
) -> None:
    """Show how low-rank the change was that a run made.

    Of each changed matrix: the Frobenius norm of the change, also relative to the weight's; the stable rank, which is
    1 for one direction and n for n equally strong ones; and the rank that holds 90 % of the change's energy, the sum
    of its squared singular values. Near the rank of the adapter, more rank may learn more; far below it, less rank
    does too. The plot has a line for each layer. A run that trained the model itself is compared with its base.

    Examples:
        lit-lora inspect-update out/quickstart

        lit-lora inspect-update out/full --plot spectrum.png

        lit-lora inspect-update checkpoints/tuned --base checkpoints/original --json
    """
    from lit_lora.merge import find_changes
    from lit_lora.merge.spectrum_plot import plot_spectra

    found = find_changes(run, base=base)
    log.note(f"{found.about}: {len(found)} of {len(found.base)} tensors change")
    changes = list(log.progress(found, total=len(found), what="inspecting", unit="tensor"))
    if not any(change.norm for change in changes):
        log.warn(f"{run}: nothing changed: base and result are the same")
    if as_json:
        print(json.dumps({"about": found.about, "tensors": [_record(change) for change in changes]}, indent=1))
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
        f"rank_{_SHARE:.0%}".rstrip("%"): change.rank_holding(_SHARE),
        "singular_values": change.singular_values,
    }


def _show(changes: Sequence[Change]) -> None:
    """One line per kind of module, and one for all."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)
    rows = [_row(kind, found) for kind, found in kinds.items()]
    if len(kinds) > 1:
        rows.append([*_row("all", changes)[:4], "", "", ""])
    columns = ["modules", "count", "norm", "of the weights", "stable rank", f"rank of {_SHARE:.0%}", "rank at most"]
    log.table("What changed", columns, rows, right=range(1, 7))


def _row(kind: str, changes: Sequence[Change]) -> list[str]:
    """Norms of all together; of the ranks the median, and from least to most."""
    norm, weights = (math.hypot(*values) for values in zip(*((c.norm, c.weight_norm) for c in changes), strict=True))
    stable = [change.stable_rank for change in changes if change.stable_rank is not None]
    ranks = [rank for change in changes if (rank := change.rank_holding(_SHARE)) is not None]
    most = max(len(change.singular_values) for change in changes)
    return [
        kind,
        str(len(changes)),
        f"{norm:.4g}",
        f"{norm / weights:.3%}" if weights else "-",
        f"{statistics.median(stable):.2f} ({min(stable):.2f}-{max(stable):.2f})" if stable else "-",
        f"{statistics.median_low(ranks)} ({min(ranks)}-{max(ranks)})" if ranks else "-",
        str(most) if most else "-",
    ]
