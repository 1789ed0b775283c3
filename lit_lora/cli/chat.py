"""``lit-lora chat``: chat with a model."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.answering import choose_template, next_command, reading_as_trained, sampling_from
from lit_lora.cli.prepare import reading_options
from lit_lora.config import did_you_mean
from lit_lora.errors import LitLoraError, UsageError

if TYPE_CHECKING:
    from lit_lora.data.trained import TrainedReading
    from lit_lora.generate import ChatSession
    from lit_lora.open.decoder import OpenedModel

__all__ = ["command"]


def command(
    model: options.Model,
    adapter: options.Adapter = None,
    system: options.System = None,
    columns: options.Columns = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    template: options.Template = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    drop_layers: options.DropLayers = 0,
) -> None:
    """Chat with a model. /help lists the commands of the chat; Ctrl-C stops an answer, Ctrl-D ends the chat.

    In a pipe, each line of input is one message, and only the answers go to stdout.

    Examples:
        lit-lora chat out/quickstart

        lit-lora chat MODEL --temperature 0.7 --system "Be brief."

        echo "Where is my order 48213?" | lit-lora chat out/quickstart
    """
    sampling = sampling_from(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    from lit_lora.generate import ChatSession
    from lit_lora.open.decoder import open_model
    from lit_lora.open.folders import held_base

    how: dict[str, Any] = {"dtype": dtype, "device": device, "drop_layers": drop_layers}
    opened = open_model(model, adapter=adapter, quantize=quantize, **how)
    if template is not None:
        choose_template(opened.tokenizer, template)

    given = reading_options(None, columns, None, system)
    reading = reading_as_trained(opened, given)

    def with_adapter(chosen: Path | None) -> tuple[OpenedModel, TrainedReading]:
        quantization: Any = quantize
        if quantization is None and chosen is None and opened.adapter is not None:
            # Without its adapter, the base stays quantized as the adapter was trained on it.
            quantization = held_base(opened.base, opened.adapter)
        other = open_model(opened.base, adapter=chosen, quantize=quantization, **how)
        if template is not None:
            other.tokenizer.choose_template(template)
        return other, reading_as_trained(other, given)

    session = ChatSession(
        opened.model,
        opened.tokenizer,
        sampling,
        system=reading.config.system,
        stop=stop or [],
        fill=reading.fill,
        fold=reading.config.system_role == "fold",
    )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _Chat(session, with_adapter, terminal=False).read_lines()
        return
    log.note(opened.description)
    if sampling.temperature == 0:
        log.note("temperature 0: the same answer every time (--temperature 0.7 for variety)")
    else:
        log.note(f"temperature {sampling.temperature:g}")
    log.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
    _Chat(session, with_adapter, terminal=True).talk()
    command_line = next_command("generate", model, adapter)
    log.note(f"next, for a file of prompts: {command_line} --file prompts.jsonl --out answers.jsonl")


# Name -> (argument, what it does). All but exit are a method _NAME of _Chat.
_COMMANDS = {
    "reset": ("", "start a new conversation with the same system prompt"),
    "system": ("TEXT", "start a new conversation with this system prompt, or with none"),
    "undo": ("", "remove your last message and its answer"),
    "save": ("FILE", "write the conversation as one JSON line, ready to train on"),
    "adapter": ("DIR|off", "use another adapter, or none; the conversation continues"),
    "help": ("", "show this list; to send a message that begins with /, type //"),
    "exit": ("", "end the chat, like Ctrl-D"),
}


class _Chat:
    """Lines in, answers out.

    Args:
        session: The conversation.
        with_adapter: Opens the same base with another adapter, or with none, and says how that was trained.
        terminal: Whether a person is typing: then prompt, continue after an error, and let Ctrl-C stop only the answer.
    """

    def __init__(
        self,
        session: ChatSession,
        with_adapter: Callable[[Path | None], tuple[OpenedModel, TrainedReading]],
        *,
        terminal: bool,
    ) -> None:
        self._session = session
        self._with_adapter = with_adapter
        self._terminal = terminal
        self._saved: set[Path] = set()

    def talk(self) -> None:
        """Prompt for lines until the end of input."""
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - importing it gives input() line editing and history
        continues = True
        while continues:
            try:
                continues = self._handle(input("you> "))
            except EOFError:
                log.say()
                return
            except KeyboardInterrupt:
                log.say()
                log.note("Ctrl-D or /exit ends the chat")
            except LitLoraError as error:
                error.report()

    def read_lines(self) -> None:
        """Answer every line of standard input.

        Raises:
            Exit: Ctrl-C.
        """
        try:
            for line in sys.stdin:
                if not self._handle(line.removesuffix("\n").removesuffix("\r")):
                    return
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    def _handle(self, line: str) -> bool:
        """Answer a message or run a command; return whether the chat continues."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/"))
            return True
        name, _, argument = line[1:].partition(" ")
        if name not in _COMMANDS:
            raise UsageError(f"unknown command /{name}{did_you_mean(name, _COMMANDS)}", hint="/help lists the commands")
        if name == "exit":
            return False
        getattr(self, f"_{name}")(argument.strip())
        return True

    def _answer(self, text: str) -> None:
        answer = self._session.ask(text)
        try:
            with contextlib.closing(answer):
                for piece in answer:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not self._terminal:
                raise
        log.say()
        if self._session.last.ended == "interrupted":
            log.note("stopped")
        elif self._session.last.ended == "length":
            log.note("cut off; --max-new-tokens N allows longer answers")

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._note("new conversation")

    def _system(self, text: str) -> None:
        self._session.reset(text)
        self._note("new conversation" if text else "new conversation, without a system prompt")

    def _undo(self, _: str) -> None:
        self._note("removed" if self._session.undo() else "nothing to undo")

    def _save(self, name: str) -> None:
        from lit_lora.files import require_new, write_text

        if not name:
            raise UsageError("/save needs a FILE")
        path = Path(name)
        if path not in self._saved:
            require_new(path, hint="choose another name, or remove it first")
        write_text(path, json.dumps({"messages": self._session.messages}, ensure_ascii=False) + "\n")
        self._saved.add(path)
        self._note(f"wrote {path}")

    def _adapter(self, name: str) -> None:
        if not name:
            raise UsageError("/adapter needs a folder, or off")
        opened, reading = self._with_adapter(None if name == "off" else Path(name))
        self._session.use(opened.model, opened.tokenizer, reading.fill, reading.config.system_role == "fold")
        self._note(opened.description)
        if any(message["role"] == "user" for message in self._session.messages):
            return  # the conversation goes on under its system message
        self._session.reset(reading.config.system or "")

    def _help(self, _: str) -> None:
        for name, (argument, effect) in _COMMANDS.items():
            usage = f"/{name} {argument}"
            log.note(f"{usage:<18} {effect}")

    def _note(self, text: str) -> None:
        if self._terminal:
            log.note(text)
