"""Matrices in few bits: quantise, dequantise, and multiply one vector without dequantising.

Every operation has one PyTorch form, and on a CPU, and for 4 bits on CUDA, a fused one that gives the same bits; what
else there is on CUDA for 4 bits is bitsandbytes', where it can be imported. Source: QLoRA, arXiv:2305.14314, section 3;
int8 rows: LLM.int8(), arXiv:2208.07339, section 2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_lora import kernels
from lit_lora.errors import UsageError
from lit_lora.quantize import bitsandbytes
from lit_lora.quantize.codes import TABLES, dynamic, nearest_dynamic, table
from lit_lora.quantize.config import QuantizeConfig

__all__ = ["TYPES", "Blocks", "Groups", "Int8", "Quantized", "Quantizer", "quantize"]

NESTED = 256
"""Scales that share a scale themselves."""
_CHUNK = 1 << 20
"""Values at a time in the PyTorch forms: their temporaries stay small."""
_QUANTIZE_CHUNK = 1 << 16
"""The same while quantising, which makes tensors that stay: holes of larger temporaries would not be filled again."""
_GPU_CHUNK = 1 << 24
"""Both on a GPU, which would wait for each of many small portions to be launched."""


def _at_a_time(x: Tensor, values: int = _CHUNK) -> int:
    """Values at a time on the device of ``x``."""
    return _GPU_CHUNK if x.is_cuda else values


class Quantized(nn.Module):
    """A matrix in few bits. Its tensors are buffers whose dtype no ``.to(dtype)`` changes.

    Args:
        config: How it is quantised.
        shape: (out, in).
    """

    def __init__(self, config: QuantizeConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,), (out,) in the dtype of ``x``."""
        return torch.mv(self.dequantize(x.dtype), x)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Shape and type."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.config}"


