"""``lit-lora estimate``: memory and time of a run before it starts."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
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
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file, or name of a shipped config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as peft.rank=16.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_DIR", help="Another model than the config's: llama-65b, or a config.json."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda, also where there is none; the config's when omitted.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What it must fit into, such as 24GB; what is free if omitted.")
    ] = None,
) -> None:
    """Say what a run will need, in which part of it, and what would make it fit.

    A step is rehearsed without values, so no weights are needed: a config.json is enough, or a name: smollm2-135m,
    llama-3.2-1b, llama-2-70b, llama-65b, mistral-7b and others. Without the data, every row counts as long as
    data.max_seq_length.

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
        raise UsageError(f"{config}: recipe {settings.recipe} cannot be rehearsed: estimate is for decoders")
    setup = _setup(settings, shape, device)
    budget = free_memory_bytes(setup.device) if memory is None else _bytes(memory)
    estimated = estimate(setup)
    _show_parts(setup, estimated)
    rows = [[name, *map(human_bytes, _shares(found))] for name, found in _by_method(setup)]
    columns = ["method", "weights", "trained, moments", "rest of a step", "together"]
    log.table("The same settings by method", columns, rows, right=(1, 2, 3, 4))
    again = shlex.join([config, *(overrides or [])])
    if budget is None:
        log.say(f"next: lit-lora estimate --config {again} --memory SIZE, to see what would fit")
    elif estimated.peak_bytes <= budget:
        log.say(f"fits: {human_bytes(estimated.peak_bytes)} of {human_bytes(budget)}", style="bold green")
        log.say(f"next: lit-lora finetune --config {again} --dry-run")
    else:
        _show_advice(setup, estimated, budget, again)


def _setup(config: FinetuneConfig, shape: str | None, device: str | None) -> Setup:
    """The run of a config, on a model that need not be there."""
    import torch

    from lit_lora.estimate import RowLengths, model_shape
    from lit_lora.model import ModelConfig
    from lit_lora.recipe import row_lengths, setup_for
    from lit_lora.train.device import choose_device, choose_dtype

    name = device or config.model.device
    if name.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: expected cpu or cuda")
    elsewhere = name == "cuda" and not torch.cuda.is_available()
    place = torch.device("cuda") if elsewhere else choose_device(name)
    auto = elsewhere and config.model.dtype == "auto"
    dtype = torch.bfloat16 if auto else choose_dtype(config.model.dtype, torch.device("cpu") if elsewhere else place)
    try:
        rows = row_lengths(config)
    except InputError as error:
        longest = config.data.max_seq_length
        log.note(f"{error}: every row counts as data.max_seq_length={longest} tokens, all of them learned")
        rows = RowLengths.alike(config.train.batch_size, longest)
    found = ModelConfig.from_folder(config.model.path) if shape is None else model_shape(shape)
    return setup_for(config, shape=found, rows=rows, dtype=dtype, device=place)


def _show_parts(setup: Setup, estimated: Estimate) -> None:
    from lit_lora.peft.core.capabilities import calibration_rows
    from lit_lora.recipe import step_duration

    memory, trained = estimated.memory, f"{estimated.trainable:,} numbers in float32"
    names = {
        "weights": f"the model in {_held(setup)}",
        "trained": f"what trains beside them: {trained}",
        "optimizer": f"{setup.optimizer.name}: its moments",
        "gradients": "those that exist at the peak",
        "activations": f"kept for the backward of {setup.train.micro_batch_tokens:,} tokens or the longest row",
        "logits": "output layer and loss",
        "workspace": "what passes through the backward, and the allocator's rest",
        "process": "Python and its libraries" if setup.device.type == "cpu" else "the driver",
    }
    rows = [[name, human_bytes(getattr(memory, name)), what] for name, what in names.items()]
    rows.append(["together", human_bytes(memory.total), ""])
    if estimated.weighing_bytes:
        what = f"once, before the first step: {calibration_rows(setup.peft)} rows through the model in full"
        rows.append(["weighing", human_bytes(estimated.weighing_bytes), what])
    log.table("Estimated memory", ["part", "bytes", "what"], rows, right=(1,))
    seconds = estimated.seconds_per_step
    if seconds is None:
        log.say(f"estimated time per step: unknown, device {setup.device.type!r} is not available")
    else:
        log.say(f"estimated time per step of {setup.train.batch_size} rows: {step_duration(seconds)}")


def _held(setup: Setup) -> str:
    """The types of the weights, in words."""
    dtype = str(setup.dtype).removeprefix("torch.")
    return dtype if setup.quantize is None else f"{_base(setup.peft, setup.quantize)} and {dtype}"


def _base(method: Method, quantize: QuantizeConfig) -> str:
    """How the linear layers are held, in words."""
    from lit_lora.peft.core.capabilities import ChoosesTypes

    return "types by layer" if isinstance(method, ChoosesTypes) else str(quantize)


def _by_method(setup: Setup) -> Iterator[tuple[str, Estimate]]:
    """The setup by every kind of finetuning."""
    from dataclasses import replace

    from lit_lora.estimate import estimate
    from lit_lora.peft import methods
    from lit_lora.quantize import QuantizeConfig

    table = methods()
    low_rank = setup.peft if setup.peft.kind != "full" else table["lora"]()
    rank = getattr(low_rank, "rank", None)  # not every method has one
    plain = low_rank
    if low_rank.kind == "quantized":  # has no form over 16 bits: LoRA of its rank stands for it
        plain = table["lora"].model_validate({} if rank is None else {"rank": rank})
    held = setup.quantize or QuantizeConfig()
    setups = {
        "full": replace(setup, peft=table["full"](), quantize=None),
        plain.name: replace(setup, peft=plain, quantize=None),
        f"{low_rank.name}, base in {_base(low_rank, held)}": replace(setup, peft=low_rank, quantize=held),
    }
    for kind, changed in setups.items():
        with suppress(UsageError):  # the model's rows are no multiple of a block, or the method cannot
            yield kind, estimate(changed)


def _shares(estimated: Estimate) -> tuple[int, int, int, int]:
    memory = estimated.memory
    trained = memory.trained + memory.optimizer
    return memory.weights, trained, memory.total - memory.weights - trained, estimated.peak_bytes


def _show_advice(setup: Setup, estimated: Estimate, budget: float, again: str) -> None:
    """What was tried to make it fit, beside the config and the changes of ``again``."""
    from lit_lora.estimate.advice import advise

    log.warn(f"does not fit: {human_bytes(estimated.peak_bytes)} of {human_bytes(budget)}")
    tried = advise(setup, budget)
    rows = [[" ".join(t.overrides), human_bytes(t.memory_bytes), "yes" if t.fits else "no"] for t in tried]
    log.table("What would make it fit", ["settings", "memory", "fits"], rows, right=(1,))
    if tried and tried[-1].fits:
        log.say(f"next: lit-lora finetune --config {again} {' '.join(tried[-1].overrides)} --dry-run")
    else:
        log.say("nothing of it fits: take a smaller model")


def _bytes(text: str) -> float:
    """``24GB`` in bytes.

    Raises:
        UsageError: Not a size.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?I?)B?", text.strip().upper())
    try:
        return float(match[1]) * _UNITS[match[2]] if match else float("nan") / 0
    except (ValueError, KeyError, ZeroDivisionError):
        raise UsageError(f"--memory {text}: expected a size such as 24GB") from None
