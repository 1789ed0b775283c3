"""The models of a comparison: from the folders that the user names to columns of the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_lora.errors import UsageError
from lit_lora.evaluate.compare import Candidate
from lit_lora.open.folders import find_folders, held_base
from lit_lora.quantize import QuantizeConfig

__all__ = ["find_candidates"]


def find_candidates(
    models: Sequence[Path],
    adapter: Path | None = None,
    *,
    shots: int = 0,
    as_trained: bool = True,
    skip_base: bool = False,
) -> list[Candidate]:
    """The columns of the table: each base once, with its shots, and the adapters and models made from it.

    Args:
        models: Model, run or adapter folders.
        adapter: An adapter for the only model.
        shots: Examples in the prompt of a second column for each base; none if 0.
        as_trained: Quantize a base as the adapter beside it was trained.
        skip_base: Leave out the bases.

    Raises:
        InputError: A folder contains no model.
        UsageError: An adapter was given with several models.
    """
    if adapter is not None and len(models) > 1:
        raise UsageError("--adapter needs exactly one MODEL", hint="give runs and adapters as further MODELs")
    candidates: list[Candidate] = []
    bases: set[tuple[Path, QuantizeConfig | None]] = set()
    for number, path in enumerate(models):
        base, adapter_folder = find_folders(path, adapter=adapter)
        quantize = None
        if as_trained and adapter_folder is not None:
            quantize = held_base(base, adapter_folder)
        skip = skip_base and adapter_folder is not None
        if not skip and (base.resolve(), quantize) not in bases:
            bases.add((base.resolve(), quantize))
            label = _base_label(base, adapter_folder, quantize, candidates)
            candidates.append(Candidate(label, base, quantize=quantize))
            # Of models without an adapter, only the first is a base; the others are results of finetuning.
            if shots and (adapter_folder is not None or number == 0):
                candidates.append(Candidate(f"{label} + {shots} shots", base, shots=shots, quantize=quantize))
        if adapter_folder is not None:
            candidates.append(Candidate(_label(adapter_folder, candidates), base, adapter_folder))
    return candidates


def _base_label(base: Path, adapter: Path | None, quantize: QuantizeConfig | None, others: list[Candidate]) -> str:
    """A base's label, which says how it differs from the checkpoint itself."""
    label = _label(base, others)
    if quantize is not None:
        return f"{label} in {quantize}"
    # A method that chooses the codes of its base saves them beside the adapter.
    if adapter is not None and base.resolve() == (adapter.parent / "base").resolve():
        return f"{adapter.resolve().parent.name}/{label}, the codes without their update"
    return label


def _label(folder: Path, others: list[Candidate]) -> str:
    """A short name that no other column has."""
    name = folder.resolve().name
    if folder.name in ("adapter", "model", "merged"):  # the same in every run
        name = f"{folder.parent.name}/{folder.name}"
    is_free = all(candidate.label != name for candidate in others)
    return name if is_free else str(folder)
