"""What is printed before the first step: what trains, on how much, what it needs, what a user may want to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lit_lora import log
from lit_lora.estimate import Estimate, Memory, RowLengths, Setup, estimate, on_paper
from lit_lora.estimate.advice import Advice, advise
from lit_lora.files import human_bytes, require_free_space
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft import count_parameters, matched_table, with_text, with_token_ids
from lit_lora.quantize import Quantized, count_quantized, found_config, stored_bytes
from lit_lora.recipe.config import RunConfig
from lit_lora.recipe.data import RunData, lengths_of
from lit_lora.recipe.run import Run
from lit_lora.train.device import free_memory_bytes
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.validation import check_best_metric

__all__ = [
    "duration",
    "in_words",
    "note_larger_micro_batches",
    "show_plan",
    "planned_rows",
    "planned_steps",
    "setup_for",
    "show_what_trains",
    "step_duration",
    "warn_of",
]

_GPU_TOKENS = 8192
"""Computed at once, these keep a large GPU busy (``benchmarks/gpu_lora_202611.md``)."""


def show_plan(run: Run, model: CausalLM, data: RunData) -> None:
    """Print what will train, on how much, and what it needs, before the first step.

    Raises:
        DiskError: The disk has too little room for it.
        UsageError: The best weights are to be picked by what is not measured.
    """
    config, rows = run.config, data.prepared.train
    check_best_metric(config.train, NextToken())
    show_what_trains(model)
    total = config.train.total_steps(data.batches.steps_per_epoch)
    warn_of(config, total, validated=bool(data.validation))
    _warn_of_length(model, data)
    lengths, shared_prefix = lengths_of(rows, config.peft), data.batches.shared_prefix
    setup = setup_for(config, shape=model.config, rows=lengths, dtype=run.dtype, device=run.device)
    estimated = estimate(setup, on_paper(model))
    _warn_of_memory(setup, estimated)
    note_larger_micro_batches(setup)
    tokens, targets = int(rows.token_counts.sum()), int(rows.target_counts.sum())
    table = [
        *planned_rows(run, model),
        *_base_row(model),
        ["training rows", f"{len(rows):,}: {tokens:,} tokens, {targets:,} of them learned"],
        *(
            [["all rows begin with", f"the same {shared_prefix} tokens, computed once a micro-batch"]]
            if shared_prefix
            else []
        ),
        *planned_steps(config, data.batches.steps_per_epoch, len(data.prepared.validation or ())),
        ["estimated memory", human_bytes(estimated.peak_bytes)],
        ["estimated time", _planned_time(estimated.seconds_per_step, total)],
        ["estimated disk space", human_bytes(estimated.disk_bytes)],
        ["run folder", str(run.folder)],
    ]
    log.table("Plan", ["what", "figure"], table)
    require_free_space(run.folder, estimated.disk_bytes, "this run")


def setup_for(
    config: RunConfig, *, shape: ModelConfig, rows: RowLengths, dtype: torch.dtype, device: torch.device
) -> Setup:
    """What memory and time of a run depend on; placeholder ids stand for tokens that its config gives as text."""
    new = shape.vocab_size
    peft = with_token_ids(config.peft, lambda tokens: list(range(new, new + len(tokens))))
    peft = with_text(peft, lambda text: [0] * (1 + len(text) // 4))
    return Setup(shape, peft, config.train, config.optimizer, rows, dtype, device, config.seed, config.quantization)


def show_what_trains(model: nn.Module) -> None:
    """Print the modules that train."""
    matched = [[row.pattern, row.count, row.shape, f"{row.trainable:,}"] for row in matched_table(model)]
    log.table("What trains", ["modules", "count", "weight", "parameters"], matched, right=(1, 3))


def planned_rows(run: Run, model: nn.Module) -> list[list[str]]:
    """Lines of the plan on the model."""
    counts = count_parameters(model)
    return [
        ["trainable parameters", f"{counts.trainable:,} of {counts.total:,} ({counts.share:.2%})"],
        ["device and precision", f"{run.device}, {str(run.dtype).removeprefix('torch.')}"],
    ]


def planned_steps(config: RunConfig, steps_per_epoch: int, held_out: int) -> list[list[str]]:
    """Lines of the plan on validation, steps and learning rate."""
    total = config.train.total_steps(steps_per_epoch)
    passes, interval = total / steps_per_epoch, config.train.eval_interval(total)
    return [
        ["validation rows", f"{held_out:,}, every {interval} steps" if held_out else "none"],
        ["steps", f"{total:,} of {config.train.batch_size} rows each, {passes:.3g} passes over the rows"],
        [
            "learning rate",
            f"{config.optimizer.lr:g}, {config.schedule.name}, {config.schedule.warmup_steps(total)} steps of warm-up",
        ],
    ]


def _planned_time(seconds_per_step: float | None, steps: int) -> str:
    """Time of the whole run and of one step; ``unknown`` on a device that is not available."""
    if seconds_per_step is None:
        return "unknown"
    return f"{duration(seconds_per_step * steps)} ({step_duration(seconds_per_step)} per step), without validation"


def _base_row(model: CausalLM) -> list[list[str]]:
    """Bits and bytes of a quantised base."""
    quantize, layers = found_config(model), [module for module in model.modules() if isinstance(module, Quantized)]
    if quantize is None:
        return []
    held = sum(stored_bytes(layer) for layer in layers)
    bits = f"{8 * held / count_quantized(model):.2f} bits a weight"
    types = sorted({layer.config for layer in layers}, key=lambda config: config.bits)
    name = str(quantize) if len(types) == 1 else f"{types[0]} to {types[-1]} by layer"
    return [["base", f"{name}: {count_quantized(model):,} weights in {human_bytes(held)}, {bits}"]]


def _warn_of_memory(setup: Setup, estimated: Estimate) -> None:
    """Say it when a loaded model will not fit while it trains, and what would."""
    free, memory = free_memory_bytes(setup.device), estimated.memory
    there = _there(setup, memory)
    if free is None or memory.total - there <= free:
        return
    log.warn(
        f"this run needs about {human_bytes(memory.total - there)} more, {human_bytes(free)} are free: "
        f"{in_words(advise(setup, free + there))}"
    )


def _there(setup: Setup, memory: Memory) -> int:
    """Bytes that a loaded model has taken already; a CPU's weights are mapped, not yet read."""
    return memory.process + (memory.weights if setup.device.type == "cuda" else 0)


