"""Any supported checkpoint to a Hugging Face folder, tensor by tensor: memory for one tensor, disk for the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from lit_lora import __version__, log
from lit_lora.checkpoint.gguf import GGUFReader
from lit_lora.checkpoint.gguf_tokenizer import write_tokenizer
from lit_lora.checkpoint.litgpt import LitGPTReader
from lit_lora.checkpoint.load import decoder_linears, empty_model
from lit_lora.checkpoint.quantized import packed_sizes, packed_tensors, quantization_config
from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.checkpoint.tensors import INDEX, Tensors, check_tensors, open_tensors, read_weight_map
from lit_lora.checkpoint.torch_file import TorchReader
from lit_lora.errors import InputError
from lit_lora.files import atomic_folder, human_bytes, read_json, require_free_space, sha256_file, write_text
from lit_lora.model import ModelConfig
from lit_lora.model.families import DecoderNames
from lit_lora.quantize import QuantizeConfig, quantize

__all__ = [
    "Plan",
    "Source",
    "convert",
    "open_source",
    "plan_conversion",
    "quantisation_stripped",
    "write_side_files",
]

_TORCH_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Source:
    """A checkpoint in whatever format.

    Attributes:
        name: What to call the model.
        format: The format, for people.
        files: The files that hold weights.
        tensors: Their tensors.
        config: Gives ``config.json``.
        write_tokenizer: Writes the tokenizer's files, and others that belong to the checkpoint, into a folder.
        dtype: What to write unless asked otherwise; None keeps each tensor's own.
        licence: As the file states it.
    """

    name: str
    format: str
    files: list[Path]
    tensors: Tensors
    config: Callable[[], dict[str, Any]]
    write_tokenizer: Callable[[Path], object]
    dtype: torch.dtype | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked: names, shapes and dtypes fit the config.

    Attributes:
        source: What is read.
        config: The ``config.json`` to write.
        dtypes: The tensors to write, in this order, and in which dtype.
        parameters: Number of weights.
        bytes: Of the safetensors files to come.
        write_tokenizer: See :class:`Source`.
        quantize: How the tensors of ``to_quantize`` are written.
        to_quantize: Those of the decoder's linear layers, if they are quantised.
    """

    source: Source
    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    parameters: int
    bytes: int
    write_tokenizer: Callable[[Path], object]
    quantize: QuantizeConfig | None = None
    to_quantize: frozenset[str] = frozenset()

    def weights(self) -> str:
        """How many, in which precision, and their size."""
        kind = self.config["torch_dtype"] + (f" and {self.quantize}" if self.quantize else "")
        return f"{self.parameters:,} weights in {kind}, {human_bytes(self.bytes)}"


