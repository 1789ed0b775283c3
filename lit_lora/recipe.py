"""What all recipes share: the config, the start of a run, the data, the plan that is printed before training.

A recipe in ``finetune/`` is the one place where a model, a method, data and the loop meet; this module holds the steps
that would otherwise be written in each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import torch
from pydantic import Discriminator, Field, Tag, ValidationError, create_model, model_validator
from pydantic.json_schema import models_json_schema
from torch import nn

from lit_lora import log
from lit_lora.config import Settings, did_you_mean, dump_yaml, find_config, load_config, read_yaml
from lit_lora.data import DataConfig, Prepared, cache_folder, prepare
from lit_lora.data.batches import Batches, MicroBatch, validation_batches
from lit_lora.data.config import RowsConfig
from lit_lora.data.rows import Row
from lit_lora.errors import LitLoraError, OutOfMemoryError, UsageError
from lit_lora.estimate import Estimate, RowLengths, Setup, estimate, on_paper
from lit_lora.estimate.advice import Advice, advise
from lit_lora.files import human_bytes, require_free_space, write_text
from lit_lora.generate import Sampling, answer_all
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft import METHODS, Kind, Method, count_parameters, matched_table, methods
from lit_lora.peft.frozen import keep_frozen, keep_method
from lit_lora.quantize import QuantizeConfig, Quantized, count_quantized, found_config, stored_bytes
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import choose_device, choose_dtype, free_memory_bytes
from lit_lora.train.loop import FitResult, TrainConfig, check_figures
from lit_lora.train.objective import NextToken
from lit_lora.train.optimizer import OptimizerConfig
from lit_lora.train.schedule import ScheduleConfig

__all__ = [
    "RECIPES",
    "FinetuneConfig",
    "ModelSettings",
    "Options",
    "QuantizedConfig",
    "Run",
    "RunConfig",
    "RunData",
    "answer_samples",
    "claim_folder",
    "config_schema",
    "duration",
    "execute",
    "finetune_config",
    "finish",
    "in_words",
    "load_data",
    "load_recipe",
    "load_settings",
    "main",
    "plan",
    "planned_rows",
    "planned_steps",
    "recipe_for",
    "row_lengths",
    "show_what_trains",
    "start",
    "summary",
    "warn_of",
]

# `recipe:` in a config -> the file in finetune/ that runs it
RECIPES: dict[str, str] = {
    "lora": "lit_lora.finetune.lora",
    "qlora": "lit_lora.finetune.qlora",
    "adapter": "lit_lora.finetune.adapter",
    "full": "lit_lora.finetune.full",
    "classify": "lit_lora.finetune.classify",
}


class ModelSettings(Settings):
    """The base model, and how it is held."""

    path: Path = Field(description="Checkpoint folder, as written by lit-lora download or convert.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Precision of the base weights; auto is bf16 where the hardware multiplies it."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")


class RunConfig(Settings):
    """One finetuning run; the YAML file's sections."""

    recipe: str = Field("lora", description="Which recipe runs: lora, qlora, adapter, full or classify.")
    model: ModelSettings = Field(description="The base model.")
    data: RowsConfig = Field(description="The rows to learn from.")
    peft: Method = Field(description="The method and its settings; name picks it.")
    train: TrainConfig = Field(TrainConfig(), description="How long and in what portions.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over the run.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the split, the order of rows, initial values and dropout.")
    out: Path = Field(Path("out/finetune"), description="The run folder.")

    kinds: ClassVar[tuple[Kind, ...]] = ("low-rank",)
    """Which methods the recipe runs; the first of these kinds is the default."""

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_method(cls, data: Any) -> Any:
        """Refuse a method of another recipe by naming that recipe; take the method's learning rate if none is given."""
        section = data.get("peft", {}) if isinstance(data, dict) else None
        name = section.get("name", next(iter(methods(*cls.kinds)))) if isinstance(section, dict) else None
        if name not in METHODS:
            return data  # reported with the section
        kind = METHODS[name][0]
        if kind not in cls.kinds:
            raise ValueError(f"peft.name: {name!r} is not for this recipe (did you mean recipe: {recipe_for(name)}?)")
        optimizer = data.get("optimizer", {})
        if not isinstance(optimizer, dict) or "lr" in optimizer:
            return data
        try:
            lr = methods()[name].model_validate(section).lr
        except ValidationError:
            return data  # reported with the section
        return data if lr is None else {**data, "optimizer": {**optimizer, "lr": lr}}


