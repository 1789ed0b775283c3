"""What a merge will do, worked out before values are read or written: base, combined updates, ties, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lit_lora.checkpoint.load import decoder_linears, empty_model, open_checkpoint
from lit_lora.checkpoint.quantized import packed_bytes
from lit_lora.errors import InputError, UsageError
from lit_lora.hf.experts import expert_stacks
from lit_lora.model import ModelConfig
from lit_lora.open.folders import find_adapter, find_base
from lit_lora.peft.core.base_tensors import Base
from lit_lora.peft.core.capabilities import ChangesConfig, KeepsCodes
from lit_lora.peft.core.updates import LowRank, Update, Updates
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.load import check_base
from lit_lora.quantize import QuantizeConfig, Quantized, quantize, quantize_stack

__all__ = [
    "BaseTensors",
    "Into",
    "MergePlan",
    "Places",
    "find_places",
    "plan_merge",
]

Into = Literal["dequantized", "original", "quantized"]
"""What an update trained over a quantized base is added to."""


class BaseTensors(Base):
    """A checkpoint's tensors by the model's names, mapped from its files on use; a tied head is the embedding.

    Args:
        folder: The checkpoint.
        quantize: Tensors to return as they would be after quantization, and how they are quantized.
        exact: Dequantize to float32, which rounds nothing, instead of the model's dtype.
    """

    def __init__(
        self, folder: Path, *, quantize: Mapping[str, QuantizeConfig] | None = None, exact: bool = False
    ) -> None:
        self.model, self.reader = open_checkpoint(folder)
        """The model, without values, and its parameters in the files."""
        self.exact = exact
        self.quantize = quantize or {}
        self.tied = self.model.config.tie_word_embeddings
        self.embedding = _weight_name(self.model, self.model.get_input_embeddings())
        self.head = _weight_name(self.model, self.model.get_output_embeddings())
        names = [name for conversion in self.reader.conversions for name in conversion.parameters]
        self.stored = [name for name in names if not (self.tied and name == self.head)]

    def _stored_name(self, name: str) -> str:
        return self.embedding if self.tied and name == self.head else name

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        if self.quantized(name):
            matrix = self.packed(name).dequantize(torch.float32 if self.exact else self.dtype(name))
            return matrix.view(self.shape(name))
        return self.reader.read(self._stored_name(name))

    def packed(self, name: str) -> Quantized:
        """The codes of a tensor that is quantized, stored so or made now; a stack's are those of one matrix."""
        if self.reader.quantized(name):
            return self.reader.packed(name)
        weight = self.reader.read(name)
        return (quantize if weight.dim() == 2 else quantize_stack)(weight, self.quantize[name], name=name)

    def __contains__(self, name: object) -> bool:
        return name in self.stored or (self.tied and name == self.head)

    def __iter__(self) -> Iterator[str]:
        yield from self.stored
        if self.tied:
            yield self.head

    def __len__(self) -> int:
        return len(self.stored) + self.tied

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.reader.shape(self._stored_name(name))

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized, or returned as it would be after quantization."""
        return name in self.quantize or self.reader.quantized(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is stored."""
        return self.reader.dtype(self._stored_name(name))


