"""What ``generate`` and ``chat`` share: sampling settings, the template of another file, the command to try next."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora import log
from lit_lora.errors import InputError

if TYPE_CHECKING:
    from lit_lora.generate import Sampling
    from lit_lora.tokenizer import Message, Tokenizer

__all__ = ["next_command", "read_template", "sampling_from"]


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


def read_template(tokenizer: Tokenizer, file: Path) -> None:
    """Use the chat template in ``file``, and show on stderr what it changes.

    Raises:
        InputError: The file cannot be read or is not a template.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a chat template: {error}") from error

    chat: list[Message] = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    before = tokenizer.template.render(chat, generation_prompt=True)
    tokenizer.use_template(text, str(file))
    after = tokenizer.template.render(chat, generation_prompt=True)
    if before == after:
        log.note(f"{file}: formats conversations exactly like the model's own template")
        return
    log.warn(f"{file} replaces the template that the model was trained with, and formats conversations differently:")
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm=""))
    for line in diff[2:]:  # without the two lines of file names
        log.note(line)
