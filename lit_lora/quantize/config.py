"""How a base model's weights are quantised: the ``quantize`` section of a config."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from lit_lora.config import Settings, did_you_mean
from lit_lora.errors import UsageError

__all__ = ["QuantizeConfig", "QuantizeName", "parse"]

QuantizeName = Literal["nf4", "fp4", "nf3", "nf2", "int4", "int2", "int8"]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

_DOUBLE = "-dq"
_PLAIN = ("int4", "int2", "int8")


class QuantizeConfig(Settings):
    """The linear layers of the decoder hold few bits a weight; embedding, norms and head stay as they are."""

    name: QuantizeName = Field(
        "nf4",
        description="Values of the codes: nf4, nf3, nf2 (16, 8, 4 quantiles of a normal distribution), fp4 (1 sign, 2 "
        "exponent and 1 mantissa bit), int4, int2 (16, 4 at equal distances from the least to the greatest weight of "
        "each block), int8 (-127 to 127 for each row, as LLM.int8() stores it).",
    )
    block_size: BlockSize = Field(64, description="All but int8: weights that share a scale; divides every row.")
    double_quant: bool = Field(
        True,
        description="nf and fp: scales in 8 bits instead of 32: nf4 at blocks of 64 takes 4.127 instead of 4.5 "
        "bits a weight.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, value: object) -> object:
        """``nf4-dq`` for ``{name: nf4, double_quant: true}``."""
        return _fields(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _applies(self) -> QuantizeConfig:
        unused = self.model_fields_set & {"block_size", "double_quant"}
        changed = [key for key in sorted(unused) if getattr(self, key) != type(self).model_fields[key].default]
        if self.name == "int8" and changed:
            raise ValueError(f"int8 has one scale a row: {', '.join(changed)} has no effect, leave it out")
        if self.name in _PLAIN and "double_quant" in changed:
            raise ValueError(f"{self.name} keeps its scales as they are: double_quant has no effect, leave it out")
        return self

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return int(self.name[-1])

    @property
    def bits(self) -> float:
        """Bits a weight takes with its share of the scales of its block; of int8 without the scale of its row."""
        if self.name == "int8":
            return 8.0
        if self.name in _PLAIN:
            return self.code_bits + (16 + 32) / self.block_size
        scale = 8 + 32 / 256 if self.double_quant else 32
        return self.code_bits + scale / self.block_size

    def __str__(self) -> str:
        if self.name == "int8":
            return "int8"
        double = _DOUBLE if self.double_quant and self.name not in _PLAIN else ""
        return f"{self.name}{double}" + (f", blocks of {self.block_size}" if self.block_size != 64 else "")


def _fields(text: str) -> dict[str, object]:
    name = text.removesuffix(_DOUBLE)
    return {"name": name} if name in _PLAIN else {"name": name, "double_quant": text.endswith(_DOUBLE)}


def parse(text: str, *, option: str, block_size: int | None = None) -> QuantizeConfig:
    """The settings that ``nf4``, ``nf4-dq``, ``int8`` and the like mean on a command line.

    Args:
        text: As above.
        option: The option it was given to, for the message.
        block_size: Another block size.

    Raises:
        UsageError: It is none of these, or the block size is not supported.
    """
    known = [f"{name}{end}" for name in get_args(QuantizeName) for end in ("", _DOUBLE) if not (end and name in _PLAIN)]
    if text not in known:
        raise UsageError(f"{option} {text}: not known{did_you_mean(text, known)}, expected one of {', '.join(known)}")
    sizes = get_args(BlockSize)
    if block_size is not None and (text == "int8" or block_size not in sizes):
        expected = "int8 has one scale a row" if text == "int8" else f"expected one of {', '.join(map(str, sizes))}"
        raise UsageError(f"--block-size {block_size}: {expected}")
    fields = _fields(text)
    return QuantizeConfig.model_validate(fields if block_size is None else {**fields, "block_size": block_size})