class FinetuneConfig(RunConfig):
    """A run of a decoder, which learns to answer."""

    data: DataConfig = Field(description="The rows to learn from.")


class QuantizedConfig(FinetuneConfig):
    """A run over a quantised base."""

    quantize: QuantizeConfig = Field(QuantizeConfig(), description="How the base model's linear layers are held.")


def load_settings(recipe: str) -> type[RunConfig]:
    """The settings class of a recipe."""
    config: type[RunConfig] = importlib.import_module(RECIPES[recipe]).Config
    return config


def recipe_for(method: str) -> str:
    """The first recipe that runs a method of the table."""
    kind = METHODS[method][0]
    return next(recipe for recipe in RECIPES if kind in load_settings(recipe).kinds)


def finetune_config(
    recipe: str, *kinds: Kind, base: type[RunConfig] = FinetuneConfig, **defaults: Any
) -> type[RunConfig]:
    """The config of a recipe: ``peft`` takes the methods of its kinds, and sections may get other defaults.

    Args:
        recipe: Its name.
        kinds: Which methods it runs; the first of these kinds is the default.
        base: A config with further sections.
        defaults: Section name: default value.
    """
    table = methods(*kinds)
    first = next(iter(table))

    def name_of(value: Any) -> str:
        return str(value.get("name", first) if isinstance(value, dict) else getattr(value, "name", first))

    tagged = tuple(Annotated[settings, Tag(name)] for name, settings in table.items())
    one = len(table) == 1
    union = table[first] if one else Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007
    fields: dict[str, Any] = {
        "recipe": (Literal[recipe], Field(recipe, description="Which recipe runs.")),
        "peft": (union, Field(table[first](), description=base.model_fields["peft"].description)),
    }
    for name, default in defaults.items():
        known = base.model_fields[name]
        fields[name] = (known.annotation, Field(default, description=known.description))
    config = create_model(f"{recipe.capitalize()}Config", __base__=base, **fields)
    config.kinds = kinds
    return config


@dataclass(frozen=True)
class Options:
    """What the command line asks of a run beside its config."""

    dry_run: bool = False
    """Stop before the first step, write nothing."""
    resume: bool = False
    """Continue after the newest checkpoint of the run folder."""
    overwrite: bool = False
    """Replace a run that is in the folder already."""


@dataclass(frozen=True)
class Run:
    """A started run."""

    config: RunConfig
    options: Options
    device: torch.device
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.config.out


@dataclass
class RunData:
    """The rows, portioned."""

    batches: Batches
    validation: list[MicroBatch]
    prepared: Prepared
    samples: list[tuple[list[int], list[int]]]
    """Validation rows that are answered while training: token ids of the prompt, and of the answer in the data."""

    @property
    def about(self) -> str:
        """One line on what it is, for a model card."""
        return f"{self.prepared.train_files[0].name}, {len(self.prepared.train):,} rows"


def start(config: RunConfig, options: Options) -> Run:
    """Seed, choose device and dtype, and look whether the run folder can be used.

    Raises:
        UsageError: The folder holds another run, or none to resume, or the device is not there.
    """
    torch.manual_seed(config.seed)
    device = choose_device(config.model.device)
    run = Run(config, options, device, choose_dtype(config.model.dtype, device))
    saved = run.folder / "config.yaml"
    if options.resume and not saved.is_file():
        raise UsageError(f"{run.folder}: holds no run to resume", hint="leave --resume out to start one")
    if options.resume:
        _check_same_run(saved, config)
    elif saved.is_file() and not (options.overwrite or options.dry_run):
        raise UsageError(
            f"{run.folder}: holds a run already",
            hint="--resume continues it, --overwrite replaces it, out=FOLDER starts another beside it",
        )
    return run


