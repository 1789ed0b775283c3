"""Writing a Hugging Face folder: tensors streamed into safetensors shards, and the files that go with them."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_lora.checkpoint.load import AnyModel, stored_shapes
from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.quantized import packed_tensors, quantization_config
from lit_lora.checkpoint.tensors import INDEX
from lit_lora.files import atomic_folder, disk_errors
from lit_lora.model import ModelConfig
from lit_lora.quantize import QuantizedLinear, QuantizedStack
from lit_lora.tokenizer import Tokenizer, needs_conversion

__all__ = ["CheckpointWriter", "copy_side_files", "save_model", "save_quantized"]

# A shard starts with the length of its JSON header, the header, and then the bytes of the tensors. Room for the
# header is left when the shard is opened and filled when it is closed (the format allows trailing spaces), so every
# tensor is written as soon as it is added. 64 KiB describe about 500 tensors; more start a new shard.
_HEADER_BYTES = (1 << 16) - 8

# At most, the two offsets and the punctuation of a tensor's entry in the header.
_OFFSETS_BYTES = 80

# Tensors follow one another without gaps, but each must begin at a multiple of its element size.
_ALIGNMENT = 8
# A tensor of odd size with at most this many values is written last.
_MAX_POSTPONED = 1 << 16

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "lit_lora_data.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class CheckpointWriter:
    """Writes safetensors shards, each tensor as soon as it is added, so that none has to stay in memory.

    Shards get their final names, and the index is written, on ``close`` or at the end of a ``with`` block. The folder
    is meant to be the temporary one of :func:`lit_lora.files.atomic_folder`: until ``close`` it is not a checkpoint.

    Args:
        folder: An existing folder.
        max_shard_bytes: Maximum size of a shard; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 2_000_000_000) -> None:
        self._folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self._total_bytes = 0
        self._file: BinaryIO | None = None
        self._header: dict[str, object] = {}
        self._header_size = 0
        self._shard_bytes = 0
        self._postponed: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device.

        A small one of odd size waits for ``close``: the tensor after it would not be aligned.

        Raises:
            ValueError: The name has already been added, or safetensors has no such dtype.
            OSError: The disk is full or failing.
        """
        if name in self._shard_of:
            raise ValueError(f"{name} was added twice")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be stored")
        if tensor.nbytes % _ALIGNMENT and tensor.numel() <= _MAX_POSTPONED:
            self._shard_of[name] = 0  # known, and in no shard yet
            self._postponed[name] = tensor
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        count = tensor.nbytes
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entry_size = len(json.dumps({name: entry})) + _OFFSETS_BYTES
        full = self._shard_bytes + count > self._max_shard_bytes or self._header_size + entry_size > _HEADER_BYTES
        if self._file is not None and self._shard_bytes and full:
            self._close_shard()

        file = self._file or self._open_shard()
        entry["data_offsets"] = [self._shard_bytes, self._shard_bytes + count]
        if count:
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        self._header[name] = entry
        self._header_size += entry_size
        self._shard_bytes += count
        self._total_bytes += count
        self._shard_of[name] = self._shards

    def close(self) -> None:
        """Finish the last shard, name the shards, write the index if there is more than one.

        Raises:
            OSError: The disk is full or failing.
        """
        # From the largest elements to the smallest, so that each begins at a multiple of its element size.
        for name, tensor in sorted(self._postponed.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        if self._file is None and self._shards == 0:  # no tensor was added: an empty checkpoint is one too
            self._open_shard()
        if self._file is not None:
            self._close_shard()

        if self._shards == 1:
            self._temporary(1).rename(self._folder / "model.safetensors")
            return
        for shard in range(1, self._shards + 1):
            self._temporary(shard).rename(self._folder / self._final(shard))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: self._final(shard) for name, shard in self._shard_of.items()},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def _temporary(self, shard: int) -> Path:
        return self._folder / f"model-{shard:05d}.safetensors.part"

    def _final(self, shard: int) -> str:
        return f"model-{shard:05d}-of-{self._shards:05d}.safetensors"

    def _open_shard(self) -> BinaryIO:
        self._shards += 1
        self._header = {"__metadata__": {"format": "pt"}}
        self._header_size = 100  # an upper bound for the header so far
        self._shard_bytes = 0
        self._file = open(self._temporary(self._shards), "wb")  # noqa: SIM115 - open while tensors are added
        self._file.write(bytes(_HEADER_BYTES + 8))
        return self._file

    def _close_shard(self) -> None:
        assert self._file is not None
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        self._file.close()
        self._file = None


def save_model(model: AnyModel, folder: Path, *, side_files: Path, card: str) -> Path:
    """Write a whole model as a Hugging Face folder, which appears complete or not at all.

    Args:
        model: The model; its weights keep their dtypes, and a tied head is written once.
        folder: The folder; an existing one is replaced.
        side_files: The folder that tokenizer, chat template and the like are copied from. If it holds weights, it is
            the checkpoint that the model was loaded from: names and shapes are as there, and tensors that the model
            does not use are copied.
        card: The text of its README.md.

    Returns:
        The folder.

    Raises:
        DiskError: The disk is full or read-only; an existing folder is kept.
    """
    has_weights = any(Path(side_files).glob("*.safetensors"))
    tensors = _as_stored(model, side_files) if has_weights else model.named_parameters()
    return _write_folder(folder, tensors, model.config.to_hf(), side_files, card)


def _as_stored(model: AnyModel, base: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``model`` under the names and in the shapes of ``base``, and those of ``base`` that it lacks."""
    reader = StoredParameters(base, model)
    state = model.state_dict(keep_vars=True)
    left = {name: state[name] for name in stored_shapes(model)}
    for conversion in reader.conversions:
        if all(name in left for name in conversion.parameters):  # not so for the copy of a tied head
            parameters = {name: left.pop(name) for name in conversion.parameters}
            yield from reader.to_files(conversion, parameters).items()
    for name, tensor in left.items():
        yield reader.conversion(name).stored[0], tensor
    for name in reader.others():
        yield name, reader.files.read_once(name)


