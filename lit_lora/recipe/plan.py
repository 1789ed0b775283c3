"""The plan printed before the first step: what trains, on which rows, what it needs, and what to change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from lit_lora import log
from lit_lora.checkpoint.load import AnyModel
from lit_lora.data import DataConfig
from lit_lora.errors import UsageError
from lit_lora.estimate import Estimate, Memory, RowLengths, Setup, estimate, on_paper
from lit_lora.estimate.advice import Advice, advise
from lit_lora.files import human_bytes, require_free_space
from lit_lora.hf import HostedLM
from lit_lora.model import ModelConfig
from lit_lora.peft import base_tensors, count_parameters, matched_table, with_text, with_token_ids
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.mixtures import find_mixtures, short_name, trained_weights
from lit_lora.peft.core.modules import not_wrappable
from lit_lora.peft.core.targeted import layer_number
from lit_lora.quantize import Quantized, QuantizedStack, count_quantized, found_config, stored_bytes
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
"""Tokens per micro-batch that keep a large GPU busy (``benchmarks/gpu_lora_202611.md``)."""


def show_plan(run: Run, model: AnyModel, data: RunData) -> None:
    """Print what will train, on which rows, and what the run needs, with warnings about doubtful settings.

    Raises:
        DiskError: The disk has too little space for the run.
        UsageError: ``train.best_metric`` is not measured, or rows are too long for the model.
    """
    config, rows = run.config, data.prepared.train
    check_best_metric(config.train, NextToken())
    steps = config.train.total_steps(data.batches.steps_per_epoch)
    lengths = lengths_of(data.prepared, config.peft)
    setup = setup_for(config, shape=model.config, rows=lengths, dtype=run.dtype, device=run.device)
    estimated = estimate(setup, on_paper(model))

    show_what_trains(model)
    warn_of(config, steps, validated=bool(data.validation))
    _check_length(model, data)
    _warn_of_dropped(config, model.context, data)
    _warn_of_memory(setup, estimated)
    note_larger_micro_batches(setup)

    tokens, targets = int(rows.token_counts.sum()), int(rows.target_counts.sum())
    held_out = data.prepared.report.validation.rows if data.prepared.report.validation else 0
    table = [
        *planned_rows(run, model),
        *_hosted_row(model),
        *_base_row(model),
        *([["chat template", data.template]] if data.template else []),
        ["training rows", f"{len(rows):,}: {tokens:,} tokens, {targets:,} of them targets"],
        *_data_set_rows(data, steps / data.batches.steps_per_epoch),
        *_prefix_row(data.batches.shared_prefix, model),
        *planned_steps(config, data.batches.steps_per_epoch, len(data.prepared.validation or ()), held_out),
        ["estimated memory", human_bytes(estimated.peak_bytes)],
        ["estimated time", _planned_time(estimated.seconds_per_step, steps)],
        ["estimated disk space", human_bytes(estimated.disk_bytes)],
        ["run folder", str(run.folder)],
    ]
    log.table("Plan", ["item", "value"], table)
    require_free_space(run.folder, estimated.disk_bytes, "this run")


def setup_for(
    config: RunConfig, *, shape: ModelConfig, rows: RowLengths, dtype: torch.dtype, device: torch.device
) -> Setup:
    """What memory and time of a run depend on. No tokenizer is needed: only the number of token ids matters."""
    first_new = shape.vocab_size
    method = with_token_ids(config.peft, lambda tokens: list(range(first_new, first_new + len(tokens))))
    method = with_text(method, lambda text: [0] * (1 + len(text) // 4))  # about four characters per token
    return Setup(shape, method, config.train, config.optimizer, rows, dtype, device, config.seed, config.quantization)


def show_what_trains(model: nn.Module) -> None:
    """Print the modules that train."""
    matched = [[row.pattern, row.count, row.shape, f"{row.trainable:,}"] for row in matched_table(model)]
    log.table("What trains", ["modules", "count", "weight", "parameters"], matched, right=(1, 3))


def planned_rows(run: Run, model: nn.Module) -> list[list[str]]:
    """The plan's lines on the model."""
    parameters = count_parameters(model)
    return [
        ["trainable parameters", f"{parameters.trainable:,} of {parameters.total:,} ({parameters.share:.2%})"],
        *mixture_rows(model),
        *left_out_rows(model, run.config.peft),
        ["device and precision", f"{run.device}, {str(run.dtype).removeprefix('torch.')}"],
    ]


def left_out_rows(model: nn.Module, method: object) -> list[list[str]]:
    """The plan's line on the linear layers that ``all-linear`` leaves out of every block by itself."""
    if getattr(method, "target_modules", None) != "all-linear":
        return []
    excluded: list[str] = getattr(method, "exclude_modules", [])
    passed_over = not_wrappable(model)
    in_base = set(base_tensors(model))
    reasons: dict[str, str] = {}
    adapted = set()
    for name, module in model.named_modules():
        if layer_number(name) is None or not isinstance(module, nn.Linear):
            continue
        weight = module._parameters.get("weight")  # a quantized layer would dequantize its `weight`
        is_frozen = f"{name}.weight" in in_base and not (weight is not None and weight.requires_grad)
        if not is_frozen:  # it trains, or it is the base layer of a module that does
            adapted.add(name.removesuffix(".base_layer").rpartition(".")[2])
        elif not any(matches(pattern, name) for pattern in excluded):
            reasons[name.rpartition(".")[2]] = "read by the model itself" if name in passed_over else "too narrow"
    left_out = [f"{kind} ({reason})" for kind, reason in reasons.items() if kind not in adapted]
    return [["left out by all-linear", ", ".join(left_out)]] if left_out else []