def claim_folder(run: Run, model: nn.Module, method: Method | None = None) -> None:
    """Make the run folder, with the config in it; a run that is to be replaced is removed only now.

    What the adapter has beside what trains is kept there, and taken from there where the run is resumed.

    Args:
        run: The run.
        model: With its method applied.
        method: As it was applied, where a start from rows may have changed its settings.

    Raises:
        DiskError: The folder cannot be written.
        InputError: What a run to resume has kept does not fit.
    """
    if run.options.overwrite and not run.options.resume:
        _remove_run(run.folder)
    keep_frozen(model, run.folder / "start", resume=run.options.resume)
    if method is not None and method.rows_to_start and not run.options.resume:
        keep_method(run.folder / "start", method)
    write_text(run.folder / "config.yaml", dump_yaml(run.config))


# What a resumed run may do differently; anything else makes it another run.
_MAY_CHANGE = {"out", "model.device", "train.micro_batch_tokens", "train.activation_checkpointing"} | {
    f"train.{key}" for key in ("eval_every", "save_every", "keep_last", "patience", "samples")
}


def _check_same_run(saved: Path, config: RunConfig) -> None:
    """Refuse to resume under another config.

    Raises:
        UsageError: Naming the keys that differ.
    """
    old, new = _flat(load_config(saved, type(config))), _flat(config)
    differing = [key for key in new.keys() | old.keys() if key not in _MAY_CHANGE and old.get(key) != new.get(key)]
    if differing:
        raise UsageError(
            f"{saved}: the run to resume has other settings: {', '.join(sorted(differing))}",
            hint="resume with the same config, or start a new run with out=ANOTHER_FOLDER",
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    """``section.key`` to value."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        flat.update(
            {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat


def _remove_run(folder: Path) -> None:
    """Remove what a former run wrote into ``folder``, and nothing else."""
    for name in ("checkpoints", "start", "adapter", "base", "model", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = [folder / name for name in ("metrics.jsonl", "loss.png", "result.json")]
    for path in [*files, *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)


def load_data(run: Run, tokenizer: Tokenizer) -> RunData:
    """Tokenise (or take from the cache), report, and portion the rows.

    Raises:
        InputError: The data cannot be read, or no row can be learned from.
    """
    config = run.config
    assert isinstance(config, FinetuneConfig)
    prepared = prepare(config.data, tokenizer, cache=cache_folder(), seed=config.seed)
    for line in prepared.report.lines():
        log.note(line)
    batches = Batches(
        prepared.train,
        batch_size=config.train.batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.seed,
    )
    validation = prepared.validation
    if validation is None:
        return RunData(batches, [], prepared, [])
    held_out = list(validation_batches(validation, config.train.micro_batch_tokens))
    samples = [_sample(validation[number]) for number in range(min(config.train.samples, len(validation)))]
    return RunData(batches, held_out, prepared, samples)


def _sample(row: Row) -> tuple[list[int], list[int]]:
    """The first answer of a row and what stands before it; plain text is to be continued after a few words."""
    ids, learned = row.input_ids.tolist(), row.learn.tolist()
    start = learned.index(True, 1)
    if start == 1:
        start = min(len(ids) // 2, 32)
    end = learned.index(False, start) if False in learned[start:] else len(ids)
    return ids[:start], ids[start:end]


def answer_samples(model: CausalLM, tokenizer: Tokenizer, data: RunData) -> Callable[[int], None]:
    """A function of the step that answers the sample rows and prints the answers beside those of the data.

    It draws no random numbers and leaves the model as it was, so a run with samples trains like one without.
    """
    context = model.context
    samples = [(prompt, expected) for prompt, expected in data.samples if len(prompt) < context]
    sampling = Sampling(max_new_tokens=60)

    def answer(step: int) -> None:
        training = model.training
        model.eval()
        answers = answer_all(model, tokenizer, [prompt for prompt, _ in samples], sampling)
        model.train(training)
        for given, (_, expected) in zip(answers, samples, strict=True):
            log.note(f"step {step}: answers {_short(given.text)}, expected {_short(tokenizer.decode(expected))}")

    return answer


def _short(text: str) -> str:
    """One line of at most 100 characters, in quotes."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 100 else text[:99] + "…")


def plan(run: Run, model: CausalLM, data: RunData) -> None:
    """Print what will train, on how much, and what it needs, before the first step.

    Raises:
        DiskError: The disk has too little room for it.
        UsageError: The best weights are to be picked by what is not measured.
    """
    config, rows = run.config, data.prepared.train
    check_figures(config.train, NextToken())
    show_what_trains(model)
    total = config.train.total_steps(data.batches.steps_per_epoch)
    warn_of(config, total, validated=bool(data.validation))
    _warn_of_length(model, data)
    lengths = RowLengths(rows.token_counts, rows.target_counts)
    setup = Setup.of(config, shape=model.config, rows=lengths, dtype=run.dtype, device=run.device)
    figures = estimate(setup, on_paper(model))
    _warn_of_memory(setup, figures)
    tokens, learned = int(rows.token_counts.sum()), int(rows.target_counts.sum())
    table = [
        *planned_rows(run, model),
        *_base_row(model),
        ["training rows", f"{len(rows):,}: {tokens:,} tokens, {learned:,} of them learned"],
        *planned_steps(config, data.batches.steps_per_epoch, len(data.prepared.validation or ())),
        ["memory, about", human_bytes(figures.memory.total)],
        ["time, about", f"{duration((figures.seconds_per_step or 0) * total)}, without validation"],
        ["disk, about", human_bytes(figures.disk_bytes)],
        ["run folder", str(run.folder)],
    ]
    log.table("Plan", ["what", "figure"], table)
    require_free_space(run.folder, figures.disk_bytes, "this run")


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


def _base_row(model: CausalLM) -> list[list[str]]:
    """Bits and bytes of a quantised base."""
    quantize, layers = found_config(model), [module for module in model.modules() if isinstance(module, Quantized)]
    if quantize is None:
        return []
    held = sum(stored_bytes(layer) for layer in layers)
    bits = f"{8 * held / count_quantized(model):.2f} bits a weight"
    return [["base", f"{quantize}: {count_quantized(model):,} weights in {human_bytes(held)}, {bits}"]]


def _warn_of_memory(setup: Setup, figures: Estimate) -> None:
    """Say it when a loaded model will not fit while it trains, and what would."""
    free, memory = free_memory_bytes(setup.device), figures.memory
    there = memory.process + (memory.weights if setup.device.type == "cuda" else 0)  # a CPU's are mapped, not yet read
    if free is None or memory.total - there <= free:
        return
    log.warn(
        f"this run needs about {human_bytes(memory.total - there)} more, {human_bytes(free)} are free: "
        f"{in_words(advise(setup, free + there))}"
    )


def in_words(tried: Sequence[Advice]) -> str:
    """What makes a run fit, or how near its settings can get."""
    best = min(tried, key=lambda advice: (not advice.fits, advice.memory_bytes), default=None)
    if best is None:
        return "take a smaller model"
    settings, needed = " ".join(best.overrides), human_bytes(best.memory_bytes)
    return f"{settings} needs {needed}" if best.fits else f"even {settings} needs {needed}: take a smaller model"


def row_lengths(config: FinetuneConfig) -> RowLengths:
    """Of the training rows, tokenised or from the cache.

    Raises:
        InputError: Tokenizer or data are not there, or not readable.
    """
    prepared = prepare(config.data, Tokenizer.load(config.model.path), cache=cache_folder(), seed=config.seed)
    return RowLengths(prepared.train.token_counts, prepared.train.target_counts)


def execute(recipe: Callable[[Any, Options], Path], config: RunConfig, options: Options) -> Path:
    """Run a recipe.

    Raises:
        OutOfMemoryError: With the settings that would fit.
    """
    try:
        return recipe(config, options)
    except OutOfMemoryError as error:
        if not isinstance(config, FinetuneConfig):
            raise
        device = choose_device(config.model.device)
        shape, dtype = ModelConfig.from_folder(config.model.path), choose_dtype(config.model.dtype, device)
        setup = Setup.of(config, shape=shape, rows=row_lengths(config), dtype=dtype, device=device)
        # What was free is not known any more; what was planned was too much.
        tried = advise(setup, 0.8 * estimate(setup).memory.total)
        raise OutOfMemoryError(str(error), hint=f"{in_words(tried)} by lit-lora estimate") from error


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


def finish(run: Run, result: FitResult, written: Path, next_command: str) -> None:
    """Print what came out and what to type next, and write ``result.json``: with it the run is complete."""
    rows = [[name, f"{value:.4f}" if isinstance(value, float) else value] for name, value in summary(result).items()]
    log.table("Result", ["what", "figure"], rows)
    before, after = result.untrained_validation_loss, result.validation_loss
    if before is not None and after is not None and after >= before:
        log.warn(
            "the validation loss did not fall: try a lower optimizer.lr, and look at the rows with "
            "lit-lora prepare FILE --show 3"
        )
    figures = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    weights = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    write_text(run.folder / "result.json", json.dumps({**figures, "written_bytes": weights}, indent=1) + "\n")
    log.say(f"wrote {written}, plot {run.folder / 'loss.png'}", style="bold green")
    log.say(f"next: {next_command}")


def summary(result: FitResult) -> dict[str, object]:
    """The figures of a run for its model card and its closing lines."""
    figures = {
        "Steps": result.steps,
        "Best step": result.best_step,
        "Training loss": result.loss,
        "Validation loss before training": result.untrained_validation_loss,
        "Validation loss": result.validation_loss,
        **{f"Validation {name.replace('_', ' ')}": value for name, value in result.figures.items()},
        "Tokens per second": round(result.tokens_per_second),
        "Peak memory": human_bytes(result.peak_memory_bytes),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def load_recipe(source: str | Path, overrides: Sequence[str]) -> tuple[Callable[..., Path], Any]:
    """The recipe that a config file names, and its config, a :class:`RunConfig` of the recipe's own.

    Args:
        source: Path of a YAML file or name of a shipped one.
        overrides: ``key.sub=value``.

    Raises:
        UsageError: Unknown recipe, or problems in the config, all at once.
    """
    # Problems of the YAML are reported by load_config, with all others.
    data = read_yaml(find_config(source), problems=[])
    given = [override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
    if isinstance(data, dict) and "runs" in data:
        raise UsageError(f"{source}: is a comparison of runs", hint=f"lit-lora compare --config {source}")
    name = str(given[-1] if given else data.get("recipe", "lora") if isinstance(data, dict) else "lora")
    if name not in RECIPES:
        raise UsageError(
            f"{source}: recipe {name!r} is not known{did_you_mean(name, RECIPES)}, known: {', '.join(RECIPES)}"
        )
    module = importlib.import_module(RECIPES[name])
    return module.finetune, load_config(source, module.Config, overrides)


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, by which an editor completes and checks the YAML; ``recipe`` picks the part."""
    configs = {name: load_settings(name) for name in RECIPES}
    parts, schema = models_json_schema([(config, "validation") for config in configs.values()])
    cases = []
    for name, config in configs.items():
        case: dict[str, Any] = {"properties": {"recipe": {"const": name}}}
        if name != RunConfig.model_fields["recipe"].default:
            case["required"] = ["recipe"]
        cases.append({"if": case, "then": parts[config, "validation"]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lit-lora config",
        "type": "object",
        "properties": {"recipe": {"enum": list(configs)}},
        "allOf": cases,
        **schema,
    }


def main(recipe: Callable[[Any, Options], Path], config: type[RunConfig]) -> None:
    """The ``__main__`` of a recipe file: ``python finetune/lora.py --config FILE [key=value …]``.

    Raises:
        SystemExit: With the error's exit code.
    """
    parser = argparse.ArgumentParser(description=sys.modules[recipe.__module__].__doc__)
    parser.add_argument("--config", required=True, help="path of a YAML file, or name of a shipped config")
    parser.add_argument("--dry-run", action="store_true", help="everything up to the first step")
    parser.add_argument("--resume", action="store_true", help="continue after the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder already")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.max_steps=20")
    arguments = parser.parse_args()
    options = Options(arguments.dry_run, arguments.resume, arguments.overwrite)
    try:
        execute(recipe, load_config(arguments.config, config, arguments.overrides), options)
    except LitLoraError as error:
        raise SystemExit(error.report()) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def duration(seconds: float) -> str:
    """``125.0`` as ``2 min 5 s``."""
    if seconds < 1:
        return "less than a second"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
