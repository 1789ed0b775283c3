"""The quantized base of a run, quantized while it is loaded, by the method if the method chooses the codes.

Such codes are not those of the original weights. The adapter is useless without them, so the run saves its base as
``base/`` beside the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lit_lora import log
from lit_lora.checkpoint.load import AnyModel, decoder_linears, empty_model, load_model
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.checkpoint.save import save_quantized
from lit_lora.data.batches import collate
from lit_lora.files import require_free_space
from lit_lora.hf import read_config
from lit_lora.peft import Method, base_tensors, freeze, model_card
from lit_lora.peft.core.capabilities import ChoosesCodes, Decomposer, NeedsQuantizedBase, calibration_rows
from lit_lora.peft.core.passes import mean_squares
from lit_lora.peft.core.svd import Weights
from lit_lora.quantize import QuantizeConfig, stored_bytes
from lit_lora.recipe.data import RunData
from lit_lora.recipe.method import apply_method, passes
from lit_lora.recipe.run import Run

__all__ = ["for_quantized_base", "keep_base", "load_base"]

_BASE = "base"


def for_quantized_base(method: Method, quantize: QuantizeConfig) -> Method:
    """The method's settings for a base that is quantized in this way.

    Raises:
        UsageError: The method needs another base.
    """
    return method.for_quantized_base(quantize) if isinstance(method, NeedsQuantizedBase) else method


def load_base(run: Run, quantize: QuantizeConfig, method: Method, data: RunData) -> tuple[AnyModel, Method]:
    """The quantized base with the method applied to it. A resumed run loads the base that it saved.

    Args:
        run: The run.
        quantize: How the base is quantized.
        method: Its method, for this base.
        data: The rows, for a method that weighs errors by them or initializes from them.

    Returns:
        The model, and the method as applied; see :func:`lit_lora.recipe.method.apply_method`.

    Raises:
        InputError: The folder is broken.
        UsageError: The base is already quantized, or the settings do not fit it.
    """
    decomposer: Decomposer | None = None
    if _has_saved_base(run):
        model = load_model(run.folder / _BASE, dtype=run.dtype, device=run.device)  # already quantized
    else:
        if isinstance(method, ChoosesCodes):
            weights = _error_weights(run, data, calibration_rows(method))
            decomposer = method.decomposer(_skeleton(run), quantize, _weight_reader(run), weights)
        model = load_model(run.config.model.path, dtype=run.dtype, device=run.device, quantize=decomposer or quantize)

    freeze(model)
    applied = apply_method(run, method, model, data)  # the model still computes what the base does
    if decomposer is not None:
        decomposer.fill(model)  # the adapter starts from what the codes lost, so B is not 0
    return model, applied


def _has_saved_base(run: Run) -> bool:
    return run.options.resume and (run.folder / _BASE / "config.json").is_file()


def _skeleton(run: Run) -> AnyModel:
    """The base without values."""
    return empty_model(read_config(run.config.model.path))


def _weight_reader(run: Run) -> Callable[[str], Tensor]:
    """A function that reads a layer's weight by the layer's name, so that only one is in memory."""
    stored = StoredTensors(run.config.model.path)
    return lambda layer: stored.read_once(f"{layer}.weight").to(run.device)


def _error_weights(run: Run, data: RunData, rows: int) -> dict[str, Weights] | None:
    """How much errors matter, by layer: mean squared gradients of the loss of the first ``rows`` rows; ``None`` for 0.

    Needs memory for the model in full precision and the gradient of one layer at a time.
    """
    if rows == 0:
        return None
    rows = min(rows, len(data.prepared.train))
    model = load_model(run.config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    single_rows = (collate(data.prepared.train, [row]) for row in range(rows))
    progress = log.progress(passes(model, single_rows), total=rows, what="weighing", unit=" rows")

    squares = mean_squares(model, decoder_linears(model), progress)
    return {layer: Weights.of_squares(of_rows, of_columns) for layer, (of_rows, of_columns) in squares.items()}


def keep_base(run: Run, method: Method, model: AnyModel) -> Path:
    """The folder of the adapter's base. If the method chose the codes, that is ``base/``, which is written if missing.

    Raises:
        DiskError: The disk has too little space for it.
    """
    original = run.config.model.path
    if not isinstance(method, ChoosesCodes):
        return original

    folder = run.folder / _BASE
    if not _has_saved_base(run):
        require_free_space(folder, stored_bytes(model), "the quantized base")
        title = f"{original.name}, quantized by {method.title}"
        card = model_card(title, base=str(original), method=method.about, adapter=False)
        save_quantized(model.config, base_tensors(model).stored(), folder, side_files=original, card=card)
    return folder
