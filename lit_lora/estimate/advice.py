"""What would make a run fit: changes in the order of what they cost, each with the memory that it leads to."""

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

_FEWEST_TOKENS, _LOWEST_RANK, _SHORTEST_ROWS = 256, 4, 256


@dataclass(frozen=True)
class Change:
    """A setup with other settings."""

    overrides: tuple[str, ...]
    """The settings, as ``key=value``."""
    setup: Setup


@dataclass(frozen=True)
class Advice:
    """One change, or several together, that was tried."""

    overrides: tuple[str, ...]
    memory_bytes: int
    fits: bool


def advise(setup: Setup, budget_bytes: float) -> list[Advice]:
    """Try changes until one fits: each kind alone, the cheapest first, then all kinds one on top of the other.

    Returns:
        What was tried; the last one fits, unless nothing does.
    """
    tried: list[Advice] = []

    def fits(change: Change) -> bool:
        try:
            total = estimate(change.setup).peak_bytes
        except UsageError:  # the change does not go with this model or method
            return False
        tried.append(Advice(change.overrides, total, total <= budget_bytes))
        return tried[-1].fits

    start = Change((), setup)
    for kind in _KINDS:
        steps = list(kind(start))
        if steps and fits(steps[-1]):  # the strongest does: find the mildest
            tried.pop()
            next(step for step in steps if fits(step))
            return tried
    together = start
    for kind in _KINDS:
        for step in [*kind(together)][-1:]:
            if fits(step):
                return tried
            together = step
    return tried


def _smaller_micro_batches(change: Change) -> Iterator[Change]:
    """Nothing but some time; a micro-batch holds at least one row."""
    train, longest = change.setup.train, int(change.setup.rows.token_counts.max())
    tokens = train.micro_batch_tokens
    while tokens > max(longest, _FEWEST_TOKENS):
        tokens = max(tokens // 2, min(longest, tokens), _FEWEST_TOKENS)
        yield _train(change, micro_batch_tokens=tokens)


def _checkpointing(change: Change) -> Iterator[Change]:
    """A fifth to a third more time, the same results."""
    levels = ["none", "selective", "full"]
    for level in levels[levels.index(change.setup.train.activation_checkpointing) + 1 :]:
        yield _train(change, activation_checkpointing=level)


def _smaller_optimizer_state(change: Change) -> Iterator[Change]:
    """Nearly the same results."""
    optimizer = change.setup.optimizer
    name = optimizer.smaller_state
    if name is not None:
        settings = optimizers()[name].model_validate(optimizer.model_dump(exclude={"name"}))
        yield _with(change, f"optimizer.name={name}", optimizer=settings)


def _without_weighing(change: Change) -> Iterator[Change]:
    """A start a little further from the original weights."""
    peft = change.setup.peft
    if calibration_rows(peft):
        yield _with(change, "peft.fisher_rows=0", peft=peft.model_copy(update={"fisher_rows": 0}))


def _fewer_bits(change: Change) -> Iterator[Change]:
    """A base that is near the 16-bit one, and little of it that trains."""
    setup, lora = change.setup, methods("mergeable")["lora"]
    name = ""
    if setup.peft.kind == "full":
        name, setup = " peft.name=lora", replace(setup, peft=lora())
        yield _with(replace(change, setup=setup), f"recipe=lora{name}")
    if setup.peft.kind == "mergeable" and setup.quantize is None:
        yield _with(replace(change, setup=setup), f"recipe=qlora{name}", quantize=QuantizeConfig())


def _lower_rank(change: Change) -> Iterator[Change]:
    """Less is learned."""
    peft, rank = change.setup.peft, getattr(change.setup.peft, "rank", 0)
    while rank > _LOWEST_RANK:
        rank = max(rank // 2, _LOWEST_RANK)
        yield _with(change, f"peft.rank={rank}", peft=peft.model_copy(update={"rank": rank}))


def _shorter_rows(change: Change) -> Iterator[Change]:
    """Less is seen."""
    rows = change.setup.rows
    longest = int(rows.token_counts.max())
    while longest > _SHORTEST_ROWS:
        longest = max(longest // 2, _SHORTEST_ROWS)
        shorter = _with(change, f"data.max_seq_length={longest}", rows=rows.cut(longest))
        tokens = change.setup.train.micro_batch_tokens
        yield _train(shorter, micro_batch_tokens=longest) if tokens > longest else shorter


_KINDS: tuple[Callable[[Change], Iterator[Change]], ...] = (
    _smaller_micro_batches,
    _checkpointing,
    _smaller_optimizer_state,
    _without_weighing,
    _fewer_bits,
    _lower_rank,
    _shorter_rows,
)


def _train(change: Change, **settings: Any) -> Change:
    ((key, value),) = settings.items()
    return _with(change, f"train.{key}={value}", train=change.setup.train.model_copy(update=settings))


def _with(change: Change, override: str, **fields: Any) -> Change:
    """With one more setting, which replaces a former one of its key."""
    key = override.partition("=")[0]
    kept = tuple(former for former in change.overrides if former.partition("=")[0] != key)
    return Change((*kept, override), replace(change.setup, **fields))
