"""What would make a run fit: changes of its settings, the least costly first, each with the memory it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lit_lora.errors import UsageError
from lit_lora.estimate import Setup, estimate
from lit_lora.peft import methods
from lit_lora.peft.core.capabilities import calibration_rows
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.optim import optimizers

__all__ = ["Advice", "Change", "advise"]

# No change goes below these.
_FEWEST_TOKENS = 256
_LOWEST_RANK = 4
_SHORTEST_ROWS = 256


@dataclass(frozen=True)
class Change:
    """A setup with some settings changed."""

    overrides: tuple[str, ...]
    """The changed settings, as ``key=value``."""
    setup: Setup


@dataclass(frozen=True)
class Advice:
    """One change, or several together, and whether it fits."""

    overrides: tuple[str, ...]
    memory_bytes: int
    fits: bool


def advise(setup: Setup, budget_bytes: float) -> list[Advice]:
    """Try changes until one fits: each kind alone, the least costly first, then all kinds on top of each other.

    Returns:
        What was tried; the last one fits, unless none does.
    """
    tried: list[Advice] = []

    def fits(change: Change) -> bool:
        """Estimate a change and add it to what was tried."""
        try:
            total = estimate(change.setup).peak_bytes
        except UsageError:  # the change does not suit this model or method
            return False
        tried.append(Advice(change.overrides, total, total <= budget_bytes))
        return tried[-1].fits

    start = Change((), setup)
    for kind in _KINDS:
        steps = list(kind(start))
        if steps and fits(steps[-1]):  # the strongest step fits: go back to the mildest that does
            tried.pop()
            next(step for step in steps if fits(step))
            return tried

    together = start
    for kind in _KINDS:
        steps = list(kind(together))
        if steps:
            together = steps[-1]
            if fits(together):
                return tried
    return tried


# Each of the following yields changes of one kind, from the mildest to the strongest; the docstring names the cost.


def _smaller_micro_batches(change: Change) -> Iterator[Change]:
    """Some time; a micro-batch holds at least one row."""
    longest = int(change.setup.rows.token_counts.max())
    tokens = change.setup.train.micro_batch_tokens
    while tokens > max(longest, _FEWEST_TOKENS):
        tokens = max(tokens // 2, min(longest, tokens), _FEWEST_TOKENS)
        yield _train(change, micro_batch_tokens=tokens)


def _checkpointing(change: Change) -> Iterator[Change]:
    """A fifth to a third more time, for the same results."""
    levels = ["none", "selective", "full"]
    for level in levels[levels.index(change.setup.train.activation_checkpointing) + 1 :]:
        yield _train(change, activation_checkpointing=level)


def _smaller_optimizer_state(change: Change) -> Iterator[Change]:
    """A small rounding error in the optimizer state."""
    optimizer = change.setup.optimizer
    name = optimizer.smaller_state
    if name is not None:
        settings = optimizers()[name].model_validate(optimizer.model_dump(exclude={"name"}))
        yield _with(change, f"optimizer.name={name}", optimizer=settings)


def _without_calibration(change: Change) -> Iterator[Change]:
    """A quantized base a little further from the original weights."""
    peft = change.setup.peft
    if calibration_rows(peft):
        yield _with(change, "peft.fisher_rows=0", peft=peft.model_copy(update={"fisher_rows": 0}))


def _fewer_bits(change: Change) -> Iterator[Change]:
    """Fewer trainable parameters, and a base with a small quantization error."""
    setup = change.setup
    method = ""
    if setup.peft.kind == "full":
        lora = methods("mergeable")["lora"]
        method = " peft.name=lora"
        setup = replace(setup, peft=lora())
        yield _with(replace(change, setup=setup), f"recipe=lora{method}")
    if setup.peft.kind == "mergeable" and setup.quantize is None:
        yield _with(replace(change, setup=setup), f"recipe=qlora{method}", quantize=QuantizeConfig())


def _lower_rank(change: Change) -> Iterator[Change]:
    """Less capacity to learn."""
    peft = change.setup.peft
    rank = getattr(peft, "rank", 0)
    while rank > _LOWEST_RANK:
        rank = max(rank // 2, _LOWEST_RANK)
        yield _with(change, f"peft.rank={rank}", peft=peft.model_copy(update={"rank": rank}))


def _shorter_rows(change: Change) -> Iterator[Change]:
    """The ends of long rows are not seen."""
    rows = change.setup.rows
    longest = int(rows.token_counts.max())
    while longest > _SHORTEST_ROWS:
        longest = max(longest // 2, _SHORTEST_ROWS)
        shorter = _with(change, f"data.max_seq_length={longest}", rows=rows.cut(longest))
        if change.setup.train.micro_batch_tokens > longest:
            shorter = _train(shorter, micro_batch_tokens=longest)
        yield shorter


_KINDS: tuple[Callable[[Change], Iterator[Change]], ...] = (
    _smaller_micro_batches,
    _checkpointing,
    _smaller_optimizer_state,
    _without_calibration,
    _fewer_bits,
    _lower_rank,
    _shorter_rows,
)


def _train(change: Change, **settings: Any) -> Change:
    """With one more setting of the section ``train``."""
    ((key, value),) = settings.items()
    return _with(change, f"train.{key}={value}", train=change.setup.train.model_copy(update=settings))


def _with(change: Change, override: str, **fields: Any) -> Change:
    """With one more setting, instead of an earlier one with the same key."""
    key = override.partition("=")[0]
    others = tuple(other for other in change.overrides if other.partition("=")[0] != key)
    return Change((*others, override), replace(change.setup, **fields))
