"""What ``generate`` and ``chat`` share: sampling settings, another chat template, the command to try next."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora import log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_lora.data.trained import TrainedReading
    from lit_lora.generate import Sampling
    from lit_lora.open.decoder import OpenedModel
    from lit_lora.tokenizer import Message, Tokenizer

__all__ = ["choose_template", "next_command", "reading_as_trained", "sampling_from"]


def reading_as_trained(opened: OpenedModel, given: Mapping[str, Any]) -> TrainedReading:
    """How the model's training read its rows, with the given keys of the section ``data`` instead; said on stderr.

    Raises:
        InputError: What is saved beside the weights cannot be used.
        UsageError: A given key has a wrong value.
    """
    from lit_lora.data.trained import read_reading

    reading = read_reading(opened.base, opened.adapter, given)
    if reading.about:
        log.note(f'{reading.about} (--system "" and --columns none turn these off)')
    return reading


def sampling_from(**options: Any) -> Sampling:
    """Sampling settings from the command's options.

    Raises:
        UsageError: A value is out of range.
    """
    from lit_lora.config import validate
    from lit_lora.generate import Sampling

    return validate(options, Sampling, name="command line")


def next_command(name: str, model: Path, adapter: Path | None) -> str:
    """The command line of another command on the same model."""
    words = ["lit-lora", name, str(model)]
    if adapter is not None:
        words += ["--adapter", str(adapter)]
    return shlex.join(words)


def choose_template(tokenizer: Tokenizer, name: str) -> None:
    """Use another chat template, and show on stderr what it changes.

    Raises:
        InputError: It cannot be read, is no template, or does not fit the tokenizer.
        UsageError: There is no such template.
    """
    chat: list[Message] = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    before = tokenizer.template.render(chat, generation_prompt=True)
    tokenizer.choose_template(name)
    after = tokenizer.template.render(chat, generation_prompt=True)
    if before == after:
        log.note(f"{name}: formats conversations exactly like the model's own template")
        return
    log.warn(f"{name} replaces the template that the model was trained with, and formats conversations differently:")
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm=""))
    for line in diff[2:]:  # without the two lines of file names
        log.note(line)
