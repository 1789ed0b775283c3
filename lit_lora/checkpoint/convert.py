"""Convert any supported checkpoint to a Hugging Face folder, holding one tensor at a time in memory."""

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
from lit_lora.checkpoint.litgpt import LitGPTReader
from lit_lora.checkpoint.load import decoder_linears, empty_model
from lit_lora.checkpoint.quantized import StoredTensors, packed_bytes, packed_tensors, quantization_config
from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.checkpoint.tensors import INDEX, Tensors, check_tensors, read_weight_map
from lit_lora.checkpoint.torch_file import TorchReader
from lit_lora.errors import InputError
from lit_lora.files import atomic_folder, human_bytes, read_json, require_free_space, sha256_file, write_text
from lit_lora.gguf import GGUFReader, part_number, write_tokenizer
from lit_lora.model import ModelConfig
from lit_lora.model.families import DecoderNames
from lit_lora.model.quantization import PACKED, quantization_method, without_quantization
from lit_lora.quantize import QuantizeConfig, quantize
from lit_lora.tokenizer import FAST, Tokenizer, has_vocabulary

__all__ = [
    "Plan",
    "Source",
    "convert",
    "open_source",
    "plan_conversion",
    "quantization_stripped",
    "write_side_files",
]

_TORCH_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = (".bin", ".pth", ".pt")
# What training scripts leave beside the weights, by file name without its ending.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler")


@dataclass(frozen=True)
class Source:
    """A checkpoint in any supported format.

    Attributes:
        name: What to call the model.
        format: The format, for people.
        files: The files with the weights.
        tensors: Their tensors.
        config: Returns the contents of ``config.json``.
        write_tokenizer: Writes the tokenizer's files, and others that belong to the checkpoint, into a folder.
        dtype: Dtype to write by default; ``None`` keeps each tensor's own.
        license: As the file states it.
        checked: Whether the reader has checked the tensors against the config.
    """

    name: str
    format: str
    files: list[Path]
    tensors: Tensors
    config: Callable[[], dict[str, Any]]
    write_tokenizer: Callable[[Path], object]
    dtype: torch.dtype | None = None
    license: str | None = None
    checked: bool = False


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked: names, shapes and dtypes fit the config.

    Attributes:
        source: The checkpoint to read.
        config: The ``config.json`` to write.
        dtypes: Dtype of every tensor to write, in writing order.
        parameters: Number of weights.
        bytes: Size of the safetensors files to write.
        write_tokenizer: See :class:`Source`.
        quantize: How to write the tensors of ``to_quantize``.
        to_quantize: The weights of the decoder's linear layers, if they are to be quantized.
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
        """Number, precision and size of the weights, in words."""
        precision = self.config["torch_dtype"]
        if self.quantize:
            precision += f" and {self.quantize}"
        return f"{self.parameters:,} weights in {precision}, {human_bytes(self.bytes)}"


