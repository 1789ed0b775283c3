"""The steps of a run on rows with labels: rows, head, plan, samples, what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from lit_lora import log
from lit_lora.classify.checkpoint import Pretrained
from lit_lora.classify.predict import predict
from lit_lora.classify.task import Task
from lit_lora.data.config import LabelledConfig
from lit_lora.data.labelled import Example, LabelledRow, LabelledRows, Labels, find_labels, read_examples
from lit_lora.data.padded import LabelledBatch, PaddedBatches, by_length, padded_tokens
from lit_lora.data.prepare import split_places
from lit_lora.data.source import locate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, cache_folder, disk_errors, human_bytes, require_free_space
from lit_lora.peft import Method, rows_for_init, save_adapter, trainable_state, with_modules_to_save
from lit_lora.recipe import (
    Run,
    RunConfig,
    card_of_model,
    planned_rows,
    planned_steps,
    show_what_trains,
    summary,
    warn_of,
)
from lit_lora.train.loop import FitResult
from lit_lora.train.optim.build import state_bytes
from lit_lora.train.validation import check_best_metric

__all__ = [
    "ClassifyConfig",
    "LabelledData",
    "apply_with_head",
    "checkpoint_activations",
    "encode_rows",
    "load_labelled",
    "plan_labelled",
    "prediction_samples",
    "save_result",
]

_LOOKED_AT = 200
"""Steps over which the share of padding is counted for the plan."""


class ClassifyConfig(RunConfig):
    """A run of an encoder or an encoder-decoder on rows with labels."""

    data: LabelledConfig = Field(description="The rows to learn from.")


@dataclass
class LabelledData:
    """The rows, portioned."""

    task: Task
    train: LabelledRows
    held_out: LabelledRows | None
    examples: Sequence[Example]
    """Of the rows held out, or else of the training rows: as many as are shown while training."""
    batches: PaddedBatches
    validation: list[LabelledBatch]
    file: str

    @property
    def about(self) -> str:
        """One line on what it is, for a model card."""
        return f"{self.file}, {len(self.train):,} rows"


def load_labelled(config: ClassifyConfig, shape: Pretrained) -> LabelledData:
    """Read, tokenise, split and portion the rows, and find their labels.

    Raises:
        InputError: The data cannot be read, a label is not among those of the training rows, or no row is left.
        UsageError: The settings do not go with the data or the model.
    """
    section, source = config.data, locate(config.data.path, cache_folder())
    examples, about = read_examples(source.train, section, limit=section.limit)
    log.note(f"{', '.join(map(str, source.train))}: {len(examples):,} rows; {about}")
    kind = shape.kind(section.task)
    task = Task(kind, find_labels(examples, shape.known_labels).names if kind == "classification" else ())
    held: Sequence[Example] = []
    files = source.validation
    if isinstance(section.validation, str):
        files = locate(section.validation, cache_folder()).train
    if isinstance(section.validation, int | float):
        places, others = split_places(len(examples), section.validation, config.seed)
        examples, held = [examples[i] for i in places], [examples[i] for i in others]
    elif files:
        held, _ = read_examples(files, section)
    train = encode_rows(examples, shape, task, section)
    held_out = encode_rows(held, shape, task, section) if held else None
    shared = len(held_out.texts & train.texts) if held_out else 0
    if shared:
        log.warn(f"{shared:,} texts of the {len(held):,} validation rows are training rows too: figures will flatter")
    return LabelledData(
        task,
        train,
        held_out,
        (held or examples)[: config.train.samples],
        PaddedBatches(
            train,
            shape.layout,
            batch_size=config.train.batch_size,
            micro_batch_tokens=config.train.micro_batch_tokens,
            seed=config.seed,
        ),
        by_length(held_out, shape.layout, 2 * config.train.micro_batch_tokens) if held_out else [],
        source.train[0].name,
    )


def encode_rows(
    examples: Sequence[Example], shape: Pretrained, task: Task, config: LabelledConfig, *, labelled: bool = True
) -> LabelledRows:
    """Examples as rows of tokens with their labels; what is longer than allowed is cut, left out or refused.

    Args:
        examples: At least one.
        shape: The model's tokenizer.
        task: What the label is.
        config: Lengths, and what to do with longer rows.
        labelled: Whether the rows have labels; those without get 0.

    Raises:
        InputError: A label does not fit the task, a row is too long, or none is left.
        UsageError: The model has fewer positions than are asked for.
    """
    most = shape.row_tokens(config.max_seq_length)
    pairs = [example.pair for example in examples]
    both = None if None in pairs else [pair or "" for pair in pairs]
    tokens = shape.encode([example.text for example in examples], both, None)
    long = [number for number, (ids, _) in enumerate(tokens) if len(ids) > most]
    if long:
        _report_long(examples, [len(tokens[number][0]) for number in long], long, most, config)
    if long and config.too_long == "truncate":
        cut = shape.encode([examples[n].text for n in long], both and [both[n] for n in long], most)
        tokens = list(tokens)
        for number, shorter in zip(long, cut, strict=True):
            tokens[number] = shorter
    kept = [n for n in range(len(examples)) if config.too_long == "truncate" or n not in set(long)]
    if not kept:
        raise InputError(f"{config.path}: every row is longer than {most} tokens", hint="data.too_long: truncate")
    chosen = [examples[n] for n in kept]
    labels = _labels(chosen, shape, task, config) if labelled else [np.zeros((), np.int64)] * len(chosen)
    rows = [LabelledRow(*tokens[n], label, examples[n].source) for n, label in zip(kept, labels, strict=True)]
    return LabelledRows(rows)


def _report_long(
    examples: Sequence[Example], lengths: Sequence[int], long: Sequence[int], most: int, config: LabelledConfig
) -> None:
    first = examples[long[0]].source
    if config.too_long == "error":
        raise InputError(
            f"{first}: {lengths[0]} tokens, more than the {most} allowed ({len(long):,} such rows)",
            hint="raise data.max_seq_length, or set data.too_long: truncate",
        )
    done = "cut to that" if config.too_long == "truncate" else "left out"
    log.warn(
        f"{len(long):,} of {len(examples):,} rows have more than {most} tokens and are {done} (the longest has "
        f"{max(lengths):,}; the first is {first})"
    )


def _labels(examples: Sequence[Example], shape: Pretrained, task: Task, config: LabelledConfig) -> list[Any]:
    """The label of each row as the objective takes it.

    Raises:
        InputError: A label is not among those of the task, or is no number.
    """
    if task.kind == "classification":
        names = Labels(task.labels)
        return [np.array(names.id(example), np.int64) for example in examples]
    if task.kind == "regression":
        return [np.array(_number(example), np.float32) for example in examples]
    targets = [ids for ids, _ in shape.encode([example.label or "" for example in examples], None, None)]
    long = [n for n, ids in enumerate(targets) if len(ids) > config.max_target_length]
    if long:
        raise InputError(
            f"{examples[long[0]].source}: a target of {len(targets[long[0]])} tokens, more than "
            f"data.max_target_length {config.max_target_length} ({len(long):,} such rows)",
            hint="raise it: what is cut off a target would be learned as its end",
        )
    return [ids.astype(np.int64) for ids in targets]


def _number(example: Example) -> float:
    try:
        number = float(example.label or "")
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{example.source}: label {example.label!r}, expected a number (data.task is regression)")
    return number


def apply_with_head(method: Method, model: nn.Module, head: Sequence[str]) -> Method:
    """Change ``model`` in place into one that trains by ``method``, and its head beside it.

    Returns:
        The method as it is on this model.

    Raises:
        UsageError: The settings do not fit the model.
    """
    if rows_for_init(method):
        raise UsageError("peft.init: eva and lora-ga look at a decoder's rows before the start", hint="init: pissa")
    method = with_modules_to_save(method, head)
    method.apply(model)
    return method


def checkpoint_activations(model: Any, how: str) -> None:
    """Compute activations again in the backward instead of keeping them, layer by layer.

    Raises:
        UsageError: The model, or transformers, cannot do it so.
    """
    if how == "none":
        return
    if how != "full" or not model.supports_gradient_checkpointing:
        raise UsageError(f"train.activation_checkpointing: {how} is not for this model, expected none or full")
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # before 5.20
    enable({"use_reentrant": False})


def plan_labelled(run: Run, model: nn.Module, data: LabelledData) -> None:
    """Print what will train, and on how much, before the first step.

    Raises:
        DiskError: The disk has too little room for it.
        UsageError: The best weights are to be picked by what is not measured.
    """
    config = run.config
    check_best_metric(config.train, data.task.objective)
    show_what_trains(model)
    total = config.train.total_steps(data.batches.steps_per_epoch)
    warn_of(config, total, validated=bool(data.validation))
    counts, looked_at = data.train.token_counts, range(min(data.batches.steps_per_epoch, _LOOKED_AT))
    micro_batches = [places for step in looked_at for places in data.batches.places(step)]
    real = sum(int(counts[places].sum()) for places in micro_batches)
    padding = 1 - real / padded_tokens(micro_batches, counts)
    masters = list(trainable_state(model).values())
    trained = sum(4 * tensor.numel() for tensor in masters)
    disk = (trained + state_bytes(config.optimizer, masters)) * (config.train.keep_last + 2) + trained
    tokens = f"{int(counts.sum()):,} tokens, the longest {int(counts.max()):,}"
    table = [
        *planned_rows(run, model),
        ["task", str(data.task)],
        ["training rows", f"{len(data.train):,}: {tokens}"],
        ["padding", f"{padding:.1%} of what is computed, {len(micro_batches) / len(looked_at):.3g} portions a step"],
        *planned_steps(config, data.batches.steps_per_epoch, len(data.held_out or ())),
        ["best weights by", config.train.best_metric],
        ["estimated disk space", human_bytes(disk)],
        ["run folder", str(run.folder)],
    ]
    log.table("Plan", ["what", "figure"], table)
    require_free_space(run.folder, disk, "this run")


def prediction_samples(
    model: nn.Module, shape: Pretrained, config: ClassifyConfig, data: LabelledData
) -> Callable[[int], None]:
    """A function of the step that prints predictions for the sample rows beside what the data says."""
    if not data.examples:
        return lambda _: None
    rows = encode_rows(data.examples, shape, data.task, config.data.model_copy(update={"too_long": "truncate"}))
    batches = by_length(rows, shape.layout, config.train.micro_batch_tokens)

    def show(step: int) -> None:
        training = model.training
        model.eval()
        for example, found in zip(data.examples, predict(model, shape.tokenizer, data.task, batches), strict=True):
            sure = "" if found.probability is None else f" ({found.probability:.0%})"
            text = log.shortened(example.text, 80)
            log.note(f"step {step}: {text!r}: {found.answer}{sure}, expected {example.label}")
        model.train(training)

    return show


def save_result(run: Run, model: Any, shape: Pretrained, method: Method, data: LabelledData, result: FitResult) -> Path:
    """Write the adapter with the head, or of full finetuning the whole model with its tokenizer.

    Raises:
        DiskError: It cannot be written.
    """
    metrics = {"Task": str(data.task), **summary(result)}
    if method.kind != "full":
        adapter = run.folder / "adapter"
        save = partial(save_adapter, model, method, adapter, base=shape.folder, data=data.about, metrics=metrics)
        return save(task=data.task.to_json(), task_type=data.task.peft_type)
    target = run.folder / "model"
    card = card_of_model(run, data.about, metrics)
    with atomic_folder(target, replace=True) as temporary, disk_errors(target):
        model.save_pretrained(temporary)
        shape.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target