def open_source(path: Path) -> Source:
    """Recognise a checkpoint and open it; only headers are read.

    Args:
        path: A ``.gguf``, ``.bin`` or ``.pth`` file, or a folder with such files, with safetensors, or from LitGPT.

    Raises:
        InputError: There is nothing at ``path`` that is known here, or it is damaged or incomplete.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder", hint="lit-lora download fetches a checkpoint")
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        return _gguf(path)
    if path.name == "lit_model.pth":
        return _litgpt(path)
    if path.suffix in _SUFFIXES:
        return _torch(path.parent, [path], path.stem if path.parent == Path() else path.parent.name)
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise InputError(f"{path}: one file of a checkpoint", hint=f"give its folder: {path.parent}")
    raise InputError(f"{path}: not a checkpoint, expected .gguf, .bin, .pth or a folder with such files")


def plan_conversion(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    quantize: QuantizeConfig | None = None,
) -> Plan:
    """Check a conversion before any work: the tensors are exactly those that the config describes.

    Args:
        source: From :func:`open_source`.
        dtype: Of all weights; the source's own, or bfloat16 for GGUF, when omitted.
        config: A ``config.json``, or a folder with one, instead of the source's.
        tokenizer: A folder whose tokenizer files are taken instead of the source's.
        quantize: How to write the linear layers of the decoder.

    Raises:
        InputError: An unsupported architecture; a missing, unexpected or misshapen tensor; no tokenizer there; or the
            source is quantised already.
        UsageError: The block size does not divide the rows of a layer.
    """
    described = _read_config(config) if config is not None else source.config()
    where = str(config or source.files[0].parent)
    if described.get("quantization_config"):
        raise InputError(f"{where}: is quantised already", hint="convert the original 16-bit checkpoint")
    names = ModelConfig.from_hf(described, name=where).names
    described["tie_word_embeddings"] = _tied(source, described, names)
    expected, linears = _expected(described, where)
    files = source.files[0].parent if len(source.files) > 1 else source.files[0]
    check_tensors(files, source.tensors, expected, head=names.head)
    dtype = dtype or source.dtype
    dtypes = {name: dtype or source.tensors.dtype(name) for name in expected}
    sizes = {name: torch.Size(shape).numel() for name, shape in expected.items()}
    described.pop("dtype", None)
    widest = max(expected, key=lambda name: sizes[name])
    described["torch_dtype"] = str(dtypes[widest]).removeprefix("torch.")
    write = source.write_tokenizer
    if tokenizer is not None:
        if not (tokenizer / "tokenizer.json").is_file():
            raise InputError(f"{tokenizer}: no tokenizer.json there")
        write = partial(copy_side_files, tokenizer)
    chosen = frozenset(linears if quantize else ())
    total = sum(sizes[name] * dtypes[name].itemsize for name in expected if name not in chosen)
    if quantize is not None:
        total += sum(packed_sizes(name.removesuffix(".weight"), expected[name], quantize) for name in chosen)
        described["quantization_config"] = quantization_config([quantize], dtypes[widest], head=names.head)
    return Plan(source, described, dtypes, sum(sizes.values()), total, write, quantize, chosen)


def convert(plan: Plan, out: Path) -> None:
    """Write the Hugging Face folder. ``out`` is complete or absent.

    Memory: the largest tensor in its new dtype, and about 0.1 GB.

    Raises:
        InputError: A tensor holds NaN or infinity, or a value that the new dtype cannot hold.
        DiskError: Not enough space (said before work starts), ``out`` exists, or the disk fails.
    """
    require_free_space(out, plan.bytes + (100 << 20), "the converted checkpoint")
    with atomic_folder(out) as folder:
        write_side_files(plan, folder)  # first, because it fails fast
        with CheckpointWriter(folder) as writer:
            for name in log.progress(list(plan.dtypes), what="convert", unit=" tensors"):
                tensor = _finite(plan.source, name, plan.dtypes[name])
                if plan.quantize is None or name not in plan.to_quantize:
                    writer.add(name, tensor)
                    continue
                packed = packed_tensors(name.removesuffix(".weight"), quantize(tensor, plan.quantize), tensor.dtype)
                for packed_name, part in packed.items():
                    writer.add(packed_name, part)
        write_text(folder / "README.md", _card(plan))


def write_side_files(plan: Plan, folder: Path) -> None:
    """Write all that goes with the weights: config, tokenizer, chat template, generation settings.

    Raises:
        InputError: The source's tokenizer cannot be rebuilt, or is not this model's.
    """
    write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")
    plan.write_tokenizer(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        log.warn(f"{plan.source.name}: no tokenizer.json comes with it; give a folder that has one by --tokenizer")
        return
    try:
        tokens = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"tokenizer.json of {plan.source.name}: cannot be read: {error}") from error
    if tokens > plan.config["vocab_size"]:
        log.warn(
            f"the tokenizer has {tokens} tokens, the model {plan.config['vocab_size']}: the last have no embedding"
        )


def _open_folder(folder: Path) -> Source:
    name = folder.resolve().name
    if (folder / "lit_model.pth").is_file():
        return _litgpt(folder / "lit_model.pth")
    if (folder / INDEX).is_file() or (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
        if (folder / INDEX).is_file():
            files = [folder / shard for shard in dict.fromkeys(read_weight_map(folder / INDEX).values())]
        config, side_files = partial(_read_config, folder), partial(copy_side_files, folder)
        return Source(name, "safetensors", files, open_tensors(folder), config, side_files)
    if (folder / _TORCH_INDEX).is_file():
        shards = dict.fromkeys(read_weight_map(folder / _TORCH_INDEX).values())
        return _torch(folder, [folder / shard for shard in shards], name)
    found = sorted(path for path in folder.iterdir() if path.suffix in (".gguf", *_SUFFIXES))
    weights = [path for path in found if path.stem not in ("training_args", "optimizer", "scheduler")]
    ggufs = [path for path in weights if path.suffix == ".gguf" and not re.search(r"-\d{5}-of-(?!00001)", path.name)]
    if len(weights) == 1 and not ggufs:
        return _torch(folder, weights, name)
    first = [path for path in ggufs if "-00001-of-" in path.name] or ggufs
    if len(first) == 1:
        return _gguf(first[0])
    if not weights:
        raise InputError(
            f"{folder}: no weights there, expected *.safetensors, *.gguf, *.bin, *.pth or lit_model.pth",
            hint="lit-lora download fetches a checkpoint",
        )
    names = ", ".join(path.name for path in weights[:4])
    raise InputError(f"{folder}: several files of weights and no index ({names})", hint="give one of them")


def _gguf(path: Path) -> Source:
    reader = GGUFReader(path)
    kinds = ", ".join(f"{count} {kind}" for kind, count in reader.quantisations().items())
    return Source(
        name=quantisation_stripped(path.stem),
        format=f"GGUF ({kinds} tensors)",
        files=reader.files,
        tensors=reader,
        config=reader.config,
        write_tokenizer=partial(write_tokenizer, reader.metadata, source=path),
        dtype=torch.bfloat16,
        licence=reader.metadata.get("general.license"),
    )


def _litgpt(path: Path) -> Source:
    reader = LitGPTReader(path)
    name, side_files = reader.folder.resolve().name, partial(copy_side_files, reader.folder)
    return Source(name, "LitGPT", [path], reader, reader.config, side_files)


def _torch(folder: Path, files: list[Path], name: str) -> Source:
    reader, config = TorchReader(files), partial(_read_config, folder)
    return Source(name, "PyTorch state dict", files, reader, config, partial(copy_side_files, folder))


def quantisation_stripped(stem: str) -> str:
    """The name of a GGUF file without its quantisation: ``SmolLM2-135M.Q4_1`` is ``SmolLM2-135M``."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return re.sub(r"(?i)[.\-_]+(i?q\d(_[0-9a-z]+)*|tq\d_\d|b?f16|f32|fp16|fp32|mxfp4|nvfp4)$", "", stem)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="give the model's config.json by --config")
    return read_json(path)