def open_source(path: Path) -> Source:
    """Recognize a checkpoint and open it; only headers are read.

    Args:
        path: A ``.gguf``, ``.bin`` or ``.pth`` file, or a folder with such files, with safetensors, or from LitGPT.

    Raises:
        InputError: Nothing at ``path`` is in a supported format, or it is damaged or incomplete.
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
        raise InputError(f"{path}: only one file of a checkpoint", hint=f"give its folder: {path.parent}")
    raise InputError(f"{path}: not a checkpoint, expected .gguf, .bin, .pth or a folder with such files")


def plan_conversion(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    quantize: QuantizeConfig | None = None,
) -> Plan:
    """Check a conversion before any work: the tensors must be exactly those that the config describes.

    Args:
        source: From :func:`open_source`.
        dtype: Dtype of all weights; the source's own, or bfloat16 for GGUF, when omitted.
        config: A ``config.json``, or a folder with one, to use instead of the source's.
        tokenizer: A folder whose tokenizer files are used instead of the source's.
        quantize: How to quantize the decoder's linear layers.

    Raises:
        InputError: An unsupported architecture; a missing, unexpected or misshapen tensor; no tokenizer in
            ``tokenizer``; or the source is already quantized.
        UsageError: The block size does not divide the row length of a layer.
    """
    config_json = _read_config(config) if config is not None else source.config()
    where = str(config or source.files[0].parent)
    if quantize is not None and quantization_method(config_json) in PACKED:
        raise InputError(f"{where}: already quantized", hint="convert the original 16-bit checkpoint")
    config_json = without_quantization(config_json)
    if source.checked and config is None:
        expected = {name: source.tensors.shape(name) for name in source.tensors.names()}
    else:
        names = ModelConfig.from_hf(config_json, name=where).names
        config_json["tie_word_embeddings"] = _tied(source, config_json, names)
        expected = _expected(config_json, where)
        files = source.files[0].parent if len(source.files) > 1 else source.files[0]
        check_tensors(files, source.tensors, expected, head=names.head)

    dtype = dtype or source.dtype
    dtypes = {name: dtype or source.tensors.dtype(name) for name in expected}
    sizes = {name: torch.Size(shape).numel() for name, shape in expected.items()}
    config_json.pop("dtype", None)  # transformers' newer name for torch_dtype
    largest = max(expected, key=lambda name: sizes[name])
    config_json["torch_dtype"] = str(dtypes[largest]).removeprefix("torch.")

    write = source.write_tokenizer
    if tokenizer is not None:
        if not has_vocabulary(tokenizer):
            raise InputError(f"{tokenizer}: no tokenizer.json in it")
        write = partial(copy_side_files, tokenizer)

    to_quantize = frozenset(_linear_weights(config_json, where) if quantize else ())
    total = sum(sizes[name] * dtypes[name].itemsize for name in expected if name not in to_quantize)
    if quantize is not None:
        total += sum(packed_bytes(name.removesuffix(".weight"), expected[name], quantize) for name in to_quantize)
        head = ModelConfig.from_hf(config_json, name=where).names.head
        config_json["quantization_config"] = quantization_config([quantize], dtypes[largest], head=head)
    return Plan(source, config_json, dtypes, sum(sizes.values()), total, write, quantize, to_quantize)


def convert(plan: Plan, out: Path) -> None:
    """Write the Hugging Face folder; ``out`` is complete or absent.

    Memory: the largest tensor in its new dtype, and about 0.1 GB.

    Raises:
        InputError: A tensor holds NaN or infinity, or a value that the new dtype cannot hold.
        DiskError: Not enough space (reported before work starts), ``out`` exists, or the disk fails.
    """
    require_free_space(out, plan.bytes + (100 << 20), "the converted checkpoint")
    with atomic_folder(out) as folder:
        write_side_files(plan, folder)  # first, because it can fail and takes no time
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
    """Write everything that goes with the weights: config, tokenizer, chat template, generation settings.

    Raises:
        InputError: The source's tokenizer cannot be rebuilt or read.
    """
    write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")
    plan.write_tokenizer(folder)
    if not has_vocabulary(folder):
        log.warn(f"{plan.source.name}: has no tokenizer.json; give a folder that has one with --tokenizer FOLDER")
        return
    path = folder / FAST
    if not path.is_file():
        Tokenizer.load(folder).save(folder)
    try:
        tokens = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"tokenizer.json of {plan.source.name}: cannot be read: {error}") from error
    if tokens > plan.config["vocab_size"]:
        log.warn(
            f"the tokenizer has {tokens} tokens and the model {plan.config['vocab_size']}: the last have no embedding"
        )


def _open_folder(folder: Path) -> Source:
    """The one checkpoint in a folder: LitGPT's, else safetensors, else PyTorch's, else GGUF."""
    name = folder.resolve().name
    if (folder / "lit_model.pth").is_file():
        return _litgpt(folder / "lit_model.pth")
    if (folder / INDEX).is_file() or (folder / "model.safetensors").is_file():
        return _safetensors(folder, name)
    if (folder / _TORCH_INDEX).is_file():
        shards = dict.fromkeys(read_weight_map(folder / _TORCH_INDEX).values())
        return _torch(folder, [folder / shard for shard in shards], name)

    candidates = sorted(path for path in folder.iterdir() if path.suffix in (".gguf", *_SUFFIXES))
    weights = [path for path in candidates if path.stem not in _NOT_WEIGHTS]
    ggufs = [path for path in weights if path.suffix == ".gguf"]
    if len(weights) == 1 and not ggufs:
        return _torch(folder, weights, name)
    first_parts = [path for path in ggufs if part_number(path) == 1]
    whole_files = [path for path in ggufs if part_number(path) is None]
    openable = first_parts or whole_files or ggufs[:1]  # opening a later part alone says which are missing
    if len(openable) == 1:
        return _gguf(openable[0])
    if not weights:
        raise InputError(
            f"{folder}: no weights in it, expected *.safetensors, *.gguf, *.bin, *.pth or lit_model.pth",
            hint="lit-lora download fetches a checkpoint",
        )
    names = ", ".join(path.name for path in weights[:4])
    raise InputError(f"{folder}: several files with weights and no index ({names})", hint="give one of them")


def _safetensors(folder: Path, name: str) -> Source:
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        files = [folder / shard for shard in dict.fromkeys(read_weight_map(folder / INDEX).values())]
    return Source(
        name=name,
        format="safetensors",
        files=files,
        tensors=StoredTensors(folder),
        config=partial(_read_config, folder),
        write_tokenizer=partial(copy_side_files, folder),
    )


def _gguf(path: Path) -> Source:
    reader = GGUFReader(path)
    kinds = ", ".join(f"{count} {kind}" for kind, count in reader.quantizations().items())
    return Source(
        name=quantization_stripped(path.stem),
        format=f"GGUF ({kinds} tensors)",
        files=reader.files,
        tensors=reader,
        config=reader.config,
        write_tokenizer=partial(write_tokenizer, reader.metadata, source=path),
        dtype=torch.bfloat16,
        license=reader.metadata.get("general.license"),
        checked=True,
    )


def _litgpt(path: Path) -> Source:
    reader = LitGPTReader(path)
    return Source(
        name=reader.folder.resolve().name,
        format="LitGPT",
        files=[path],
        tensors=reader,
        config=reader.config,
        write_tokenizer=partial(copy_side_files, reader.folder),
    )


def _torch(folder: Path, files: list[Path], name: str) -> Source:
    return Source(
        name=name,
        format="PyTorch state dict",
        files=files,
        tensors=TorchReader(files),
        config=partial(_read_config, folder),
        write_tokenizer=partial(copy_side_files, folder),
    )


def quantization_stripped(stem: str) -> str:
    """The name of a GGUF file without its quantization: ``SmolLM2-135M`` for ``SmolLM2-135M.Q4_1``."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return re.sub(r"(?i)[.\-_]+(i?q\d(_[0-9a-z]+)*|tq\d_\d|b?f16|f32|fp16|fp32|mxfp4|nvfp4)$", "", stem)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="give the model's config.json with --config FILE")
    return read_json(path)