@dataclass(frozen=True)
class Places:
    """Where a merge reads and writes."""

    adapter: Path
    """The adapter folder."""
    base: Path
    """The base model's folder."""
    out: Path
    """The folder to write."""


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked: the adapter belongs to the base."""

    folder: Path
    """The base model's folder."""
    adapter: Adapter
    """The adapter to merge."""
    base: BaseTensors
    """The tensors that the updates are added to."""
    updates: dict[str, Update]
    """By tensor; those of an adapter to subtract are already taken off."""
    names: list[str]
    """Tensors to write, in order, by the model's names."""
    copied: list[str]
    """Tensors of the base to write as they are in its files, by their names there."""
    config: ModelConfig
    """``config.json`` of the result."""
    untied: bool
    """The base is tied and the result is not, because head and embedding now differ."""
    dtype: torch.dtype | None
    """Dtype of every tensor; ``None`` keeps each as in the base."""
    trained: BaseTensors
    """The base as it was in training: ``base``, unless that is the original of a quantized one."""
    into: Into | None
    """What the update is added to; ``None`` for a base that is not quantized."""
    quantize: QuantizeConfig | None
    """How the base was quantized."""

    @property
    def lossy(self) -> bool:
        """Whether the merge, as asked for, computes something else than what was trained."""
        return self.into == "original" or (self.into == "quantized" and not self.keeps_codes)

    @property
    def keeps_codes(self) -> bool:
        """Whether the update goes into the zeros of the base's groups, so that its codes stay."""
        return self.quantize is not None and _keeps_codes(self.adapter, self.quantize)

    def packs(self, name: str) -> bool:
        """Whether a tensor is quantized again. Experts are dequantized: a folder with codes holds them in full."""
        return self.into == "quantized" and self.base.quantized(name) and len(self.base.shape(name)) == 2

    def target(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is written."""
        stored = self.base.dtype(name)
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def rows(self, name: str) -> int:
        """Rows of a tensor as it is written."""
        rows = self.base.shape(name)[0]
        update = self.updates.get(name)
        return rows if update is None else update.rows(rows)

    def bytes(self) -> int:
        """Bytes of all tensors to write."""
        total = 0
        for name in self.names:
            shape = self.base.shape(name)
            if self.quantize is not None and self.packs(name):
                total += packed_bytes(name.removesuffix(".weight"), shape, self.quantize)
            else:
                total += self.rows(name) * math.prod(shape[1:]) * self.target(name).itemsize
        files = self.base.reader.files
        return total + sum(math.prod(files.shape(name)) * files.dtype(name).itemsize for name in self.copied)


def find_places(source: Path, *, base: Path | None = None, out: Path | None = None) -> Places:
    """The folders that a merge of ``source`` means.

    Args:
        source: A run folder (``config.yaml`` and ``adapter/``) or an adapter folder.
        base: The base model, where it is not the one that the run or adapter names.
        out: Where to write; ``merged`` in the run, or beside the adapter folder, when omitted.

    Raises:
        InputError: There is no adapter.
        UsageError: The base model is not on this machine.
    """
    source = Path(source)
    adapter = find_adapter(source)
    if out is None and adapter != source:
        out = source / "merged"
    elif out is None:
        out = adapter.with_name("merged" if adapter.name == "adapter" else f"{adapter.name}-merged")
    return Places(adapter, base or find_base(source, hint="give it with --base FOLDER"), out)


def plan_merge(
    places: Places,
    *,
    subtract: Path | None = None,
    dtype: torch.dtype | None = None,
    into: Into | None = None,
    force: bool = False,
) -> MergePlan:
    """Read the headers and the adapters, and check that everything fits.

    Args:
        places: The folders.
        subtract: An adapter that has been merged into the base, to be taken out again (task switching).
        dtype: Dtype of the result; as in the base when omitted.
        into: What the update of a quantized base is added to. By default what computes the same as in training: the
            codes, if the update leaves them as they are, else the dequantized base.
        force: Accept a base that is not the one the adapter was trained on.

    Raises:
        InputError: Something is broken or does not fit.
        UsageError: ``into`` does not apply, or the same adapter is to be added and subtracted.
    """
    if subtract is not None and Path(subtract).resolve() == Path(places.adapter).resolve():
        raise UsageError(
            f"{subtract}: cannot be added and subtracted in the same merge",
            hint="--subtract takes the adapter of a task that has already been merged into --base",
        )
    adapter = read_adapter(places.adapter)
    trained, base, quantization = _bases(places.base, adapter, into)
    config = base.model.config
    tied = config.tie_word_embeddings
    if quantization is not None:
        into = into or ("quantized" if _keeps_codes(adapter, quantization) else "dequantized")
        trained.exact = into == "quantized"

    adapter.require_updates()
    # A base with another task merged into it does not have the values that the adapter was trained on.
    updates = check_base(adapter, trained, empty_model(config), force=force or subtract is not None)
    if subtract is not None:
        former = read_adapter(subtract)
        former.require_updates()
        updates = _subtracted(updates, check_base(former, base, empty_model(config), force=True), former.folder)

    # An adapter of a tied model gives its embedding and its head one and the same update, unless it trained them apart.
    untied = tied and updates.get(base.embedding) is not updates.get(base.head)
    rows = base.shape(base.embedding)[0] if base.embedding in base else config.vocab_size
    if base.embedding in updates:  # it may add tokens
        rows = updates[base.embedding].rows(rows)
    stored = str(dtype).removeprefix("torch.") if dtype else config.dtype
    if isinstance(adapter.config, ChangesConfig):
        config = adapter.config.configure(config)
    config = config.model_copy(update={"vocab_size": rows, "tie_word_embeddings": tied and not untied, "dtype": stored})
    copied = _copied(base, updates, dtype)
    names = [name for name in base.stored if base.reader.conversion(name).stored[0] not in copied]
    if untied:
        names.append(base.head)
    return MergePlan(
        places.base, adapter, base, updates, names, copied, config, untied, dtype, trained, into, quantization
    )


def _copied(base: BaseTensors, updates: Updates, dtype: torch.dtype | None) -> list[str]:
    """Stored tensors to copy: what the model does not use, and what it would only put together and take apart."""
    copied = base.reader.others()
    if dtype is None:
        for conversion in base.reader.conversions:
            changed = any(name in updates or base.quantized(name) for name in conversion.parameters)
            if not conversion.as_stored and not changed:
                copied += conversion.stored
    return copied


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    """The name of the weight of one of the model's modules."""
    return next(f"{name}.weight" for name, other in model.named_modules() if other is module)


def _keeps_codes(adapter: Adapter, quantize: QuantizeConfig) -> bool:
    """Whether the update fits between the codes of a base quantized so."""
    return isinstance(adapter.config, KeepsCodes) and adapter.config.keeps_codes(quantize)


def _bases(folder: Path, adapter: Adapter, into: Into | None) -> tuple[BaseTensors, BaseTensors, QuantizeConfig | None]:
    """The base as it was in training, the base to add the update to, and how the former was quantized.

    Raises:
        UsageError: ``into`` does not apply.
    """
    stored = BaseTensors(folder)
    stored_quantized = next(iter(stored.reader.configs()), None)
    quantization = stored_quantized or adapter.quantize
    if quantization is None and into is not None:
        raise UsageError(f"--into {into}: has no effect, the base of {adapter.folder} is not quantized")
    if stored_quantized is not None and into == "original":
        raise UsageError(
            f"--into original: {folder} is quantized itself ({quantization})",
            hint="give the 16-bit checkpoint with --base",
        )
    if quantization is None or stored_quantized is not None:
        return stored, stored, quantization
    # Training quantized a 16-bit checkpoint as it loaded it: do the same to the same layers.
    names = [*(f"{name}.weight" for name in decoder_linears(stored.model)), *expert_stacks(stored.model)]
    trained = BaseTensors(folder, quantize=dict.fromkeys(names, quantization))
    return trained, stored if into == "original" else trained, quantization


def _subtracted(updates: Updates, former: Updates, folder: Path) -> dict[str, Update]:
    """``updates`` minus the ``former`` ones, which are those of the adapter in ``folder``.

    Raises:
        InputError: A former update replaced values, so the original ones are not known.
    """
    result = dict(updates)
    for name, update in former.items():
        added = updates.get(name)
        if not isinstance(update, LowRank) or not isinstance(added, LowRank | None):
            raise InputError(
                f"{folder}: cannot be subtracted: {name} was replaced, and the adapter does not have its old values",
                hint="merge onto the original base model instead",
            )
        result[name] = update.negative() if added is None else added.plus(update.negative())
    return result
