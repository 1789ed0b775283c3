"""The steps of a run on rows with labels: read the rows, apply the method, print the plan, save the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from lit_lora import log
from lit_lora.classify.checkpoint import Pretrained
from lit_lora.classify.predict import predict
from lit_lora.classify.task import Task
from lit_lora.data.config import LabeledConfig
from lit_lora.data.labeled import Example, LabeledRow, LabeledRows, Labels, find_labels, read_examples
from lit_lora.data.padded import LabeledBatch, PaddedBatches, by_length, padded_tokens
from lit_lora.data.prepare import draw_places, split_places
from lit_lora.data.source import held_out_files, locate, warn_of_name
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, cache_folder, disk_errors, human_bytes, require_free_space
from lit_lora.peft import Method, read_adapter, rows_for_init, save_adapter, trainable_state, with_modules_to_save
from lit_lora.peft.core.adapter_method import AdapterMethod
from lit_lora.peft.files.init_adapter import start_from
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
    "LabeledData",
    "apply_with_head",
    "checkpoint_activations",
    "encode_rows",
    "load_labeled",
    "plan_labeled",
    "prediction_samples",
    "save_result",
]

_EXAMINED_STEPS = 200
"""Maximum number of steps over which the plan counts padding."""


class ClassifyConfig(RunConfig):
    """A run of an encoder or an encoder-decoder on rows with labels."""

    data: LabeledConfig = Field(description="Rows to learn from.")


@dataclass
class LabeledData:
    """The rows of a run and their batches."""

    task: Task
    train: LabeledRows
    held_out: LabeledRows | None
    examples: Sequence[Example]
    """The rows to show predictions for during training, from the validation rows or else the training rows."""
    batches: PaddedBatches
    validation: list[LabeledBatch]
    file: str
    held_out_rows: int
    """Number of all validation rows, of which ``held_out`` has those that are measured."""

    @property
    def validation_fingerprint(self) -> str | None:
        """Equal for equal validation rows; ``None`` without such rows."""
        return self.held_out.fingerprint if self.held_out is not None else None

    @property
    def about(self) -> str:
        """One line on the data, for a model card."""
        return f"{self.file}, {len(self.train):,} rows"


def load_labeled(config: ClassifyConfig, shape: Pretrained) -> LabeledData:
    """Read, split, tokenize and batch the rows, and find their labels.

    Raises:
        InputError: The data cannot be read, a label is not among those of the training rows, or no row is left.
        UsageError: The settings do not fit the data or the model.
    """
    section = config.data
    source = locate(section.path, cache_folder())
    source.log_use(validation_given=section.validation is not None)
    warn_of_name(section.path)
    examples, about = read_examples(source.train, section, limit=section.limit)
    log.note(f"{', '.join(map(str, source.train))}: {len(examples):,} rows; {about}")
    kind = shape.kind(section.task)
    labels = find_labels(examples, shape.labels).names if kind == "classification" else ()
    task = Task(kind, labels)

    validation: Sequence[Example] = []
    if isinstance(section.validation, int | float):
        train_places, validation_places = split_places(len(examples), section.validation, config.seed)
        validation = [examples[place] for place in validation_places]
        examples = [examples[place] for place in train_places]
    else:
        files = source.validation
        validation_section = section.for_validation()
        if validation_section is None:
            validation_section = section.model_copy(update={"limit": None})  # of a folder that has both
        else:
            files = held_out_files(validation_section.path, cache_folder())
        if files:
            validation, _ = read_examples(files, validation_section, limit=validation_section.limit)

    held_out_rows = len(validation)
    if config.train.eval_rows is not None:
        validation = [validation[place] for place in draw_places(held_out_rows, config.train.eval_rows, config.seed)]
    train = encode_rows(examples, shape, task, section)
    held_out = encode_rows(validation, shape, task, section) if validation else None
    shared = len(held_out.texts & train.texts) if held_out else 0
    if shared:
        log.warn(
            f"{shared:,} texts of the {len(validation):,} validation rows are also training rows: metrics will be "
            "optimistic"
        )
    return LabeledData(
        task=task,
        train=train,
        held_out=held_out,
        examples=(validation or examples)[: config.train.samples],
        batches=PaddedBatches(
            train,
            shape.layout,
            batch_size=config.train.batch_size,
            micro_batch_tokens=config.train.micro_batch_tokens,
            seed=config.seed,
        ),
        # Without a backward pass, batches may be larger.
        validation=by_length(held_out, shape.layout, 2 * config.train.micro_batch_tokens) if held_out else [],
        file=source.train[0].name,
        held_out_rows=held_out_rows,
    )


def encode_rows(
    examples: Sequence[Example], shape: Pretrained, task: Task, config: LabeledConfig, *, labeled: bool = True
) -> LabeledRows:
    """Tokenize examples and encode their labels; rows that are too long are cut, dropped or refused.

    Args:
        examples: At least one.
        shape: The model's tokenizer.
        task: The kind of label.
        config: Maximum lengths, and what to do with longer rows.
        labeled: Whether the rows have labels.

    Raises:
        InputError: A label does not fit the task, a row is too long, or none is left.
        UsageError: The model has fewer positions than are asked for.
    """
    max_tokens = shape.row_tokens(config.max_seq_length)
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples]
    second_texts = None if None in pairs else [pair or "" for pair in pairs]
    tokens = shape.encode(texts, second_texts, None)
    long = [place for place, (ids, _) in enumerate(tokens) if len(ids) > max_tokens]
    if long:
        _report_long(examples, [len(tokens[place][0]) for place in long], long, max_tokens, config)

    places = list(range(len(examples)))
    if config.too_long == "truncate" and long:
        long_second_texts = None if second_texts is None else [second_texts[place] for place in long]
        shortened = shape.encode([texts[place] for place in long], long_second_texts, max_tokens)
        for place, row in zip(long, shortened, strict=True):
            tokens[place] = row
    elif long:
        dropped = set(long)
        places = [place for place in places if place not in dropped]
    if not places:
        raise InputError(
            f"{config.path}: every row is longer than {max_tokens} tokens", hint="set data.too_long: truncate"
        )

    remaining = [examples[place] for place in places]
    labels = _labels(remaining, shape, task, config) if labeled else [_no_label(task)] * len(remaining)
    rows = []
    for place, label in zip(places, labels, strict=True):
        ids, types = tokens[place]
        rows.append(LabeledRow(ids, types, label, examples[place].source))
    return LabeledRows(rows)


def _no_label(task: Task) -> Any:
    """What takes the label's place in a row without one: no tokens, or a 0."""
    return np.zeros(0 if task.kind == "seq2seq" else (), np.int64)