def _tied(source: Source, config: dict[str, Any], parts: DecoderNames) -> bool:
    """Whether the head is the embedding in truth: programs that do not tie may have trained the two apart."""
    names, tied = source.tensors.names(), bool(config.get("tie_word_embeddings", False))
    head, embedding = f"{parts.head}.weight", f"{parts.embedding}.weight"
    if not tied or head not in names or embedding not in names:
        return tied
    if torch.equal(source.tensors.read(head), source.tensors.read(embedding)):
        return True
    log.warn("the config ties the head to the embedding, but their weights differ: both are kept, untied")
    return False


def _expected(config: dict[str, Any], where: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Name and shape of every tensor that a model of this config has; those of its decoder's linear layers."""
    model = empty_model(ModelConfig.from_hf(config, name=where))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes, [f"{name}.weight" for name in decoder_linears(model)]


def _finite(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor in its new dtype, refused if a value in it is no number."""
    tensor = source.tensors.read(name, dtype)
    if not _all_finite(tensor):
        if dtype == torch.float16 and _all_finite(source.tensors.read(name)):
            raise InputError(f"{name}: a weight is beyond 65504, the largest in fp16", hint="take --dtype bf16 or fp32")
        raise InputError(f"{source.files[0]}: tensor {name} holds NaN or infinity, so the file is damaged")
    return tensor


def _all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, looked for in pieces: ``isfinite`` copies what it is given."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), 1 << 22))


def _card(plan: Plan) -> str:
    """The model card."""
    source = plan.source
    rows = [f"| source | {source.format} |"]
    rows += [f"| `{file.name}` | SHA-256 `{sha256_file(file)}` |" for file in source.files]
    rows += [f"| size | {plan.weights()} |"]
    licence = f"---\nlicense: {source.licence}\n---\n\n" if source.licence else ""
    return (
        f"{licence}# {source.name}\n\nConverted by lit-lora {__version__}.\n\n| | |\n|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
