"""A model to use, from whatever the user names: a checkpoint, a run folder, an adapter folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.open.folders import find_folders, held_base
from lit_lora.peft import load_adapter
from lit_lora.peft.adapters import bottleneck
from lit_lora.quantize import QuantizeConfig, found_config
from lit_lora.quantize.config import parse
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import choose_device, choose_dtype, reuse_memory

__all__ = ["OpenedModel", "open_model"]


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to use."""

    model: CausalLM
    """The base model, with the adapter in it if there is one."""
    tokenizer: Tokenizer
    """Of the adapter where it brings one (with added tokens), else of the base."""
    description: str
    """One line: what it is, on which device, in which dtype."""
    base: Path
    """The checkpoint folder."""
    adapter: Path | None
    """The adapter folder."""


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
        model: A checkpoint folder (base, merged or fully finetuned), a run folder, or an adapter folder; the last two
            bring their base.
        adapter: An adapter folder, or a run folder with one, in the place of the run's own.
        dtype: ``fp32``, ``bf16`` or ``fp16``; when omitted, what the device computes fastest, or, for a merged
            model, what its update was kept in.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        quantize: How the base is held: settings, ``none``, or a name such as ``nf4-dq``; when omitted, as the adapter
            was trained, or as the folder has it.
        drop_layers: Leave the bottleneck adapters of so many first layers out; without an adapter it has no effect.

    Raises:
        InputError: A folder holds no model or adapter, or the adapter does not belong to the base.
        UsageError: The base of a run or adapter is not on this machine, no such device or dtype, the base is quantised
            in another way than asked for, or the adapter has no layers to drop.
    """
    base, folder = find_folders(model, adapter=adapter)
    place = choose_device(device)
    precision = choose_dtype(dtype, place) if dtype else _precision(base, place)
    reuse_memory()
    loaded = load_model(base, dtype=precision, device=place, quantize=_how(quantize, base, folder))
    about = [str(base)]
    if folder is not None:
        about.append(f"adapter {load_adapter(loaded, folder)}")
        if drop_layers:
            bottleneck.drop_layers(loaded, drop_layers)
            about.append(f"without those of the first {drop_layers} layers")
    brings_own = folder is not None and (folder / "tokenizer.json").is_file()  # one with added tokens
    tokenizer = Tokenizer.load(folder if folder is not None and brings_own else base)
    rows = loaded.config.vocab_size
    if tokenizer.vocab_size > rows and not brings_own:
        raise InputError(
            f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {rows}",
            hint="tokenizer.json and config.json are of different models",
        )
    held = found_config(loaded)
    about.append(f"{f'{held}, ' if held else ''}{str(precision).removeprefix('torch.')} on {place}")
    return OpenedModel(loaded, tokenizer, ", ".join(about), base, folder)


def _precision(base: Path, device: torch.device) -> torch.dtype:
    """What the device computes fastest, if that keeps the update of a merged model."""
    fastest, config = choose_dtype("auto", device), ModelConfig.from_folder(base)
    stored = getattr(torch, config.dtype)
    if not config.keeps_dtype or torch.finfo(stored).eps >= torch.finfo(fastest).eps:
        return fastest
    return torch.float32 if device.type == "cpu" else stored  # float16 is slow on a CPU


def _how(asked: str | QuantizeConfig | None, base: Path, adapter: Path | None) -> QuantizeConfig | None:
    """How the base is to be quantised, where it is not yet."""
    if asked is None:
        return None if adapter is None else held_base(base, adapter)
    if isinstance(asked, QuantizeConfig):
        return asked
    return None if asked == "none" else parse(asked, option="--quantize")
