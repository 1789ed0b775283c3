"""Open a decoder for use, from a checkpoint, a run folder or an adapter folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lit_lora.checkpoint.load import AnyModel, load_model
from lit_lora.hf import HostedLM, read_config
from lit_lora.open.folders import find_folders, held_base
from lit_lora.peft import load_adapter
from lit_lora.peft.adapters import bottleneck
from lit_lora.quantize import QuantizeConfig, found_config
from lit_lora.quantize.config import parse
from lit_lora.tokenizer import Tokenizer, has_vocabulary
from lit_lora.train.device import choose_device, choose_dtype, reuse_memory

__all__ = ["OpenedModel", "load_tokenizer", "open_model"]


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready to use."""

    model: AnyModel
    """The base model, with the adapter in it if there is one."""
    tokenizer: Tokenizer
    """The adapter's, if it has added tokens; otherwise the base's."""
    description: str
    """One line: base, adapter, quantization, dtype and device."""
    base: Path
    """The checkpoint folder."""
    adapter: Path | None
    """The adapter folder, if there is one."""


def open_model(
    model: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | QuantizeConfig | None = None,
    drop_layers: int = 0,
) -> OpenedModel:
    """Open a model for use.

    Args:
        model: A checkpoint (base, merged or fully finetuned), a run or an adapter; the last two name their base.
        adapter: An adapter folder, or a run folder with one, to use instead of the run's.
        dtype: ``fp32``, ``bf16`` or ``fp16``. By default, the fastest on the device that does not lose the update of
            a merged model.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        quantize: Quantization of the base: settings, a name such as ``nf4-dq``, or ``none``. By default, the one that
            the adapter was trained with, or the folder's.
        drop_layers: Remove the bottleneck adapters of this many first layers; has no effect without an adapter.

    Raises:
        InputError: A folder contains no model or adapter, or the adapter does not fit the base.
        UsageError: The base of a run or adapter is not on this machine, the device or dtype is not available, the
            base is already quantized in another way, or the adapter has no layers to drop.
    """
    base, adapter_folder = find_folders(model, adapter=adapter)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device) if dtype else _fastest_dtype(base, torch_device)
    quantization = _quantization(quantize, base, adapter_folder)
    reuse_memory()
    decoder = load_model(base, dtype=torch_dtype, device=torch_device, quantize=quantization)

    about = [str(base)]
    if adapter_folder is not None:
        about.append(f"adapter {load_adapter(decoder, adapter_folder)}")
        if drop_layers:
            bottleneck.drop_layers(decoder, drop_layers)
            layers = "layer" if drop_layers == 1 else f"{drop_layers} layers"
            about.append(f"without adapters in the first {layers}")
    if isinstance(decoder, HostedLM):
        about.append(decoder.description)
    stored_as = found_config(decoder)
    if stored_as is not None:
        about.append(str(stored_as))
    about.append(f"{str(torch_dtype).removeprefix('torch.')} on {torch_device}")

    tokenizer = load_tokenizer(base, adapter_folder)
    return OpenedModel(decoder, tokenizer, ", ".join(about), base, adapter_folder)


def load_tokenizer(base: Path, adapter: Path | None) -> Tokenizer:
    """The adapter's tokenizer, which it has if it has added tokens or chosen a template, or else the base's.

    Raises:
        InputError: The tokenizer cannot be read, or it is of another model.
    """
    if adapter is not None and has_vocabulary(adapter):
        return Tokenizer.load(adapter)
    return Tokenizer.load(base)


def _fastest_dtype(base: Path, device: torch.device) -> torch.dtype:
    """The dtype that the device computes fastest, unless it would round off the update of a merged model."""
    fastest = choose_dtype("auto", device)
    config = read_config(base)
    if not config.keeps_dtype:
        return fastest
    stored: torch.dtype = getattr(torch, config.dtype)
    if torch.finfo(stored).eps >= torch.finfo(fastest).eps:
        return fastest
    return torch.float32 if device.type == "cpu" else stored  # float16 is slow on a CPU


def _quantization(requested: str | QuantizeConfig | None, base: Path, adapter: Path | None) -> QuantizeConfig | None:
    """How to quantize the base while it is loaded; ``None`` to load it as it is stored."""
    if requested is None:
        return None if adapter is None else held_base(base, adapter)
    if isinstance(requested, QuantizeConfig):
        return requested
    return None if requested == "none" else parse(requested, option="--quantize")