def mixture_rows(model: nn.Module) -> list[list[str]]:
    """The plan's lines on a mixture of experts: which of its weights train, and what ``all-linear`` leaves out."""
    mixtures = find_mixtures(model)
    if not mixtures.experts:
        return []
    trained = trained_weights(model, mixtures)
    experts = next(iter(mixtures.experts.values()))
    states = _training_states(mixtures.experts, trained)
    about = f"{len(experts)} per layer: {states}"
    if not trained & mixtures.experts.keys():
        named = dict.fromkeys(short_name(name) for name in mixtures.experts)
        about += f"; to train them, use lora with target_parameters=[{','.join(named)}]"
    rows = [["experts", about]]
    if mixtures.routers:
        rows.append(["routers", _training_states(mixtures.routers, trained)])
    in_full = [weight for weight in mixtures.experts.values() if not isinstance(weight, QuantizedStack)]
    if in_full and found_config(model) is not None:
        size = human_bytes(sum(weight.nbytes for weight in in_full))
        rows.append(["not quantized", f"the experts, {size} in {str(experts.dtype).removeprefix('torch.')}"])
    return rows


def _training_states(weights: Iterable[str], trained: Collection[str]) -> str:
    """``experts.down_proj train in 2 of 4 layers, experts.gate_up_proj frozen``."""
    of_kind: dict[str, list[bool]] = {}
    for name in weights:
        of_kind.setdefault(short_name(name), []).append(name in trained)
    states = []
    for kind, train in of_kind.items():
        if all(train):
            states.append(f"{kind} train")
        elif any(train):
            states.append(f"{kind} train in {sum(train)} of {len(train)} layers")
        else:
            states.append(f"{kind} frozen")
    return ", ".join(states)


def planned_steps(config: RunConfig, steps_per_epoch: int, validation_rows: int, held_out: int) -> list[list[str]]:
    """The plan's lines on validation, steps and learning rate.

    Args:
        config: The config.
        steps_per_epoch: Steps that visit each row once.
        validation_rows: Rows that a validation measures.
        held_out: All validation rows.
    """
    steps = config.train.total_steps(steps_per_epoch)
    interval = config.train.eval_interval(steps, steps_per_epoch)
    every = "every step" if interval == 1 else f"every {interval} steps"
    epochs = steps / steps_per_epoch
    passes = f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}"
    warmup = config.schedule.warmup_steps(steps)
    validation = f"{validation_rows:,}, {every}" if validation_rows else "none"
    if validation_rows < held_out:
        validation = f"{validation_rows:,} of {held_out:,}, {every}"
    return [
        ["validation rows", validation],
        ["steps", f"{steps:,} of {_counted(config.train.batch_size, 'row')} each, {passes}"],
        ["learning rate", f"{config.optimizer.lr:g}, {config.schedule.name}, {_counted(warmup, 'warm-up step')}"],
    ]