class Blocks(Quantized):
    """Blocks of codes of 2 to 4 bits: ``values[code] * absmax`` of the block.

    Args:
        config: nf4, fp4, nf3 or nf2.
        shape: (out, in).
        codes: (out * in * bits / 8, 1) uint8: row by row, packed as :class:`lit_lora.quantize.codes.Table` says.
        absmax: (blocks,) float32, or uint8 codes into ``DYNAMIC`` where double quantised.
        nested_absmax: (blocks / 256 rounded up,) float32: of the codes of absmax.
        offset: () float32: what was taken off every absmax.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        config: QuantizeConfig,
        shape: tuple[int, int],
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__(config, shape)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)

    @classmethod
    def empty(cls, config: QuantizeConfig, shape: tuple[int, int], device: torch.device) -> Blocks:
        """With tensors of the right shapes and no values, such as on the meta device."""
        blocks = shape[0] * shape[1] // config.block_size
        codes = torch.empty(shape[0] * shape[1] * config.code_bits // 8, 1, dtype=torch.uint8, device=device)
        if not config.double_quant:
            return cls(config, shape, codes, torch.empty(blocks, device=device))
        nested = torch.empty(-(-blocks // NESTED), device=device)
        absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
        return cls(config, shape, codes, absmax, nested, torch.empty((), device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Blocks:
        """Quantise ``weight``."""
        flat, block, bits = weight.detach().reshape(-1), config.block_size, config.code_bits
        made = cls.empty(config, (weight.shape[0], weight.shape[1]), flat.device)  # what stays comes first: no holes
        absmax = torch.empty(flat.numel() // block, device=flat.device) if config.double_quant else made.absmax
        step = _at_a_time(flat, _QUANTIZE_CHUNK)
        for start in range(0, flat.numel(), step):
            stop = start + step
            here = made.codes[start * bits // 8 : stop * bits // 8], absmax[start // block : stop // block]
            _quantize_blocks(flat[start:stop].float(), config, *here)
        if made.nested_absmax is not None and made.offset is not None:
            made.offset.copy_(absmax.mean())
            absmax -= made.offset
            for start in range(0, len(absmax), step):
                stop = start + step
                here = made.absmax[start:stop], made.nested_absmax[start // NESTED : stop // NESTED]
                _quantize_scales(absmax[start:stop], *here)
        return made

    def scales(self) -> Tensor:
        """The absmax of each block, (blocks,) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        values = dynamic(self.absmax.device)[self.absmax.int()]
        return values * self.nested_absmax.repeat_interleave(NESTED)[: values.numel()] + self.offset

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""
        block = self.config.block_size
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if out.is_meta:
            return out
        if self._dequantizes_fused(out):
            blocks, wide = out.numel() // block, int(dtype == torch.float32)
            kernels.call("dequantize_blocks", *self._pointers(), out, blocks, block, self.config.code_bits, wide)
            return out
        if self._on_cuda():
            return bitsandbytes.dequantize(self.codes, self.scales(), self.config.name, block, self.shape, dtype)
        known, codes, scales = table(self.config.name, out.device), self.codes.view(-1), self.scales()
        flat, bits, step = out.view(-1), known.bits, _at_a_time(out)
        for start in range(0, flat.numel(), step):
            stop = min(start + step, flat.numel())
            values = known.unpack(codes[start * bits // 8 : stop * bits // 8]).view(-1, block)  # (blocks, block)
            flat[start:stop] = values.mul_(scales[start // block : stop // block, None]).view(-1)
        return out

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,), (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        rows, columns = self.shape
        if self._on_cuda():
            values, block = table(self.config.name, self.codes.device).values, self.config.block_size
            return bitsandbytes.matrix_vector(x, self.codes, self.scales(), values, block, self.shape)
        if not (self._fused() and kernels.usable(x, kernel="matrix_vector_blocks")) or columns % self.config.block_size:
            return super().matrix_vector(x)
        y = torch.empty(rows, dtype=x.dtype)
        sizes = rows, columns, self.config.block_size, self.config.code_bits
        kernels.call("matrix_vector_blocks", *self._pointers(), x, y, *sizes)
        return y

    def _fused(self) -> bool:
        tensors = [self.codes, self.absmax, self.nested_absmax]
        placed = all(t is None or (t.device.type == "cpu" and t.is_contiguous()) for t in tensors)
        return placed and kernels.library() is not None

    def _dequantizes_fused(self, out: Tensor) -> bool:
        if out.is_cuda:
            return self.config.code_bits == 4 and kernels.usable(out, kernel="dequantize_blocks")
        return self._fused() and out.dtype in (torch.bfloat16, torch.float32)

    def _on_cuda(self) -> bool:
        on_cuda = self.codes.device.type == "cuda" and self.config.code_bits == 4
        return on_cuda and bitsandbytes.load() is not None

    def _pointers(self) -> tuple[Tensor | None, ...]:
        device = self.codes.device
        values = table(self.config.name, device).values
        return self.codes, values, self.absmax, self.nested_absmax, dynamic(device), self.offset


class Int8(Quantized):
    """Rows of 8-bit codes: ``code * absmax / 127`` of the row.

    Args:
        config: int8.
        shape: (out, in).
        codes: (out, in) int8.
        absmax: (out,) float32.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, config: QuantizeConfig, shape: tuple[int, int], codes: Tensor, absmax: Tensor) -> None:
        super().__init__(config, shape)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @classmethod
    def empty(cls, config: QuantizeConfig, shape: tuple[int, int], device: torch.device) -> Int8:
        """With tensors of the right shapes and no values, such as on the meta device."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(config, shape, codes, torch.empty(shape[0], device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Int8:
        """Quantise ``weight``."""
        weight = weight.detach()
        made = cls.empty(config, (weight.shape[0], weight.shape[1]), weight.device)
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].float()
            most = rows.abs().amax(1)
            made.absmax[start : start + step] = most
            made.codes[start : start + step] = (rows * (127.0 / most.clamp(min=1e-38))[:, None]).round_()
        return made

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""
        if self._fused() and dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(self.shape, dtype=dtype)
            kernels.call("dequantize_8bit", self.codes, self.absmax, out, *self.shape, int(dtype == torch.float32))
            return out
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if out.is_meta:
            return out
        step = max(1, _at_a_time(out) // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            out[rows] = self.codes[rows].float() * (self.absmax[rows, None] * (1 / 127))
        return out

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,), (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        if not (self._fused() and kernels.usable(x, kernel="matrix_vector_8bit")):
            return super().matrix_vector(x)
        y = torch.empty(self.shape[0], dtype=x.dtype)
        kernels.call("matrix_vector_8bit", self.codes, self.absmax, x, y, *self.shape)
        return y

    def _fused(self) -> bool:
        placed = all(t.device.type == "cpu" and t.is_contiguous() for t in (self.codes, self.absmax))
        return placed and kernels.library() is not None


class Groups(Quantized):
    """Groups of codes within a row, each between its own least and greatest value: ``scale * code + zero``.

    ``zero`` is the value of code 0, in float32: an update that is constant within a group goes into it and nowhere
    else, so a merged matrix keeps its codes. Source: QA-LoRA, arXiv:2309.14717, section 3.3.

    Args:
        config: int4 or int2.
        shape: (out, in).
        codes: (out, in * bits / 8) uint8, packed as :class:`lit_lora.quantize.codes.Table` says.
        scale: (out, groups) float16.
        zero: (out, groups) float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, config: QuantizeConfig, shape: tuple[int, int], codes: Tensor, scale: Tensor, zero: Tensor
    ) -> None:
        super().__init__(config, shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def empty(cls, config: QuantizeConfig, shape: tuple[int, int], device: torch.device) -> Groups:
        """With tensors of the right shapes and no values, such as on the meta device."""
        rows, groups = shape[0], shape[1] // config.block_size
        codes = torch.empty(rows, shape[1] * config.code_bits // 8, dtype=torch.uint8, device=device)
        scale = torch.empty(rows, groups, dtype=torch.float16, device=device)
        return cls(config, shape, codes, scale, torch.empty(rows, groups, device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Groups:
        """Quantise ``weight``."""
        made = cls.empty(config, (weight.shape[0], weight.shape[1]), weight.device)
        known, step = table(config.name, weight.device), max(1, _CHUNK // weight.shape[1])
        most = 2**known.bits - 1
        for start in range(0, len(weight), step):
            piece = weight.detach()[start : start + step].float()
            groups = piece.view(len(piece), -1, config.block_size)
            least, greatest = groups.aminmax(dim=2)
            scale = ((greatest - least) / most).to(torch.float16)
            inverse = torch.where(scale > 0, 1 / scale.float(), 0)  # a group of one value: all of it is in zero
            codes = ((groups - least[..., None]) * inverse[..., None]).round_().clamp_(0, most).to(torch.uint8)
            rows = slice(start, start + step)
            made.scale[rows], made.zero[rows] = scale, least
            made.codes[rows] = known.pack(codes.view(-1)).view(len(codes), -1)
        return made

    def plus(self, left: Tensor, right: Tensor) -> Groups | None:
        """The matrix plus ``left @ right``, with the same codes; ``None`` where that varies within a group.

        Args:
            left: (out, R).
            right: (R, in).
        """
        groups = right.float().view(len(right), -1, self.config.block_size)
        if not torch.equal(groups, groups[:, :, :1].expand_as(groups)):
            return None
        zero = torch.addmm(self.zero, left.float(), groups[:, :, 0])
        return Groups(self.config, self.shape, self.codes, self.scale, zero)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if self._fused() and dtype in (torch.bfloat16, torch.float32):
            sizes = self.scale.numel(), self.config.block_size, self.config.code_bits, int(dtype == torch.float32)
            kernels.call("dequantize_groups", self.codes, self.scale.float(), self.zero, out, *sizes)
            return out
        known, step = table(self.config.name, out.device), max(1, _at_a_time(out) // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            groups = known.unpack(self.codes[rows].reshape(-1)).view(-1, self.scale.shape[1], self.config.block_size)
            out[rows] = groups.mul_(self.scale[rows, :, None].float()).add_(self.zero[rows, :, None]).flatten(1)
        return out

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,), (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        if not (self._fused() and kernels.usable(x, kernel="matrix_vector_groups")):
            return super().matrix_vector(x)
        y = torch.empty(self.shape[0], dtype=x.dtype)
        sizes = *self.shape, self.config.block_size, self.config.code_bits
        kernels.call("matrix_vector_groups", self.codes, self.scale.float(), self.zero, x, y, *sizes)
        return y

    def _fused(self) -> bool:
        placed = all(t.device.type == "cpu" and t.is_contiguous() for t in (self.codes, self.scale, self.zero))
        return placed and kernels.library() is not None


Quantizer = Callable[[str, Tensor], Quantized]
"""Quantises the weight (out, in) of the linear layer of this name."""

TYPES: dict[str, type[Blocks] | type[Groups] | type[Int8]] = {**dict.fromkeys(TABLES, Blocks), "int8": Int8}
TYPES["int4"] = TYPES["int2"] = Groups


def quantize(weight: Tensor, config: QuantizeConfig, *, name: str = "the matrix") -> Quantized:
    """Quantise a matrix.

    The codes are the same on every device, with and without the fused kernel, and those of bitsandbytes.

    Args:
        weight: (out, in), of any floating dtype and device; it is only read. On the meta device: without values.
        config: How.
        name: Of the matrix, for the message.

    Raises:
        UsageError: The block size does not divide its rows.
    """
    rows, columns = weight.shape
    kind = TYPES[config.name]
    if kind is not Int8 and columns % config.block_size:
        sizes = [size for size in (32, 64, 128, 256, 512, 1024, 2048, 4096) if columns % size == 0]
        fitting = f"those that do: {', '.join(map(str, sizes))}" if sizes else "none does: use quantize.name=int8"
        raise UsageError(
            f"quantize.block_size: {config.block_size} does not divide the {columns} columns of {name}, {fitting}"
        )
    if weight.device.type == "meta":
        return kind.empty(config, (rows, columns), weight.device)
    return kind.of(weight, config)


def _quantize_blocks(x: Tensor, config: QuantizeConfig, codes: Tensor, absmax: Tensor) -> None:
    """Fill ``codes`` (n * bits / 8, 1) and ``absmax`` (n / block,) of ``x`` (n,) float32."""
    known, block = table(config.name, x.device), config.block_size
    if x.device.type == "cpu" and known.bits == 4 and kernels.library() is not None:
        kernels.call("quantize_4bit", x.contiguous(), known.midpoints, known.order, codes, absmax, len(absmax), block)
        return
    blocks = x.view(-1, block)
    absmax.copy_(blocks.abs().amax(1))
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # times the inverse, as everybody's codes were made
    codes.copy_(known.pack(known.nearest(scaled).view(-1)))


def _quantize_scales(scales: Tensor, codes: Tensor, nested: Tensor) -> None:
    """Fill ``codes`` into ``DYNAMIC``, (n,) uint8, and the absmax of each 256 of ``scales`` (n,), float32."""
    count = scales.numel()
    padded = torch.zeros(-(-count // NESTED) * NESTED, device=scales.device)
    padded[:count] = scales
    blocks = padded.view(-1, NESTED)
    nested.copy_(blocks.abs().amax(1))
    codes.copy_(nearest_dynamic(blocks * (1 / nested.clamp(min=1e-38))[:, None]).view(-1)[:count])
