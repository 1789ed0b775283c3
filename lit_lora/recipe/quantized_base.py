"""The base of a run over a quantised model: quantised while loading, by the method where it chooses the codes.

Codes that a method chose are not those of the original weights, so the run keeps its base as ``base/``, beside the
adapter, which is nothing without it.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora import log
from lit_lora.checkpoint.load import decoder_linears, empty_model, load_model
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.checkpoint.save import save_quantized
from lit_lora.data.batches import collate
from lit_lora.files import require_free_space
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft import Method, base_tensors, freeze, model_card
from lit_lora.peft.core.capabilities import ChoosesCodes, Decomposer, NeedsQuantizedBase, calibration_rows
from lit_lora.peft.core.passes import mean_squares
from lit_lora.peft.core.svd import Weights
from lit_lora.quantize import QuantizeConfig, stored_bytes
from lit_lora.recipe import Run, RunData
from lit_lora.recipe.method import apply_method, passes

__all__ = ["for_quantized_base", "keep_base", "load_base"]

_BASE = "base"


def for_quantized_base(method: Method, quantize: QuantizeConfig) -> Method:
    """The settings as they are over a base quantized so.

    Raises:
        UsageError: The method needs another base.
    """
    return method.for_quantized_base(quantize) if isinstance(method, NeedsQuantizedBase) else method


def load_base(run: Run, quantize: QuantizeConfig, method: Method, data: RunData) -> tuple[CausalLM, Method]:
    """The quantised base with the method applied to it; a resumed run takes the base that it kept.

    Args:
        run: The run.
        quantize: How the base is quantized.
        method: Its method, over this base.
        data: The rows, for a method that weighs errors by them or starts from them.

    Returns:
        The model, and the method as it is applied; see :func:`lit_lora.recipe.method.apply_method`.

    Raises:
        InputError: The folder is broken.
        UsageError: It is quantised already, or the settings do not fit it.
    """
    kept, path = run.folder / _BASE, run.config.model.path
    decomposer: Decomposer | None = None
    if run.options.resume and (kept / "config.json").is_file():
        model = load_model(kept, dtype=run.dtype, device=run.device)  # quantized already
    else:
        if isinstance(method, ChoosesCodes):
            count = min(calibration_rows(method), len(data.prepared.train))
            weights = _weights(run, data, count) if count else None
            stored, skeleton = StoredTensors(path), empty_model(ModelConfig.from_folder(path))
            decomposer = method.decomposer(
                skeleton, quantize, lambda name: stored.read_once(f"{name}.weight").to(run.device), weights
            )
        model = load_model(path, dtype=run.dtype, device=run.device, quantize=decomposer or quantize)
    freeze(model)
    applied = apply_method(run, method, model, data)  # nothing that the model computes changes yet
    if decomposer is not None:
        decomposer.fill(model)  # what the codes lost, B is not 0
    return model, applied


def _weights(run: Run, data: RunData, count: int) -> dict[str, Weights]:
    """How much errors matter, by layer: means of the squared gradients of the loss of the first ``count`` rows.

    Takes the model in full, and one layer's gradient at a time.
    """
    model = load_model(run.config.model.path, dtype=run.dtype, device=run.device)
    freeze(model)
    one_by_one = (collate(data.prepared.train, [number]) for number in range(count))
    looks = log.progress(passes(model, one_by_one), total=count, what="weighing", unit=" rows")
    means = mean_squares(model, decoder_linears(model), looks)
    return {name: Weights.of_squares(*both) for name, both in means.items()}


def keep_base(run: Run, method: Method, model: CausalLM) -> Path:
    """The folder of the adapter's base: one in the run folder, written now, where the method chose the codes.

    Raises:
        DiskError: There is no room for it.
    """
    original, kept = run.config.model.path, run.folder / _BASE
    if not isinstance(method, ChoosesCodes):
        return original
    if not (run.options.resume and (kept / "config.json").is_file()):
        require_free_space(kept, stored_bytes(model), "the quantised base")
        card = model_card(
            f"{original.name}, quantised by {method.title}", base=str(original), method=method.about, adapter=False
        )
        save_quantized(model.config, base_tensors(model).stored(), kept, side_files=original, card=card)
    return kept