def _counted(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _data_set_rows(data: RunData, epochs: float) -> list[list[str]]:
    """The plan's lines on several data sets: how often the run reads each."""
    lines = []
    for number, data_set in enumerate(data.prepared.report.data_sets):
        share = f"{data_set.token_share:.1%} of the tokens trained on"
        lines.append([f"data.mix[{number}]", f"{data_set.name}: read {data_set.passes * epochs:.3g} times, {share}"])
    return lines


def _prefix_row(shared_prefix: int, model: AnyModel) -> list[list[str]]:
    """The plan's line on the tokens that all rows begin with, if there are any."""
    if not shared_prefix:
        return []
    is_shared = not isinstance(model, HostedLM) or model.way == "own attention"
    computed = "once per micro-batch" if is_shared else "anew in every row"
    return [["shared prefix", f"{_counted(shared_prefix, 'token')}, computed {computed}"]]


def _planned_time(seconds_per_step: float | None, steps: int) -> str:
    """Time of the whole run and of one step; ``unknown`` on a device that is not available."""
    if seconds_per_step is None:
        return "unknown"
    return f"{duration(seconds_per_step * steps)} ({step_duration(seconds_per_step)} per step), without validation"


def _hosted_row(model: AnyModel) -> list[list[str]]:
    """The plan's line on a model of transformers: how it was found to be computed."""
    return [["computed by", model.description]] if isinstance(model, HostedLM) else []


def _base_row(model: AnyModel) -> list[list[str]]:
    """The plan's line on a quantized base."""
    quantize = found_config(model)
    if quantize is None:
        return []
    layers = [module for module in model.modules() if isinstance(module, Quantized)]
    layer_bytes = sum(stored_bytes(layer) for layer in layers)
    weights = count_quantized(model)

    bits = 8 * layer_bytes / weights

    name = str(quantize)
    types = sorted({layer.config for layer in layers}, key=lambda config: config.bits)
    if len(types) > 1:  # a method has chosen a type for each layer
        name = f"{types[0]} to {types[-1]} by layer"
    return [["base", f"{name}: {weights:,} weights in {human_bytes(layer_bytes)}, {bits:.2f} bits per weight"]]


def _warn_of_memory(setup: Setup, estimated: Estimate) -> None:
    """Warn if training will need more memory than is free, and say which settings would fit."""
    free = free_memory_bytes(setup.device)
    loaded = _loaded_bytes(setup, estimated.memory)
    needed = estimated.memory.total - loaded
    if free is None or needed <= free:
        return
    log.warn(
        f"this run needs about {human_bytes(needed)} more, {human_bytes(free)} are free: "
        f"{in_words(advise(setup, free + loaded))}"
    )


def _loaded_bytes(setup: Setup, memory: Memory) -> int:
    """Bytes that a loaded model occupies before it trains. A CPU's weights are mapped and not yet in memory."""
    return memory.process + (memory.weights if setup.device.type == "cuda" else 0)


def note_larger_micro_batches(setup: Setup) -> None:
    """Suggest larger micro-batches where the present ones underuse a GPU that has memory for more."""
    tokens, free = setup.train.micro_batch_tokens, free_memory_bytes(setup.device)
    tokens_per_step = int(setup.rows.token_counts.mean()) * min(setup.train.batch_size, len(setup.rows))
    if setup.device.type != "cuda" or free is None or tokens >= min(tokens_per_step, _GPU_TOKENS):
        return

    larger = replace(setup, train=setup.train.model_copy(update={"micro_batch_tokens": _GPU_TOKENS}))
    memory = estimate(larger).memory
    if memory.total - _loaded_bytes(larger, memory) <= free:
        log.note(
            f"micro-batches of {tokens:,} tokens underuse the GPU; train.micro_batch_tokens={_GPU_TOKENS} fits in "
            "memory and is faster, with identical results"
        )


def in_words(tried: Sequence[Advice]) -> str:
    """The settings with which a run fits, or those that come closest."""
    if not tried:
        return "use a smaller model"
    best = min(tried, key=lambda advice: (not advice.fits, advice.memory_bytes))
    needs = f"{' '.join(best.overrides)} needs {human_bytes(best.memory_bytes)}"
    return needs if best.fits else f"even {needs}; use a smaller model"


def warn_of(config: RunConfig, steps: int, *, validated: bool) -> None:
    """Warn about settings that a user would want to change before a run of ``steps`` steps."""
    warmup, requested = config.schedule.warmup_steps(steps), config.schedule.asked_steps(steps)
    if warmup < requested:
        log.warn(
            f"schedule.warmup: {requested} steps are more than half of all {steps}, so the warm-up is cut to {warmup}"
        )
    if validated:
        return
    log.warn(
        "no validation rows: overfitting will not show, and the last weights are saved instead of the best "
        "(data.validation=0.1 holds out a tenth of the rows)"
    )
    if config.train.patience is not None:
        log.warn("train.patience has no effect without validation rows")


def _check_length(model: AnyModel, data: RunData) -> None:
    """Warn if rows are longer than the model's context, or refuse them where it has no positions for them.

    Raises:
        UsageError: transformers computes the model, of which many look positions up in a table of that length.
    """
    context = model.context
    longest = 0
    too_long = []
    for kind, rows in [("training", data.prepared.train), ("validation", data.prepared.validation)]:
        if rows is None or int(rows.token_counts.max()) <= context:
            continue
        longest = max(longest, int(rows.token_counts.max()))
        too_long.append(_counted(int((rows.token_counts > context).sum()), f"{kind} row"))
    if not too_long:
        return
    problem = (
        f"the longest row has {longest:,} tokens, more than the model's context of {context:,} "
        f"(too long: {' and '.join(too_long)})"
    )
    remedy = f"data.max_seq_length={context} limits it"
    if isinstance(model, HostedLM):
        raise UsageError(problem, hint=remedy)
    log.warn(f"{problem}; {remedy}")


def _warn_of_dropped(config: RunConfig, context: int, data: RunData) -> None:
    """Warn about training and validation rows that are dropped for their length, with what would keep them."""
    longest_allowed = config.data.max_seq_length if isinstance(config.data, DataConfig) else context
    for warning in data.prepared.report.length_warnings(longest_allowed, context):
        log.warn(warning)


def duration(seconds: float) -> str:
    """``125.0`` as ``2 min 5 s``."""
    if seconds < 1:
        return "less than a second"
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"


def step_duration(seconds: float) -> str:
    """``1.62`` as ``1.6 s``, ``0.034`` as ``34 ms``; from 10 seconds on like :func:`duration`."""
    if seconds >= 10:
        return duration(seconds)
    if seconds >= 0.1:
        return f"{seconds:.2g} s"
    return f"{max(1, round(1000 * seconds))} ms"  # never 0, however small the model