def _report_long(
    examples: Sequence[Example], lengths: Sequence[int], long: Sequence[int], max_tokens: int, config: LabeledConfig
) -> None:
    """Warn about rows that are too long.

    Raises:
        InputError: The config wants it to be an error.
    """
    first = examples[long[0]].source
    if config.too_long == "error":
        raise InputError(
            f"{first}: {lengths[0]} tokens, more than the {max_tokens} allowed ({len(long):,} such rows)",
            hint="raise data.max_seq_length, or set data.too_long: truncate",
        )
    action = "cut" if config.too_long == "truncate" else "dropped"
    log.warn(
        f"{len(long):,} of {len(examples):,} rows have more than {max_tokens} tokens and are {action} (the longest has "
        f"{max(lengths):,}; the first is {first})"
    )


def _labels(examples: Sequence[Example], shape: Pretrained, task: Task, config: LabeledConfig) -> list[Any]:
    """The label of each row in the form that the objective takes: an id, a number, or the tokens of a text.

    Raises:
        InputError: A label is not among those of the task or not a number, or a text is too long.
    """
    if task.kind == "classification":
        names = Labels(task.labels)
        return [np.array(names.id(example), np.int64) for example in examples]
    if task.kind == "regression":
        return [np.array(_number(example), np.float32) for example in examples]

    targets = [ids for ids, _ in shape.encode([example.label or "" for example in examples], None, None)]
    max_tokens = shape.target_tokens(config.max_target_length)
    long = [place for place, ids in enumerate(targets) if len(ids) > max_tokens]
    if long:
        if max_tokens == config.max_target_length:
            limit, remedy = "data.max_target_length", "raise it"
        else:
            limit, remedy = "the model's positions,", "shorten these texts"
        raise InputError(
            f"{examples[long[0]].source}: a target of {len(targets[long[0]])} tokens, more than "
            f"{limit} {max_tokens} ({len(long):,} such rows)",
            hint=f"{remedy}: the model would learn to stop where a target is cut",
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


def apply_with_head(run: Run, model: nn.Module, head: Sequence[str], task: Task) -> Method:
    """Change ``model`` in place into one that trains by the run's method, and its head beside it.

    Returns:
        The method as it is on this model.

    Raises:
        UsageError: The settings do not fit the model.
    """
    method = run.config.peft
    if rows_for_init(method):
        raise UsageError(
            "peft.init: eva and lora-ga need a decoder, but this is an encoder or encoder-decoder",
            hint="use peft.init=pissa",
        )
    method = with_modules_to_save(method, head)
    if isinstance(method, AdapterMethod) and run.init_adapter is not None:
        trained = read_adapter(run.init_adapter).task
        if trained is not None and trained != task.to_json():
            raise InputError(
                f"{run.init_adapter}: predicts {Task.from_json(trained)}, but the rows ask for {task}",
                hint="give rows with the same labels, or start a new adapter without peft.init_adapter",
            )
        start_from(model, method, run.init_adapter, run.config.model.path)
    else:
        method.apply(model)
    return method


def checkpoint_activations(model: Any, how: str) -> None:
    """Recompute activations in the backward pass, layer by layer, instead of keeping them.

    Raises:
        UsageError: The model, or transformers, does not support it.
    """
    if how == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise UsageError(f"train.activation_checkpointing: {how} is not supported by this model, expected none")
    if how != "full":
        raise UsageError(f"train.activation_checkpointing: {how} is not supported by this model, expected none or full")
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # transformers before 5.20
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def plan_labeled(run: Run, model: nn.Module, data: LabeledData) -> None:
    """Print what will be trained, and on what data, before the first step.

    Raises:
        DiskError: The disk has too little space.
        UsageError: The best weights are to be chosen by a metric that is not measured.
    """
    config = run.config
    check_best_metric(config.train, data.task.objective)
    show_what_trains(model)
    total = config.train.total_steps(data.batches.steps_per_epoch)
    warn_of(config, total, validated=bool(data.validation))

    counts = data.train.token_counts
    steps = min(data.batches.steps_per_epoch, _EXAMINED_STEPS)
    micro_batches = [places for step in range(steps) for places in data.batches.places(step)]
    tokens = sum(int(counts[places].sum()) for places in micro_batches)
    padding = 1 - tokens / padded_tokens(micro_batches, counts)

    trainable = list(trainable_state(model).values())
    trainable_bytes = sum(4 * tensor.numel() for tensor in trainable)  # float32
    # The last checkpoints, the best one, and one that is being written; and the result.
    checkpoints = config.train.keep_last + 2
    disk = (trainable_bytes + state_bytes(config.optimizer, trainable)) * checkpoints + trainable_bytes

    table = [
        *planned_rows(run, model),
        ["task", str(data.task)],
        ["training rows", f"{len(data.train):,}: {int(counts.sum()):,} tokens, longest row {int(counts.max()):,}"],
        ["padding", f"{padding:.1%} of computed tokens, {len(micro_batches) / steps:.3g} micro-batches per step"],
        *planned_steps(config, data.batches.steps_per_epoch, len(data.held_out or ()), data.held_out_rows),
        ["best weights by", config.train.best_metric],
        ["estimated disk space", human_bytes(disk)],
        ["run folder", str(run.folder)],
    ]
    log.table("Plan", ["what", "value"], table)
    require_free_space(run.folder, disk, "this run")


def prediction_samples(
    model: nn.Module, shape: Pretrained, config: ClassifyConfig, data: LabeledData
) -> Callable[[int], None]:
    """A function of the step that prints predictions for the sample rows beside their labels."""
    if not data.examples:
        return lambda _: None
    rows = encode_rows(data.examples, shape, data.task, config.data.model_copy(update={"too_long": "truncate"}))
    batches = by_length(rows, shape.layout, config.train.micro_batch_tokens)

    def show(step: int) -> None:
        training = model.training
        model.eval()
        predictions = predict(
            model,
            shape.tokenizer,
            data.task,
            batches,
            max_target_length=shape.target_tokens(config.data.max_target_length),
        )
        for example, prediction in zip(data.examples, predictions, strict=True):
            probability = "" if prediction.probability is None else f" ({prediction.probability:.0%})"
            text = log.shortened(example.text, 80)
            log.note(f"step {step}: {text!r}: {prediction.answer}{probability}, expected {example.label}")
        model.train(training)

    return show


def save_result(run: Run, model: Any, shape: Pretrained, method: Method, data: LabeledData, result: FitResult) -> Path:
    """Write the adapter with the head, or after full finetuning the whole model with its tokenizer.

    Raises:
        DiskError: It cannot be written.
    """
    metrics = {"Task": str(data.task), **summary(result)}
    if method.kind != "full":
        return save_adapter(
            model,
            method,
            run.folder / "adapter",
            base=shape.folder,
            data=data.about,
            metrics=metrics,
            task=data.task.to_json(),
            task_type=data.task.peft_type,
        )
    target = run.folder / "model"
    card = card_of_model(run, data.about, metrics)
    with atomic_folder(target, replace=True) as temporary, disk_errors(target):
        model.save_pretrained(temporary)
        shape.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target