def _tied(source: Source, config: dict[str, Any], names: DecoderNames) -> bool:
    """Whether the head really is the embedding: software that ignores the tie may have trained the two apart."""
    stored = source.tensors.names()
    tied = bool(config.get("tie_word_embeddings", False))
    head = f"{names.head}.weight"
    embedding = f"{names.embedding}.weight"
    if not tied or head not in stored or embedding not in stored:
        return tied
    if torch.equal(source.tensors.read(head), source.tensors.read(embedding)):
        return True
    log.warn("the config ties the head to the embedding, but their weights differ; keeping both, untied")
    return False


def _expected(config: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model with this config."""
    model = empty_model(ModelConfig.from_hf(config, name=where))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _linear_weights(config: dict[str, Any], where: str) -> list[str]:
    """Names of the weights of the decoder's linear layers."""
    return [f"{name}.weight" for name in decoder_linears(empty_model(ModelConfig.from_hf(config, name=where)))]


def _finite(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor in its new dtype.

    Raises:
        InputError: It holds NaN, infinity, or a value that overflows the dtype.
    """
    tensor = source.tensors.read(name, dtype)
    if _all_finite(tensor):
        return tensor
    if dtype == torch.float16 and _all_finite(source.tensors.read(name)):
        raise InputError(f"{name}: a weight is beyond 65504, the largest in fp16", hint="use --dtype bf16 or fp32")
    raise InputError(f"{source.files[0]}: tensor {name} holds NaN or infinity, so the file is damaged")


def _all_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; in pieces, because ``isfinite`` makes a mask as large as it."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), 1 << 22))


def _card(plan: Plan) -> str:
    """The model card."""
    source = plan.source
    rows = [f"| source | {source.format} |"]
    rows += [f"| `{file.name}` | SHA-256 `{sha256_file(file)}` |" for file in source.files]
    rows += [f"| size | {plan.weights()} |"]
    table = "\n".join(["| | |", "|---|---|", *rows])
    front_matter = f"---\nlicense: {source.license}\n---\n\n" if source.license else ""
    return f"{front_matter}# {source.name}\n\nConverted by lit-lora {__version__}.\n\n{table}\n"
