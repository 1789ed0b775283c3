"""How low-rank a change of weights was: the singular values of ``ΔW`` for every tensor that a run changed.

Those of ``ΔW = s B A`` are the singular values of an R x R core: with ``B = Q_1 R_1`` and ``A^T = Q_2 R_2`` by QR,
``ΔW = Q_1 (s R_1 R_2^T) Q_2^T``, where ``Q_1`` and ``Q_2`` have orthonormal columns. Those of any other change are the
square roots of the eigenvalues of its smaller Gram matrix, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_lora.errors import InputError
from lit_lora.merge.plan import BaseTensors, find_places, plan_merge
from lit_lora.open.folders import find_base
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.base_tensors import Base
from lit_lora.peft.core.targeted import layer_number
from lit_lora.peft.core.updates import LowRank, Replace, Update
from lit_lora.peft.files.adapter import read_adapter

__all__ = ["Change", "Changes", "find_changes", "singular_values"]


@dataclass(frozen=True)
class Change:
    """What a run changed in one tensor."""

    name: str
    """Name of the base's tensor."""
    shape: tuple[int, ...]
    """Shape of the change."""
    norm: float
    """Frobenius norm of the change."""
    weight_norm: float
    """Frobenius norm of the base's tensor."""
    singular_values: tuple[float, ...]
    """Singular values of the change, descending, as many as the update can have; none for a vector."""

    @property
    def kind(self) -> str:
        """The last part of the module's name, such as ``q_proj``; ``q_proj.bias`` for its bias."""
        parts = self.name.removesuffix(".weight").split(".")
        return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer; ``None`` outside of them."""
        return layer_number(self.name)

    @property
    def relative(self) -> float | None:
        """The change's norm relative to the weight's; ``None`` for a weight of zeros."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def stable_rank(self) -> float | None:
        """Squared Frobenius norm over squared largest singular value: 1 for one direction, ``n`` for ``n`` equal ones.

        ``None`` for a vector, and where nothing changed.
        """
        if not self.singular_values or not self.singular_values[0]:
            return None
        largest = self.singular_values[0]
        return sum((value / largest) ** 2 for value in self.singular_values)

    def rank_holding(self, share: float) -> int | None:
        """The smallest rank whose nearest matrix holds ``share`` of the change's squared norm, or ``None``."""
        if self.stable_rank is None:
            return None
        energy = torch.tensor(self.singular_values, dtype=torch.float64).square().cumsum(0)
        # A little less than the share, so that rounding in the sum does not ask for one more rank.
        return 1 + int((energy < share * energy[-1] * (1 - 1e-12)).sum())


@dataclass(frozen=True)
class Changes:
    """Everything that a run changed, in the order of its files."""

    about: str
    """Which run, compared with which base."""
    base: Base
    """The base's tensors."""
    updates: Mapping[str, Update]
    """By tensor; a checkpoint's tensors that equal the base's are not among them."""

    def __iter__(self) -> Iterator[Change]:
        """Measure one tensor after the other, with one in memory at a time.

        Raises:
            InputError: A tensor has values that are not finite.
        """
        for name, update in self.updates.items():
            yield _measure(name, update, _as_loaded(self.base[name], update))

    def __len__(self) -> int:
        return len(self.updates)


def find_changes(run: Path, *, base: Path | None = None) -> Changes:
    """What ``run`` changed in its base: by its adapter, or tensor by tensor if it trained the model itself.

    Args:
        run: A run folder, an adapter folder, or a checkpoint to compare with ``base``.
        base: The base model, if it is not the one that the run names.

    Raises:
        InputError: There is neither an adapter nor a model, they do not belong together, or the adapter does not change
            weights.
        UsageError: The base is not on this machine.
    """
    run = Path(run)
    tuned = next((folder for folder in (run / "model", run) if (folder / "config.json").is_file()), None)
    if tuned is not None and not (run / "adapter").is_dir():
        return _of_model(run, tuned, base)
    places = find_places(run, base=base)
    method = read_adapter(places.adapter).config
    if isinstance(method, AddedMethod):
        raise InputError(
            f"{places.adapter}: {method.about} computes beside the base's weights, so no weight has a change to inspect"
        )
    plan = plan_merge(places)
    updates = {name: plan.updates[name] for name in plan.trained if name in plan.updates}
    if updates.get(plan.base.head) is updates.get(plan.base.embedding):
        updates.pop(plan.base.head, None)  # one tensor under two names
    return Changes(f"{places.adapter} on {places.base}", plan.trained, updates)


