"""How a base model's weights are quantized: the ``quantize`` section of a config."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from lit_lora.config import Settings, did_you_mean
from lit_lora.errors import UsageError

__all__ = ["BlockSize", "QuantizeConfig", "QuantizeName", "parse"]

QuantizeName = Literal["nf4", "fp4", "nf3", "nf2", "int4", "int2", "int8"]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

_DOUBLE = "-dq"
# Types whose scales are never quantized themselves.
_UNNESTED = ("int4", "int2", "int8")


class QuantizeConfig(Settings):
    """Quantize the decoder's linear layers and experts to a few bits per weight; all else stays as it is."""

    name: QuantizeName = Field(
        "nf4",
        description="Values of the codes: nf4, nf3, nf2 (16, 8, 4 quantiles of a normal distribution), fp4 (1 sign, 2 "
        "exponent and 1 mantissa bit), int4, int2 (16, 4 equal steps from the smallest to the largest weight of each "
        "block), int8 (-127 to 127 for each row, as LLM.int8() stores it).",
    )
    block_size: BlockSize = Field(64, description="Weights per scale; must divide the row length. Not for int8.")
    double_quant: bool = Field(
        True,
        description="Store the scales of nf and fp in 8 bits instead of 32: nf4 with blocks of 64 takes 4.127 instead "
        "of 4.5 bits per weight.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, value: object) -> object:
        """``nf4-dq`` for ``{name: nf4, double_quant: true}``."""
        return _fields(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _applies(self) -> QuantizeConfig:
        optional = self.model_fields_set & {"block_size", "double_quant"}
        changed = [key for key in sorted(optional) if getattr(self, key) != type(self).model_fields[key].default]
        if self.name == "int8" and changed:
            raise ValueError(f"int8 has one scale per row: {', '.join(changed)} has no effect, leave it out")
        if self.name in _UNNESTED and "double_quant" in changed:
            raise ValueError(f"{self.name} does not quantize its scales: double_quant has no effect, leave it out")
        return self

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return int(self.name[-1])

    @property
    def bits(self) -> float:
        """Bits per weight, its share of the block's scale included; for int8 without the scale of its row."""
        if self.name == "int8":
            return 8.0
        if self.name in _UNNESTED:
            scale_and_zero = 16 + 32
            return self.code_bits + scale_and_zero / self.block_size
        scale = 8 + 32 / 256 if self.double_quant else 32  # 256 scales share one of 32 bits
        return self.code_bits + scale / self.block_size

    def __str__(self) -> str:
        if self.name == "int8":
            return "int8"
        double = _DOUBLE if self.double_quant and self.name not in _UNNESTED else ""
        blocks = "" if self.block_size == 64 else f", blocks of {self.block_size}"
        return f"{self.name}{double}{blocks}"


def _fields(text: str) -> dict[str, object]:
    name = text.removesuffix(_DOUBLE)
    if name in _UNNESTED:
        return {"name": name}
    return {"name": name, "double_quant": text.endswith(_DOUBLE)}


def parse(text: str, *, option: str, block_size: int | None = None) -> QuantizeConfig:
    """The settings for a name such as ``nf4``, ``nf4-dq`` or ``int8`` on a command line.

    Args:
        text: The name.
        option: The option it was given to, for the message.
        block_size: The default one when omitted.

    Raises:
        UsageError: The name is unknown, or the block size is not supported.
    """
    names: list[str] = []
    for name in get_args(QuantizeName):
        names += [name] if name in _UNNESTED else [name, f"{name}{_DOUBLE}"]
    if text not in names:
        raise UsageError(f"{option} {text}: not known{did_you_mean(text, names)}, expected one of {', '.join(names)}")

    fields = _fields(text)
    if block_size is not None:
        sizes = get_args(BlockSize)
        if text == "int8":
            raise UsageError(f"--block-size {block_size}: int8 has one scale per row, leave it out")
        if block_size not in sizes:
            raise UsageError(f"--block-size {block_size}: expected one of {', '.join(map(str, sizes))}")
        fields["block_size"] = block_size
    return QuantizeConfig.model_validate(fields)
