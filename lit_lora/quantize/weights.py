"""Matrices in few bits: quantize, dequantize, and multiply one vector without dequantizing.

Every operation has one PyTorch form. Fused kernels give the same bits on a CPU, and for 4 bits on CUDA, where
bitsandbytes, if it can be imported, does what has no fused kernel. Source: QLoRA, arXiv:2305.14314, section 3; int8
rows: LLM.int8(), arXiv:2208.07339, section 2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from lit_lora import kernels
from lit_lora.errors import UsageError
from lit_lora.quantize import bitsandbytes
from lit_lora.quantize.codes import TABLES, dynamic, nearest_dynamic, table
from lit_lora.quantize.config import BlockSize, QuantizeConfig

__all__ = ["NESTED", "TYPES", "Blocks", "Groups", "Int8", "Quantized", "Quantizer", "quantize"]

NESTED = 256
"""Scales of blocks that share one scale of their own when double quantized."""
_CHUNK = 1 << 20
"""Values that the PyTorch forms convert at a time, which keeps their temporaries small."""
_QUANTIZE_CHUNK = 1 << 16
"""The same while quantizing. The results stay in memory, and larger temporaries would leave holes between them that the
allocator does not fill again."""
_GPU_CHUNK = 1 << 24
"""The same for both on a GPU, where launching kernels for many small chunks would take longer than the work."""
_SMALLEST = 1e-38
"""Stands for an absmax of 0, so that a block of zeros is not divided by zero."""


def _chunk_values(x: Tensor, on_cpu: int = _CHUNK) -> int:
    """Values to convert at a time on the device of ``x``."""
    return _GPU_CHUNK if x.is_cuda else on_cpu


class Quantized(nn.Module):
    """A matrix in few bits. Its tensors are buffers whose dtypes ``.to(dtype)`` does not change.

    Args:
        config: How it is quantized.
        shape: (out, in).
    """

    def __init__(self, config: QuantizeConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Quantized:
        """Some rows as a matrix of its own, whose codes are views of these. No block may span two rows."""

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,): (out,) in the dtype of ``x``."""
        return torch.mv(self.dequantize(x.dtype), x)

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return next(self.buffers()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)  # follow to the device, keep the dtype
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
        absmax: (blocks,) float32, or uint8 codes into ``DYNAMIC`` where double quantized.
        nested_absmax: (blocks / 256 rounded up,) float32: the scale of each 256 codes of absmax.
        offset: () float32: the mean absmax, subtracted from every absmax before it is quantized.
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
        """A matrix with tensors of the right shapes and undefined values, such as on the meta device."""
        blocks = shape[0] * shape[1] // config.block_size
        codes = torch.empty(shape[0] * shape[1] * config.code_bits // 8, 1, dtype=torch.uint8, device=device)
        if not config.double_quant:
            return cls(config, shape, codes, torch.empty(blocks, device=device))
        nested = torch.empty(-(-blocks // NESTED), device=device)
        absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
        return cls(config, shape, codes, absmax, nested, torch.empty((), device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Blocks:
        """Quantize ``weight`` (out, in)."""
        flat = weight.detach().reshape(-1)
        block, bits = config.block_size, config.code_bits
        # The result is allocated before any temporary, so that these leave no holes in front of it.
        result = cls.empty(config, (weight.shape[0], weight.shape[1]), flat.device)
        absmax = result.absmax
        if config.double_quant:  # result.absmax then holds codes of it
            absmax = torch.empty(flat.numel() // block, device=flat.device)

        step = _chunk_values(flat, _QUANTIZE_CHUNK)
        for start in range(0, flat.numel(), step):
            stop = start + step
            _quantize_blocks(
                flat[start:stop].float(),
                config,
                codes=result.codes[start * bits // 8 : stop * bits // 8],
                absmax=absmax[start // block : stop // block],
            )

        if result.nested_absmax is not None and result.offset is not None:
            # Every absmax is positive; without their mean they use the codes of both signs.
            result.offset.copy_(absmax.mean())
            absmax -= result.offset
            for start in range(0, len(absmax), step):
                stop = start + step
                _quantize_scales(
                    absmax[start:stop],
                    codes=result.absmax[start:stop],
                    nested=result.nested_absmax[start // NESTED : stop // NESTED],
                )
        return result

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The absmax of each block from ``start`` to before ``stop``, (blocks,) float32."""
        absmax = self.absmax[start:stop]
        if self.nested_absmax is None or self.offset is None:
            return absmax
        values = dynamic(absmax.device)[absmax.int()]
        first = start // NESTED
        nested = self.nested_absmax[first : -(-(start + len(absmax)) // NESTED)].repeat_interleave(NESTED)
        # The first and the last 256 blocks may be in it in part.
        return values * nested[start - first * NESTED :][: len(absmax)] + self.offset

    def rows(self, start: int, stop: int) -> Blocks:
        """Some rows as a matrix of its own, whose codes are views of these. No block may span two rows."""
        columns, block, bits = self.shape[1], self.config.block_size, self.config.code_bits
        codes = self.codes[start * columns * bits // 8 : stop * columns * bits // 8]
        scales = self.scales(start * columns // block, stop * columns // block)
        config = self.config.model_copy(update={"double_quant": False})
        return Blocks(config, (stop - start, columns), codes, scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""
        block, bits = self.config.block_size, self.config.code_bits
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if out.is_meta:
            return out
        if self._dequantizes_fused(out):
            blocks = out.numel() // block
            is_float32 = int(dtype == torch.float32)
            kernels.call("dequantize_blocks", *self._kernel_inputs(), out, blocks, block, bits, is_float32)
            return out
        if self._uses_bitsandbytes():
            return bitsandbytes.dequantize(self.codes, self.scales(), self.config.name, block, self.shape, dtype)

        code_table = table(self.config.name, out.device)
        codes = self.codes.view(-1)
        scales = self.scales()
        flat = out.view(-1)
        step = _chunk_values(out)
        for start in range(0, flat.numel(), step):
            stop = min(start + step, flat.numel())
            values = code_table.unpack(codes[start * bits // 8 : stop * bits // 8]).view(-1, block)  # (blocks, block)
            flat[start:stop] = values.mul_(scales[start // block : stop // block, None]).view(-1)
        return out

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,): (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        rows, columns = self.shape
        block, bits = self.config.block_size, self.config.code_bits
        if self._uses_bitsandbytes():
            values = table(self.config.name, self.codes.device).values
            return bitsandbytes.matrix_vector(x, self.codes, self.scales(), values, block, self.shape)
        # The fused kernel goes row by row, so no block may span two rows.
        if not (self._on_fused_cpu() and kernels.usable(x, kernel="matrix_vector_blocks")) or columns % block:
            return super().matrix_vector(x)
        y = torch.empty(rows, dtype=x.dtype)
        kernels.call("matrix_vector_blocks", *self._kernel_inputs(), x, y, rows, columns, block, bits)
        return y

    def _on_fused_cpu(self) -> bool:
        tensors = [self.codes, self.absmax]
        if self.nested_absmax is not None:
            tensors.append(self.nested_absmax)
        return _fused_on_cpu(tensors)

    def _dequantizes_fused(self, out: Tensor) -> bool:
        if out.is_cuda:
            return self.config.code_bits == 4 and kernels.usable(out, kernel="dequantize_blocks")
        return self._on_fused_cpu() and out.dtype in (torch.bfloat16, torch.float32)

    def _uses_bitsandbytes(self) -> bool:
        return self.codes.is_cuda and self.config.code_bits == 4 and bitsandbytes.load() is not None

    def _kernel_inputs(self) -> tuple[Tensor | None, ...]:
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
        """A matrix with tensors of the right shapes and undefined values, such as on the meta device."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(config, shape, codes, torch.empty(shape[0], device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Int8:
        """Quantize ``weight`` (out, in)."""
        weight = weight.detach()
        result = cls.empty(config, (weight.shape[0], weight.shape[1]), weight.device)
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].float()
            absmax = rows.abs().amax(1)
            inverse_scale = 127.0 / absmax.clamp(min=_SMALLEST)
            result.absmax[start : start + step] = absmax
            result.codes[start : start + step] = (rows * inverse_scale[:, None]).round_()
        return result

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in), a new tensor: computed in float32 and rounded once."""
        if self._on_fused_cpu() and dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(self.shape, dtype=dtype)
            kernels.call("dequantize_8bit", self.codes, self.absmax, out, *self.shape, int(dtype == torch.float32))
            return out
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if out.is_meta:
            return out

        step = max(1, _chunk_values(out) // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            # Times 1 / 127, not divided by 127: the kernel rounds so, and both forms give the same bits.
            out[rows] = self.codes[rows].float() * (self.absmax[rows, None] * (1 / 127))
        return out

    def rows(self, start: int, stop: int) -> Int8:
        """Some rows as a matrix of its own, whose codes are views of these."""
        return Int8(self.config, (stop - start, self.shape[1]), self.codes[start:stop], self.absmax[start:stop])

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,): (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        if not (self._on_fused_cpu() and kernels.usable(x, kernel="matrix_vector_8bit")):
            return super().matrix_vector(x)
        y = torch.empty(self.shape[0], dtype=x.dtype)
        kernels.call("matrix_vector_8bit", self.codes, self.absmax, x, y, *self.shape)
        return y

    def _on_fused_cpu(self) -> bool:
        return _fused_on_cpu([self.codes, self.absmax])


class Groups(Quantized):
    """Groups of codes within a row, each between its own least and greatest value: ``scale * code + zero``.

    ``zero`` is the value of code 0, in float32. An update that is constant within a group only changes ``zero``, so a
    matrix keeps its codes when such an update is merged. Source: QA-LoRA, arXiv:2309.14717, section 3.3.

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
        """A matrix with tensors of the right shapes and undefined values, such as on the meta device."""
        rows, columns = shape
        groups = columns // config.block_size
        codes = torch.empty(rows, columns * config.code_bits // 8, dtype=torch.uint8, device=device)
        scale = torch.empty(rows, groups, dtype=torch.float16, device=device)
        return cls(config, shape, codes, scale, torch.empty(rows, groups, device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantizeConfig) -> Groups:
        """Quantize ``weight`` (out, in)."""
        result = cls.empty(config, (weight.shape[0], weight.shape[1]), weight.device)
        code_table = table(config.name, weight.device)
        highest_code = 2**code_table.bits - 1
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            chunk = weight.detach()[rows].float()
            groups = chunk.view(len(chunk), -1, config.block_size)
            least, greatest = groups.aminmax(dim=2)
            # Rounded to float16 first, so that codes are chosen for the scale that they will be multiplied by.
            scale = ((greatest - least) / highest_code).to(torch.float16)
            # A scale of 0 is a group of equal values, which `zero` alone gives.
            inverse = torch.where(scale > 0, 1 / scale.float(), 0)
            codes = ((groups - least[..., None]) * inverse[..., None]).round_().clamp_(0, highest_code).to(torch.uint8)
            result.scale[rows] = scale
            result.zero[rows] = least
            result.codes[rows] = code_table.pack(codes.view(-1)).view(len(codes), -1)
        return result

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
        block, bits = self.config.block_size, self.config.code_bits
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if self._on_fused_cpu() and dtype in (torch.bfloat16, torch.float32):
            sizes = self.scale.numel(), block, bits, int(dtype == torch.float32)
            kernels.call("dequantize_groups", self.codes, self.scale.float(), self.zero, out, *sizes)
            return out

        code_table = table(self.config.name, out.device)
        step = max(1, _chunk_values(out) // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            groups = code_table.unpack(self.codes[rows].reshape(-1)).view(-1, self.scale.shape[1], block)
            out[rows] = groups.mul_(self.scale[rows, :, None].float()).add_(self.zero[rows, :, None]).flatten(1)
        return out

    def rows(self, start: int, stop: int) -> Groups:
        """Some rows as a matrix of its own, whose codes are views of these."""
        tensors = (tensor[start:stop] for tensor in (self.codes, self.scale, self.zero))
        return Groups(self.config, (stop - start, self.shape[1]), *tensors)

    def matrix_vector(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` (in,): (out,) in the dtype of ``x``; in bfloat16 straight from the codes."""
        if not (self._on_fused_cpu() and kernels.usable(x, kernel="matrix_vector_groups")):
            return super().matrix_vector(x)
        y = torch.empty(self.shape[0], dtype=x.dtype)
        sizes = *self.shape, self.config.block_size, self.config.code_bits
        kernels.call("matrix_vector_groups", self.codes, self.scale.float(), self.zero, x, y, *sizes)
        return y

    def _on_fused_cpu(self) -> bool:
        return _fused_on_cpu([self.codes, self.scale, self.zero])


def _fused_on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether the fused CPU kernels can read these tensors."""
    readable = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return readable and kernels.library() is not None


Quantizer = Callable[[str, Tensor], Quantized]
"""Quantizes the weight (out, in) of the linear layer with this name."""

TYPES: dict[str, type[Blocks] | type[Groups] | type[Int8]] = {**dict.fromkeys(TABLES, Blocks), "int8": Int8}
TYPES["int4"] = TYPES["int2"] = Groups


def quantize(weight: Tensor, config: QuantizeConfig, *, name: str = "the matrix") -> Quantized:
    """Quantize a matrix.

    The codes are those of bitsandbytes, and the same on every device, with and without the fused kernel.

    Args:
        weight: (out, in), in any floating dtype and on any device; only read. On the meta device the result has no
            values either.
        config: How to quantize it.
        name: What to call the matrix in a message.

    Raises:
        UsageError: The block size does not divide the row length.
    """
    rows, columns = weight.shape
    kind = TYPES[config.name]
    if kind is not Int8 and columns % config.block_size:
        sizes = [size for size in get_args(BlockSize) if columns % size == 0]
        fitting = f"those that do: {', '.join(map(str, sizes))}" if sizes else "none does: use quantize.name=int8"
        raise UsageError(
            f"quantize.block_size: {config.block_size} does not divide the {columns} columns of {name}, {fitting}"
        )
    if weight.device.type == "meta":
        return kind.empty(config, (rows, columns), weight.device)
    return kind.of(weight, config)


def _quantize_blocks(x: Tensor, config: QuantizeConfig, codes: Tensor, absmax: Tensor) -> None:
    """Fill ``codes`` (n * bits / 8, 1) and ``absmax`` (n / block,) with the quantized ``x`` (n,) float32."""
    code_table = table(config.name, x.device)
    block = config.block_size
    if x.device.type == "cpu" and code_table.bits == 4 and kernels.library() is not None:
        lookup = code_table.midpoints, code_table.order
        kernels.call("quantize_4bit", x.contiguous(), *lookup, codes, absmax, len(absmax), block)
        return
    blocks = x.view(-1, block)
    absmax.copy_(blocks.abs().amax(1))
    # Multiplied by the inverse, not divided: bitsandbytes rounds so, and the codes shall be its.
    scaled = blocks * (1 / absmax.clamp(min=_SMALLEST))[:, None]
    codes.copy_(code_table.pack(code_table.nearest(scaled).view(-1)))


def _quantize_scales(scales: Tensor, codes: Tensor, nested: Tensor) -> None:
    """Fill ``codes`` (n,) uint8 with codes into ``DYNAMIC``, and ``nested`` with the absmax of each 256 ``scales``.

    Args:
        scales: (n,) float32.
        codes: (n,) uint8, written in place.
        nested: (n / 256 rounded up,) float32, written in place.
    """
    count = scales.numel()
    padded = torch.zeros(-(-count // NESTED) * NESTED, device=scales.device)
    padded[:count] = scales
    blocks = padded.view(-1, NESTED)
    nested.copy_(blocks.abs().amax(1))
    scaled = blocks * (1 / nested.clamp(min=_SMALLEST))[:, None]
    codes.copy_(nearest_dynamic(scaled).view(-1)[:count])
