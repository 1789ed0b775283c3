"""The command line answers at once: help, the version and a mistyped command import nothing heavy."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from lit_lora import __version__
from lit_lora.cli import COMMANDS, main

HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "safetensors", "tokenizers", "matplotlib", "gguf")
# Runs the command line in a process of its own, then says which heavy modules that imported.
PROBE = f"""
import sys
from lit_lora.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def call(*arguments: str) -> tuple[int, str, str, str]:
    """Exit code, stdout, stderr without its last line, and that line: what was imported."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    *rest, imported = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(rest), imported


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code, out, _, imported = call("--help")
    assert (code, imported) == (0, "imported:")
    commands = out.partition("Commands")[2]
    assert re.findall(r"^│ ([\w-]+)", commands, flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy_and_shows_examples(name: str) -> None:
    code, out, err, imported = call(name, "--help")
    assert (code, err, imported) == (0, "", "imported:")
    assert f"Usage: lit-lora {name}" in out
    _, _, examples = out.partition("Examples:")
    assert re.search(rf"^ lit-lora {name}\b", examples, flags=re.MULTILINE)


def test_a_mistyped_command_is_told_the_nearest() -> None:
    code, out, err, imported = call("fintune")
    assert (code, out, imported) == (2, "", "imported:")
    assert "No such command 'fintune'. Did you mean 'finetune'?" in err


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lit_lora", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    done = subprocess.run([sys.executable, "-m", "lit_lora", "fintune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_no_command_shows_the_help() -> None:
    code, out, _, _ = call()
    assert code == 2
    assert "quickstart" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert (done.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_its_module(name: str) -> None:
    module, line = COMMANDS[name]
    assert module == f"lit_lora.cli.{name.replace('-', '_')}"
    assert importlib.import_module(module).command.__doc__
    assert line.endswith(".")