def save_quantized(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor | QuantizedLinear | QuantizedStack]],
    folder: Path,
    *,
    side_files: Path,
    card: str,
) -> Path:
    """Write a model with quantized layers as a Hugging Face folder, which appears complete or not at all.

    Args:
        config: The model's config.
        tensors: Every tensor by name, with the layer itself instead of a quantized weight; a tied head is skipped, and
            experts are dequantized.
        folder: The folder; an existing one is replaced.
        side_files: The checkpoint that tokenizer, chat template and the like are copied from.
        card: The text of its README.md.

    Returns:
        The folder.

    Raises:
        DiskError: The disk is full or read-only; an existing folder is kept.
    """
    head = config.names.head
    parts = {name: tensor for name, tensor in tensors if not (config.tie_word_embeddings and name == f"{head}.weight")}
    layers = [part for part in parts.values() if isinstance(part, QuantizedLinear)]
    config_json = config.to_hf()
    configs = (layer.quantized.config for layer in layers)
    config_json["quantization_config"] = quantization_config(configs, layers[0].dtype, head=head)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, part in parts.items():
            if isinstance(part, QuantizedLinear):
                yield from packed_tensors(name.removesuffix(".weight"), part.quantized, part.dtype).items()
            else:
                yield name, part if isinstance(part, Tensor) else part.dequantize()

    return _write_folder(folder, stored(), config_json, side_files, card)


def _write_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], config_json: dict[str, Any], side_files: Path, card: str
) -> Path:
    with atomic_folder(folder, replace=True) as temporary, disk_errors(folder):
        with CheckpointWriter(temporary) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)
        (temporary / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        copy_side_files(side_files, temporary)
    return Path(folder)


def copy_side_files(src: Path, dst: Path, *, templates: bool = True) -> list[str]:
    """Copy what belongs to a checkpoint besides its weights: config, tokenizer, chat templates, license.

    Files that ``dst`` already has are kept. The model card is not copied, because the new model gets its own.
    ``tokenizer.json`` is written beside a SentencePiece or tiktoken file, for programs that do not read those.

    Args:
        src: The checkpoint.
        dst: An existing folder.
        templates: Copy chat templates. Without them, ``dst`` has its own.

    Returns:
        The names of the files copied.

    Raises:
        InputError: The tokenizer cannot be read.
        OSError: The disk is full or failing.
    """
    copied = []
    for path in sorted(Path(src).iterdir()):
        target = Path(dst) / path.name
        if target.exists() or ("chat_template" in path.name and not templates):
            continue
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, target)
            copied.append(path.name)
        elif path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _SIDE_FILES):
            shutil.copyfile(path, target)
            copied.append(path.name)
    if needs_conversion(dst):
        Tokenizer.load(dst).save(dst)
    return copied
