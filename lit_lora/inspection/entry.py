"""Find out what is at a path or in a Hub repository."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_lora import hub
from lit_lora.checkpoint.convert import Source, open_source
from lit_lora.checkpoint.headers import Header, Headers, read_header
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.checkpoint.tensors import INDEX, Tensors, open_tensors, read_weight_map
from lit_lora.classify import is_encoder
from lit_lora.config import read_yaml
from lit_lora.errors import InputError
from lit_lora.files import read_json
from lit_lora.inspection.adapter import inspect_adapter
from lit_lora.inspection.model import inspect_encoder, inspect_model
from lit_lora.inspection.parts import matrices
from lit_lora.inspection.report import Inspection, Part
from lit_lora.inspection.tokenizer import inspect_tokenizer

__all__ = ["inspect"]

_HUB_ID = re.compile(r"\w[\w.\-]*/\w[\w.\-]*")
_ADAPTER = "adapter_config.json"
_SINGLE = "model.safetensors"


def inspect(source: str, *, revision: str | None = None, endpoint: str | None = None) -> Inspection:
    """Inspect a checkpoint, adapter, run, file or Hub repository; what is wrong with it is part of the result.

    Args:
        source: A path, or ``OWNER/NAME`` of the Hub, of which only configuration, tokenizer and headers are read.
        revision: Branch, tag or commit of a Hub repository.
        endpoint: The Hub's address; ``HF_ENDPOINT`` or the public one if omitted.

    Raises:
        InputError: There is nothing at the path, or the repository cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if _HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _repository(source, revision, endpoint)
    raise InputError(f"{source}: no such file or folder, nor OWNER/NAME of the Hub")


