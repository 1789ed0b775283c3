"""``lit-lora estimate``: estimate memory and time of a run before it starts."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.errors import InputError, UsageError
from lit_lora.files import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_lora.estimate import Estimate, Setup
    from lit_lora.peft import Method
    from lit_lora.quantize import QuantizeConfig
    from lit_lora.recipe import FinetuneConfig

__all__ = ["command"]

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def command(
    config: options.Config,
    overrides: options.Overrides = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_DIR",
            help="Model to assume instead of the config's: a name such as llama-65b, or a folder.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Device to assume: cpu or cuda, even without one; the config's if omitted."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory it must fit in, such as 24GB; the free memory if omitted."),
    ] = None,
) -> None:
    """Break down the memory that a run will need, and say what would make it fit.

    A training step is rehearsed without values, so no weights are needed: a config.json is enough, or a name such as
    smollm2-135m, llama-3.2-1b, llama-2-70b, llama-65b or mistral-7b. Without the data, every row is assumed to have
    data.max_seq_length tokens.

    Examples:
        lit-lora estimate --config lora data.path=mine.jsonl

        lit-lora estimate --config full --shape llama-7b --memory 24GB

        lit-lora estimate --config lora --shape llama-65b --device cuda --memory 48GB train.micro_batch_tokens=512
    """
    from lit_lora.estimate import estimate
    from lit_lora.recipe import FinetuneConfig, load_recipe
    from lit_lora.train.device import free_memory_bytes

    settings = load_recipe(config, overrides or [])[1]
    if not isinstance(settings, FinetuneConfig):
        raise UsageError(f"{config}: recipe {settings.recipe} cannot be estimated, expected a recipe for decoders")
    setup = _setup(settings, shape, device)
    budget = free_memory_bytes(setup.device) if memory is None else _bytes(memory)
    estimated = estimate(setup)
    _show_parts(setup, estimated)
    rows = [[name, *map(human_bytes, _shares(other))] for name, other in _by_method(setup)]
    columns = ["method", "weights", "trainable and optimizer", "rest of a step", "total"]
    log.table("The same settings by method", columns, rows, right=(1, 2, 3, 4))
    again = shlex.join([config, *(overrides or [])])
    # The model that the config names is another one where --shape is given.
    run = again if shape is None else f"{again} model.path=CHECKPOINT_OF_THAT_SHAPE"
    if budget is None:
        log.say("the free memory of this device is unknown; --memory SIZE says whether it fits")
        shape_option = "" if shape is None else f"--shape {shape} "
        log.say(f"next: lit-lora estimate --config {again} {shape_option}--memory SIZE")
    elif estimated.peak_bytes <= budget:
        log.say(f"fits: {human_bytes(estimated.peak_bytes)} of {human_bytes(budget)}", style="bold green")
        log.say(f"next: lit-lora finetune --config {run} --dry-run")
    else:
        _show_advice(setup, estimated, budget, run)


def _setup(config: FinetuneConfig, shape: str | None, device: str | None) -> Setup:
    """The run of a config, on a model and a device that need not exist."""
    import torch

    from lit_lora.estimate import RowLengths, model_shape
    from lit_lora.hf import read_config
    from lit_lora.recipe import row_lengths, setup_for
    from lit_lora.train.device import choose_device, choose_dtype

    name = device or config.model.device
    if name.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        place = torch.device("cuda")
        # No GPU can be asked which dtypes it supports: assume a recent one.
        dtype = torch.bfloat16
        if config.model.dtype != "auto":
            dtype = choose_dtype(config.model.dtype, torch.device("cpu"))
    else:
        place = choose_device(name)
        dtype = choose_dtype(config.model.dtype, place)
    try:
        rows = row_lengths(config)
    except InputError as error:
        longest = config.data.max_seq_length
        log.note(f"{error}; assuming rows of data.max_seq_length={longest} tokens, all of them targets")
        rows = RowLengths.alike(config.train.batch_size, longest)
    model = read_config(config.model.path) if shape is None else model_shape(shape)
    return setup_for(config, shape=model, rows=rows, dtype=dtype, device=place)


def _show_parts(setup: Setup, estimated: Estimate) -> None:
    from lit_lora.peft.core.capabilities import calibration_rows
    from lit_lora.recipe import step_duration

    memory = estimated.memory
    descriptions = {
        "weights": f"the model in {_weight_types(setup)}",
        "trained": f"{estimated.trainable:,} trainable parameters in float32",
        "optimizer": f"state of {setup.optimizer.name}",
        "gradients": "of trainable parameters, at the peak",
        "activations": f"for the backward pass of {setup.train.micro_batch_tokens:,} tokens or the longest row",
        "logits": "output layer and loss",
        "workspace": "temporary tensors of the backward pass, and allocator overhead",
        "process": "Python and its libraries" if setup.device.type == "cpu" else "the driver",
    }
    rows = [[part, human_bytes(getattr(memory, part)), text] for part, text in descriptions.items()]
    rows.append(["total", human_bytes(memory.total), ""])
    if estimated.calibration_bytes:
        text = f"once, before the first step: {calibration_rows(setup.peft)} rows through the unquantized model"
        rows.append(["calibration", human_bytes(estimated.calibration_bytes), text])
    log.table("Estimated memory", ["component", "bytes", "description"], rows, right=(1,))
    seconds = estimated.seconds_per_step
    if seconds is None:
        log.say(f"estimated time per step: unknown, device {setup.device.type!r} is not available")
    else:
        log.say(f"estimated time per step of {setup.train.batch_size} rows: {step_duration(seconds)}")


def _weight_types(setup: Setup) -> str:
    """The types of the weights, in words."""
    dtype = str(setup.dtype).removeprefix("torch.")
    return dtype if setup.quantize is None else f"{_base_type(setup.peft, setup.quantize)} and {dtype}"


def _base_type(method: Method, quantize: QuantizeConfig) -> str:
    """The type of the quantized linear layers, in words."""
    from lit_lora.peft.core.capabilities import ChoosesTypes

    return "one type per layer" if isinstance(method, ChoosesTypes) else str(quantize)


def _by_method(setup: Setup) -> Iterator[tuple[str, Estimate]]:
    """Estimates of the same run by every kind of finetuning."""
    from dataclasses import replace

    from lit_lora.estimate import estimate
    from lit_lora.peft import methods
    from lit_lora.quantize import QuantizeConfig

    table = methods()
    low_rank = setup.peft if setup.peft.kind != "full" else table["lora"]()
    rank = getattr(low_rank, "rank", None)  # not every method has one
    unquantized = low_rank
    if low_rank.kind == "quantized":  # needs a quantized base: without one, LoRA of the same rank is the counterpart
        unquantized = table["lora"].model_validate({} if rank is None else {"rank": rank})
    quantize = setup.quantize or QuantizeConfig()
    setups = {
        "full": replace(setup, peft=table["full"](), quantize=None),
        unquantized.name: replace(setup, peft=unquantized, quantize=None),
        f"{low_rank.name}, base in {_base_type(low_rank, quantize)}": replace(setup, peft=low_rank, quantize=quantize),
    }
    for title, changed in setups.items():
        with suppress(UsageError):  # the weights do not divide into blocks, or the method does not support it
            yield title, estimate(changed)


def _shares(estimated: Estimate) -> tuple[int, int, int, int]:
    """Bytes of the weights, of trainable parameters with optimizer state, of the rest, and of all."""
    memory = estimated.memory
    trained = memory.trained + memory.optimizer
    return memory.weights, trained, memory.total - memory.weights - trained, estimated.peak_bytes


def _show_advice(setup: Setup, estimated: Estimate, budget: float, run: str) -> None:
    """Print the settings that were tried; ``run`` is the config with its overrides, as a command takes them."""
    from lit_lora.estimate.advice import advise

    log.warn(f"does not fit: {human_bytes(estimated.peak_bytes)} of {human_bytes(budget)}")
    tried = advise(setup, budget)
    rows = []
    for advice in tried:
        rows.append([" ".join(advice.overrides), human_bytes(advice.memory_bytes), "yes" if advice.fits else "no"])
    log.table("What would make it fit", ["settings", "memory", "fits"], rows, right=(1,))
    if tried and tried[-1].fits:
        log.say(f"next: lit-lora finetune --config {run} {' '.join(tried[-1].overrides)} --dry-run")
    else:
        log.say("none of these fit: use a smaller model")


def _bytes(text: str) -> float:
    """A size such as ``24GB`` or ``22.5 GiB`` in bytes.

    Raises:
        UsageError: The text is not a size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"--memory {text}: expected a size such as 24GB")
    return float(match[1]) * _UNITS[match[2]]
