"""A method put on its model at the start of a run, with a look at the rows where it asks for one, and its last word.

What it made of the rows is kept in the run's ``start/``, so that a resumed run begins with the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count

from lit_lora import IGNORE_INDEX, log
from lit_lora.data.batches import Batches, MicroBatch
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM
from lit_lora.peft import Method, count_parameters
from lit_lora.peft.core.capabilities import FinalizesAfterTraining, InitializesFromData
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.files.frozen_state import kept_method
from lit_lora.recipe import Run, RunData
from lit_lora.train.loss import backward
from lit_lora.train.validation import validation_loss

__all__ = ["apply_method", "passes", "finalize"]


def apply_method(run: Run, method: Method, model: CausalLM, data: RunData) -> Method:
    """Change ``model`` in place into one that trains by ``method``.

    A dry run leaves the rows alone: its start has the right size, and other values.

    Args:
        run: The run.
        method: Its method.
        model: Frozen.
        data: The rows.

    Returns:
        The method as it is now: settings by which ``apply`` gives these modules again.

    Raises:
        InputError: What a run to resume has kept is broken.
        UsageError: The settings do not fit the model or the rows, or validation rows are needed and there are none.
    """
    if _finalizing(method) and not data.validation:
        raise UsageError(
            "peft.search: selections are scored on validation rows, and there are none",
            hint="data.validation=0.1 holds a tenth of the rows out",
        )
    kept = kept_method(run.folder / "start", method) if run.options.resume else None
    if kept is None and not run.options.dry_run and isinstance(method, InitializesFromData) and method.rows_for_init:
        seen = list(first_batches(data.batches, method.rows_for_init))
        looks = log.progress(passes(model, seen), total=len(seen), what="looking", unit="batch")
        return method.init_from_data(model, looks)
    method = method if kept is None else kept
    method.apply(model)
    return method


def finalize(method: Method, model: CausalLM, data: RunData) -> Method:
    """Choose in place what training has left open, by the validation loss; see :class:`FinalizesAfterTraining`.

    Returns:
        The method as it is now.
    """
    open_method = _finalizing(method)
    if open_method is None:
        return method
    model.eval()
    before = count_parameters(model).trainable
    finalized = open_method.finalize(model, partial(validation_loss, model, data.validation))
    now, loss = count_parameters(model).trainable, validation_loss(model, data.validation)
    log.note(f"chose forms: {now:,} of {before:,} trained numbers are kept, validation loss {loss:.4f}")
    return finalized


def _finalizing(method: Method) -> FinalizesAfterTraining | None:
    """The method, if it leaves something open in training."""
    return method if isinstance(method, FinalizesAfterTraining) and method.finalizes else None


def first_batches(batches: Batches, rows: int) -> Iterator[MicroBatch]:
    """The micro-batches of the first steps, until so many rows, or all, have been in them."""
    seen = 0
    for step in count():
        for batch in batches.step(step):
            if seen >= min(rows, len(batches.rows)):
                return
            seen += len(batch.rows)
            yield batch


def passes(model: CausalLM, batches: Iterable[MicroBatch]) -> Iterator[Pass]:
    """The micro-batches for a method, which knows neither of data nor of the loss."""
    for batch in batches:
        yield Pass(batch.labels[0] != IGNORE_INDEX, partial(_run, model, batch))


def _run(model: CausalLM, batch: MicroBatch) -> None:
    backward(model, batch, 1.0)
