"""Apply a method to the model at the start of a run, initialize it from data if it asks for that, and finalize it.

Ranks that the data has chosen are saved in the run's ``start/``, so that a resumed run has the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count

from lit_lora import IGNORE_INDEX, log
from lit_lora.checkpoint.load import AnyModel
from lit_lora.data.batches import Batches, MicroBatch
from lit_lora.errors import UsageError
from lit_lora.peft import Method, count_parameters
from lit_lora.peft.core.adapter_method import AdapterMethod
from lit_lora.peft.core.capabilities import FinalizesAfterTraining, InitializesFromData
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.files.frozen_state import kept_method
from lit_lora.peft.files.init_adapter import start_from
from lit_lora.recipe.data import RunData
from lit_lora.recipe.run import Run
from lit_lora.train.loss import backward
from lit_lora.train.validation import validation_loss

__all__ = ["apply_method", "finalize", "passes"]


def apply_method(run: Run, method: Method, model: AnyModel, data: RunData) -> Method:
    """Change ``model`` in place into one that trains by ``method``.

    A dry run does not initialize from data: its modules have the right shapes and other values.

    Args:
        run: The run.
        method: Its method.
        model: The frozen base.
        data: The rows.

    Returns:
        The method as applied: settings whose ``apply`` gives modules of these shapes.

    Raises:
        InputError: What the run to resume has saved is broken.
        UsageError: The settings do not fit the model or the rows, or there are no validation rows and some are needed.
    """
    if _finalizing(method) and not data.validation:
        raise UsageError(
            "peft.search: selections are scored on validation rows, and there are none",
            hint="data.validation=0.1 holds out a tenth of the rows",
        )
    if isinstance(method, AdapterMethod) and run.init_adapter is not None:
        _require_named_tokens(run, model)
        start_from(model, method, run.init_adapter, run.config.model.path)
        return method
    saved = kept_method(run.folder / "start", method) if run.options.resume else None
    if saved is not None:  # looking at the data again could choose other ranks
        method = saved
    elif isinstance(method, InitializesFromData) and method.rows_for_init and not run.options.dry_run:
        return _init_from_data(method, model, data)
    method.apply(model)
    return method


def _require_named_tokens(run: Run, model: AnyModel) -> None:
    """Check that tokens which the adapter to start from has added can be added here too.

    Raises:
        UsageError: Their texts are not given, so the tokenizer would not know them.
    """
    tokens = getattr(run.config.peft, "trainable_tokens", [])
    if any(isinstance(token, int) and token >= model.config.vocab_size for token in tokens):
        raise UsageError(
            f"{run.init_adapter}: trains tokens that {run.config.model.path} lacks",
            hint="name them as the run did that added them: 'peft.trainable_tokens=[\"<token>\", …]'",
        )


def _init_from_data(method: InitializesFromData, model: AnyModel, data: RunData) -> Method:
    batches = list(first_batches(data.batches, method.rows_for_init))
    progress = log.progress(passes(model, batches), total=len(batches), what="initializing", unit="batch")
    return method.init_from_data(model, progress)


def finalize(method: Method, model: AnyModel, data: RunData) -> Method:
    """Choose, in place, what training has left open, by the validation loss; see :class:`FinalizesAfterTraining`.

    Returns:
        The method as it is now.
    """
    open_method = _finalizing(method)
    if open_method is None:
        return method

    model.eval()
    before = count_parameters(model).trainable
    finalized = open_method.finalize(model, partial(validation_loss, model, data.validation))
    after = count_parameters(model).trainable
    loss = validation_loss(model, data.validation)
    log.note(f"chose forms: {after:,} of {before:,} trainable parameters remain, validation loss {loss:.4f}")
    return finalized


def _finalizing(method: Method) -> FinalizesAfterTraining | None:
    """The method, if it leaves something open in training."""
    return method if isinstance(method, FinalizesAfterTraining) and method.finalizes else None


def first_batches(batches: Batches, rows: int) -> Iterator[MicroBatch]:
    """The micro-batches of the first steps, until they contain ``rows`` rows, or all rows if there are fewer."""
    needed = min(rows, len(batches.rows))
    seen = 0
    for step in count():
        for batch in batches.step(step):
            if seen >= needed:
                return
            seen += len(batch.rows)
            yield batch


def passes(model: AnyModel, batches: Iterable[MicroBatch]) -> Iterator[Pass]:
    """The micro-batches in a form for methods, which know neither data nor loss."""
    for batch in batches:
        yield Pass(batch.labels[0] != IGNORE_INDEX, partial(_run, model, batch))


def _run(model: AnyModel, batch: MicroBatch) -> None:
    backward(model, batch, 1.0)