def _of_model(run: Path, tuned: Path, base: Path | None) -> Changes:
    """The change from a base to a model of the same shapes.

    Raises:
        InputError: Their shapes differ.
        UsageError: The base is not known.
    """
    base = base or find_base(run, hint="give it with --base FOLDER")
    before, after = (BaseTensors(folder) for folder in (base, tuned))
    hint = "give the base that this model was trained from with --base"
    updates: dict[str, Update] = {}
    for name in after.stored:
        shape = after.shape(name)
        if name not in before:
            raise InputError(f"{tuned}: {base} has no tensor {name}", hint=hint)
        if not _fits(before, name, shape):
            raise InputError(
                f"{tuned}: {name} has shape {list(shape)}, but {list(before.shape(name))} in {base}", hint=hint
            )
        update = Replace(after[name])
        if not torch.equal(update.tensor, _as_loaded(before[name], update)):
            updates[name] = update
    return Changes(f"{tuned} against {base}", before, updates)


def _as_loaded(weight: Tensor, update: Update) -> Tensor:
    """The base's tensor as it was when training began: rounding it to a trained tensor's dtype is not a change."""
    return weight.to(update.tensor) if isinstance(update, Replace) else weight


def _fits(base: BaseTensors, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can have been trained from the base's: of the same shape, or with tokens added."""
    before = base.shape(name)
    grown = name in (base.embedding, base.head) and shape[0] > before[0]
    return shape == before or (grown and shape[1:] == before[1:])


def _measure(name: str, update: Update, weight: Tensor) -> Change:
    shape = (update.rows(weight.shape[0]), *weight.shape[1:])
    if len(shape) == 1:
        values = torch.empty(0)
        norm = update.norm(weight)
    else:
        values = singular_values(update, weight)
        norm = float(values.norm())
    if not math.isfinite(norm):
        raise InputError(f"{name}: the change has NaN or infinite values")
    return Change(name, shape, norm, float(weight.float().norm()), tuple(values.tolist()))


def singular_values(update: Update, weight: Tensor) -> Tensor:
    """Singular values of what ``update`` does to ``weight``, descending float64; NaN where the change is not finite.

    Args:
        update: The update of a matrix; a tensor of more dimensions counts as a matrix (rows, everything else).
        weight: The base's tensor, (rows, columns); the update may add rows.
    """
    if isinstance(update, LowRank):
        left = torch.linalg.qr(update.left.double(), mode="r").R  # (min(rows, R), R)
        right = torch.linalg.qr(update.right.mT.double(), mode="r").R
        values: Tensor = torch.linalg.svdvals(left @ right.mT)
        # A stack of matrices counts as one matrix with the others as its diagonal blocks, which has all their values.
        return values.flatten().sort(descending=True).values * abs(update.scaling)

    before = weight.flatten(1)
    after = update.apply(weight, 0, update.rows(weight.shape[0])).flatten(1)
    change = torch.cat([after[: len(before)] - before, after[len(before) :]])  # an added row is a change from 0
    if change.shape[0] < change.shape[1]:  # the Gram matrix of the shorter side
        change = change.T
    gram = torch.zeros(change.shape[1], change.shape[1], dtype=torch.float64)
    for rows in torch.split(change, 4096):  # float64 of some rows at a time
        gram.addmm_(rows.T.double(), rows.double())
    if not torch.isfinite(gram).all():
        return torch.full((len(gram),), torch.nan, dtype=torch.float64)
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp(min=0).sqrt()
