"""What ``generate`` and ``chat`` share: the options that say how to answer, and the template of another file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log

if TYPE_CHECKING:
    from lit_lora.generate import Sampling
    from lit_lora.tokenizer import Tokenizer

__all__ = [
    "Adapter",
    "Device",
    "DropLayers",
    "Dtype",
    "MaxNewTokens",
    "MinP",
    "Quantize",
    "RepetitionPenalty",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "Template",
    "TopK",
    "TopP",
    "next_command",
    "read_template",
    "sampling_from",
]

Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="Put this adapter (or run folder's) on the model.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: the most likely token each time; 0.7: some variety.")]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Draw among the K most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that sum to this.")]
MinP = Annotated[float | None, typer.Option(help="Draw among tokens this likely, relative to the best.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same draws again.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Also end at this text; may be repeated.")]
Template = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Another chat template than the model's own (Jinja).")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="fp32, bf16 or fp16; if omitted, the fastest here, or what a merge kept its update in."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="Hold the base in nf4-dq, nf4, fp4-dq, fp4, int8 or none; as trained if omitted."
    ),
]
DropLayers = Annotated[
    int, typer.Option(metavar="N", min=0, help="AdapterDrop: leave the adapters of the first N layers out.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


def sampling_from(**given: Any) -> Sampling:
    """Sampling settings from the options.

    Raises:
        UsageError: A value is out of range.
    """
    from lit_lora.config import validate
    from lit_lora.generate import Sampling

    return validate(given, Sampling, name="command line")


def next_command(name: str, model: Path, adapter: Path | None) -> str:
    """A command line on the same model, to paste."""
    words = ["lit-lora", name, str(model), *(["--adapter", str(adapter)] if adapter else [])]
    return shlex.join(words)


def read_template(tokenizer: Tokenizer, file: Path) -> None:
    """Use the chat template of ``file``, and show on stderr what it changes.

    Raises:
        InputError: The file cannot be read or is not a template.
    """
    import difflib

    from lit_lora.errors import InputError
    from lit_lora.tokenizer import Message

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a chat template: {error}") from error
    chat: list[Message] = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    own = tokenizer.template.render(chat, generation_prompt=True)
    tokenizer.use_template(text, str(file))
    other = tokenizer.template.render(chat, generation_prompt=True)
    if own == other:
        log.note(f"{file}: writes conversations as the model's own template does")
        return
    log.warn(f"{file} is used in the place of the template that the model was trained with; it changes:")
    for line in list(difflib.unified_diff(own.splitlines(), other.splitlines(), lineterm=""))[2:]:
        log.note(line)
