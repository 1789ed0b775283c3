"""Linear layers whose weights take 2 to 8 bits: NF4, NF3 and NF2, FP4, groups of int4 or int2, rows of int8."""

from lit_lora.quantize.config import QuantizeConfig
from lit_lora.quantize.linear import QuantizedLinear, count_quantized, found_config, stored_bytes
from lit_lora.quantize.weights import Blocks, Groups, Int8, Quantized, Quantizer, quantize

__all__ = [
    "Blocks",
    "Groups",
    "Int8",
    "QuantizeConfig",
    "Quantized",
    "QuantizedLinear",
    "Quantizer",
    "count_quantized",
    "found_config",
    "quantize",
    "stored_bytes",
]
