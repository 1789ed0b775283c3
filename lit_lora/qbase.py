"""The base of a run over a quantised model: quantised while loading, by the method where it chooses the codes.

Codes that a method chose are not those of the original weights, so the run keeps its base as ``base/``, beside the
adapter, which is nothing without it.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.checkpoint.load import empty_model, load_model
from lit_lora.checkpoint.save import save_quantized
from lit_lora.files import require_free_space
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft import Method, base_tensors, freeze, model_card
from lit_lora.quantize import stored_bytes
from lit_lora.recipe import QuantizedConfig, Run

__all__ = ["keep_base", "load_base"]

_BASE = "base"


def load_base(run: Run, config: QuantizedConfig, method: Method) -> CausalLM:
    """The quantised base with the method applied to it; a resumed run takes the base that it kept.

    Raises:
        InputError: The folder is broken.
        UsageError: It is quantised already, or the settings do not fit it.
    """
    kept, path = run.folder / _BASE, config.model.path
    if run.options.resume and (kept / "config.json").is_file():
        decomposer, quantize, path = None, None, kept
    else:
        quantize = config.quantize
        decomposer = method.decomposer(empty_model(ModelConfig.from_folder(path)), quantize)
    model = load_model(path, dtype=run.dtype, device=run.device, quantize=decomposer or quantize)
    freeze(model)
    method.apply(model)  # B = 0, so nothing changes yet
    if decomposer is not None:
        decomposer.fill(model)  # what the codes lost, B is not 0
    return model


def keep_base(run: Run, method: Method, model: CausalLM) -> Path:
    """The folder of the adapter's base: one in the run folder, written now, where the method chose the codes.

    Raises:
        DiskError: There is no room for it.
    """
    original, kept = run.config.model.path, run.folder / _BASE
    if not method.own_base:
        return original
    if not (run.options.resume and (kept / "config.json").is_file()):
        require_free_space(kept, stored_bytes(model), "the quantised base")
        card = model_card(
            f"{original.name}, quantised by {method.title}", base=str(original), method=method.about, adapter=False
        )
        save_quantized(model.config, base_tensors(model).stored(), kept, side_files=original, card=card)
    return kept