def note_larger_micro_batches(setup: Setup) -> None:
    """Say it where a GPU would get too little to do at once, and has the memory for more."""
    now, free = setup.train.micro_batch_tokens, free_memory_bytes(setup.device)
    step = int(setup.rows.token_counts.mean()) * min(setup.train.batch_size, len(setup.rows))
    if setup.device.type != "cuda" or free is None or now >= min(step, _GPU_TOKENS):
        return
    larger = replace(setup, train=setup.train.model_copy(update={"micro_batch_tokens": _GPU_TOKENS}))
    memory = estimate(larger).memory
    if memory.total - _there(larger, memory) <= free:
        log.note(
            f"{now:,} tokens at once do not keep a GPU busy: the same results come sooner with "
            f"train.micro_batch_tokens={_GPU_TOKENS}, which fits its memory"
        )


def in_words(tried: Sequence[Advice]) -> str:
    """What makes a run fit, or how near its settings can get."""
    best = min(tried, key=lambda advice: (not advice.fits, advice.memory_bytes), default=None)
    if best is None:
        return "take a smaller model"
    settings, needed = " ".join(best.overrides), human_bytes(best.memory_bytes)
    return f"{settings} needs {needed}" if best.fits else f"even {settings} needs {needed}: take a smaller model"


def warn_of(config: RunConfig, total: int, *, validated: bool) -> None:
    """Say what a user would want to change before ``total`` steps begin."""
    warmup, asked = config.schedule.warmup_steps(total), config.schedule.asked_steps(total)
    if warmup < asked:
        log.warn(f"schedule.warmup: {asked} steps are more than half of all {total}: the warm-up takes {warmup}")
    if validated:
        return
    log.warn(
        "no validation rows: overfitting will not show, and the last weights are kept, not the best "
        "(data.validation=0.1 holds a tenth of the rows out)"
    )
    if config.train.patience is not None:
        log.warn("train.patience has no effect without validation rows")


def _warn_of_length(model: CausalLM, data: RunData) -> None:
    """Say it when rows are longer than what the model was made for."""
    longest, context = int(data.prepared.train.token_counts.max()), model.context
    if longest > context:
        log.warn(
            f"the longest row has {longest:,} tokens, the model was made for {context:,}: "
            f"data.max_seq_length={context} keeps to that"
        )


def duration(seconds: float) -> str:
    """``125.0`` as ``2 min 5 s``."""
    if seconds < 1:
        return "less than a second"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def step_duration(seconds: float) -> str:
    """``1.62`` as ``1.6 s``, ``0.034`` as ``34 ms``; from 10 seconds on as :func:`duration`."""
    if seconds >= 10:
        return duration(seconds)
    if seconds >= 0.1:
        return f"{seconds:.2g} s"
    # At least 1, so that a tiny model does not take no time at all.
    return f"{max(1, round(1000 * seconds))} ms"
