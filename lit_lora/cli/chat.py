"""``lit-lora chat``: talk to a model."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import answering as options
from lit_lora.config import did_you_mean
from lit_lora.errors import LitLoraError, UsageError

if TYPE_CHECKING:
    from lit_lora.generate import ChatSession
    from lit_lora.open.decoder import OpenedModel

__all__ = ["command"]


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, a run folder or an adapter folder.")],
    adapter: options.Adapter = None,
    system: options.System = None,
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
    """Talk to a model. /help lists what you can do beside talking; Ctrl-C stops an answer, Ctrl-D ends.

    In a pipe, every line of input is one message, and only the answers go to stdout.

    Examples:
        lit-lora chat out/quickstart

        lit-lora chat MODEL --temperature 0.7 --system "Be brief."

        echo "Where is my order 48213?" | lit-lora chat out/quickstart
    """
    sampling = options.sampling_from(
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

    how: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize, "drop_layers": drop_layers}
    opened = open_model(model, adapter=adapter, **how)
    if template is not None:
        options.read_template(opened.tokenizer, template)

    def with_adapter(chosen: Path | None) -> OpenedModel:
        left = opened.adapter if chosen is None else None
        held = held_base(opened.base, left) if left is not None else None  # the base stays as it was trained on
        other = open_model(opened.base, adapter=chosen, **{**how, "quantize": quantize or held})
        if template is not None:
            other.tokenizer.use_template(opened.tokenizer.template.text, str(template))
        return other

    session = ChatSession(opened.model, opened.tokenizer, sampling, system=system, stop=stop or [])
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _Chat(session, with_adapter, terminal=False).read_lines()
        return
    log.note(opened.description)
    variety = "the same answer every time (--temperature 0.7 for variety)"
    log.note(variety if sampling.temperature == 0 else f"temperature {sampling.temperature:g}")
    log.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    _Chat(session, with_adapter, terminal=True).talk()
    command_line = options.next_command("generate", model, adapter)
    log.note(f"next, for many prompts at once: {command_line} --file prompts.jsonl --out answers.jsonl")


# name -> (argument, what it does); each has a method of its name
_COMMANDS = {
    "reset": ("", "forget the conversation, keep the system prompt"),
    "system": ("TEXT", "forget the conversation and set the system prompt; none without TEXT"),
    "undo": ("", "take your last message and its answer back"),
    "save": ("FILE", "write the conversation as one JSON line, ready to train on"),
    "adapter": ("DIR|off", "put another adapter on the model, or none; the conversation stays"),
    "help": ("", "this list; a message that begins with / is written with //"),
    "exit": ("", "end, as Ctrl-D does"),
}


class _Chat:
    """Lines in, answers out.

    Args:
        session: The conversation.
        with_adapter: Opens the same base with another adapter, or with none.
        terminal: Somebody is typing: prompt, go on after an error, and let Ctrl-C stop only the answer.
    """

    def __init__(
        self, session: ChatSession, with_adapter: Callable[[Path | None], OpenedModel], *, terminal: bool
    ) -> None:
        self._session = session
        self._with_adapter = with_adapter
        self._terminal = terminal
        self._saved: set[Path] = set()

    def talk(self) -> None:
        """Prompt for lines until the end of input."""
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - importing it gives input() line editing and history
        going_on = True
        while going_on:
            try:
                going_on = self._handle(input("you> "))
            except EOFError:
                log.say()
                return
            except KeyboardInterrupt:
                log.say()
                log.note("Ctrl-D or /exit ends")
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
        """Answer a message or do a command; false to end."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/"))
            return True
        name, _, argument = line[1:].partition(" ")
        if name not in _COMMANDS:
            raise UsageError(f"unknown command /{name}{did_you_mean(name, _COMMANDS)}", hint="/help lists them")
        if name != "exit":
            getattr(self, f"_{name}")(argument.strip())
        return name != "exit"

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
            log.note("cut off: --max-new-tokens N allows longer answers")

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._note("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self._session.reset(text)
        self._note("the conversation starts anew" + ("" if text else ", without system prompt"))

    def _undo(self, _: str) -> None:
        self._note("taken back" if self._session.undo() else "there is nothing to take back")

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
        opened = self._with_adapter(None if name == "off" else Path(name))
        self._session.use(opened.model, opened.tokenizer)
        self._note(opened.description)

    def _help(self, _: str) -> None:
        for name, (argument, what) in _COMMANDS.items():
            log.note(f"{f'/{name} {argument}':<18} {what}")

    def _note(self, text: str) -> None:
        if self._terminal:
            log.note(text)