def _folder(folder: Path) -> Inspection:
    report = Inspection(str(folder))
    if (folder / _ADAPTER).is_file():
        report.kind = "adapter"
        inspect_adapter(report, folder, partial(_read_file, folder), local=True)
    elif (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        _inspect_run(report, folder)
    else:
        _inspect_checkpoint(report, folder)
    return report


def _inspect_run(report: Inspection, folder: Path) -> None:
    """A run: what it was asked to do, what came of it, and its adapter or model."""
    report.kind = "run"
    with report.noting_errors():
        config = read_yaml(folder / "config.yaml")
        result = read_json(folder / "result.json") if (folder / "result.json").is_file() else None
        data = config.get("data") or {}
        report.run = {
            "recipe": config.get("recipe", "lora"),
            "data": _data_paths(data),
            "complete": result is not None,
            "metrics": result or {},
        }
    if (folder / "adapter" / _ADAPTER).is_file():
        inspect_adapter(report, folder / "adapter", partial(_read_file, folder / "adapter"), local=True)
    elif (folder / "model" / "config.json").is_file():
        _inspect_checkpoint(report, folder / "model")
    else:
        report.warn(
            "this run has written no adapter and no model yet",
            hint=f"lit-lora finetune --config {folder / 'config.yaml'} --resume",
        )


def _data_paths(section: Any) -> str | None:
    """The paths of a run's data sets, in one line."""
    if not isinstance(section, dict):
        return None
    entries = section.get("mix") or [section]
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return ", ".join(str(path) for path in paths if path) or None


def _inspect_checkpoint(report: Inspection, folder: Path) -> None:
    """A folder with weights in any format."""
    if not (folder / INDEX).is_file() and not (folder / _SINGLE).is_file():
        with report.noting_errors():
            _inspect_source(report, open_source(folder), folder)
        return
    report.format = "safetensors"
    headers: dict[str, Header] = {}
    tensors: Tensors | None = None
    with report.noting_errors():
        for file in _shards(folder):
            headers |= _read_file(folder, file)
        tensors = StoredTensors(folder, open_tensors(folder))
    _inspect_config(report, folder, tensors, headers)


def _inspect_config(report: Inspection, folder: Path, tensors: Tensors | None, headers: Mapping[str, Header]) -> None:
    """The model and the tokenizer of a Hugging Face folder."""
    with report.noting_errors():
        if is_encoder(folder):
            inspect_encoder(report, folder, headers)
            return
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json", hint="copy it from the model's repository")
        inspect_model(report, read_json(folder / "config.json"), str(folder / "config.json"), tensors, headers)
    inspect_tokenizer(report, folder, report.model.rows if report.model else None)


def _file(path: Path) -> Inspection:
    """One file: of an adapter, its folder; of a checkpoint in safetensors, what it holds; else a whole model."""
    report = Inspection(str(path), kind="file")
    if path.name in ("adapter_model.safetensors", _ADAPTER):
        return _folder(path.parent)
    if path.name in ("config.json", INDEX):
        return _folder(path.parent)
    if path.suffix == ".safetensors":
        report.format = "safetensors"
        with report.noting_errors():
            _inspect_tensors(report, _read_file(path.parent, path.name))
        if (path.parent / "config.json").is_file():
            report.warn("one file of a checkpoint", hint=f"lit-lora inspect {path.parent} shows all of it")
        return report
    with report.noting_errors():
        _inspect_source(report, open_source(path), path)
    return report


def _inspect_tensors(report: Inspection, headers: Mapping[str, Header]) -> None:
    """Tensors of which nothing is known but their headers."""
    part = Part("tensors")
    for header in headers.values():
        part.parameters += header.numel
        part.add(header.dtype, header.bytes)
    report.parts = [part]
    report.targets = matrices(headers)


def _inspect_source(report: Inspection, source: Source, path: Path) -> None:
    """A checkpoint that ``lit-lora convert`` reads: its tokenizer is rebuilt in a temporary folder."""
    report.format = source.format
    with report.noting_errors():
        data = source.config()
        inspect_model(report, data, str(path), source.tensors, _headers(source))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with report.noting_errors():
            source.write_tokenizer(folder)
        inspect_tokenizer(report, folder, report.model.rows if report.model else None)
        if source.format.startswith("GGUF") and report.tokenizer and report.tokenizer.template:
            report.tokenizer = replace(report.tokenizer, template="the file's metadata")
        _rename(report, temporary, str(path))


def _headers(source: Source) -> dict[str, Header]:
    """The stored tensors; none for GGUF, whose reader hides how each of them is packed."""
    if source.format.startswith("GGUF"):
        return {}
    headers = {}
    for name in source.tensors.names():
        shape, dtype = source.tensors.shape(name), source.tensors.dtype(name)
        word = str(dtype).removeprefix("torch.")
        headers[name] = Header(word, shape, math.prod(shape) * dtype.itemsize)
    return headers


def _repository(repo: str, revision: str | None, endpoint: str | None) -> Inspection:
    """A Hub repository: files other than weights are downloaded to a temporary folder, and headers of the weights."""
    report = Inspection(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = hub.fetch_side_files(repo, folder, revision=revision, endpoint=endpoint)
        by_name = {file.name: file for file in weights}

        def read(name: str) -> dict[str, Header]:
            if name not in by_name:
                raise InputError(f"{repo}: no file {name} in it")
            file = by_name[name]
            return read_header(f"{repo}/{name}", partial(hub.read_start, repo, file), file.size)

        if (folder / _ADAPTER).is_file():
            report.kind = "adapter"
            inspect_adapter(report, folder, read, local=False)
        else:
            report.format = "safetensors" if hub.is_safetensors(weights[0].name) else "PyTorch state dict"
            headers: dict[str, Header] = {}
            tensors: Tensors | None = None
            with report.noting_errors():
                if report.format == "safetensors":
                    for name in _shards(folder, by_name):
                        headers |= read(name)
                    tensors = StoredTensors(folder, Headers(headers, repo))
            _inspect_config(report, folder, tensors, headers)
        _rename(report, temporary, repo)
    return report


def _shards(folder: Path, available: Iterable[str] | None = None) -> list[str]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Args:
        folder: With the index.
        available: The files that there are; those in the folder if omitted.

    Raises:
        InputError: A shard is missing.
    """
    if not (folder / INDEX).is_file():
        return [_SINGLE]
    return list(dict.fromkeys(read_weight_map(folder / INDEX, available).values()))


def _read_file(folder: Path, name: str) -> dict[str, Header]:
    """The header of a safetensors file on this machine."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: no such file")

    def read(count: int) -> bytes:
        with path.open("rb") as file:
            return file.read(count)

    return read_header(str(path), read, path.stat().st_size)


def _rename(report: Inspection, temporary: str, name: str) -> None:
    """Call a temporary folder in messages what the user calls it."""
    report.problems = [
        replace(
            problem,
            text=problem.text.replace(temporary, name),
            hint=problem.hint and problem.hint.replace(temporary, name),
        )
        for problem in report.problems
    ]
