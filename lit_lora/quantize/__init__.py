"""Linear layers whose weights take 4 or 8 bits: NF4, FP4, int8."""

from lit_lora.quantize.config import QuantizeConfig
from lit_lora.quantize.linear import QuantizedLinear, count_quantized, found_config, stored_bytes
from lit_lora.quantize.weights import FourBit, Int8, Quantized, quantize

__all__ = [
    "FourBit",
    "Int8",
    "QuantizeConfig",
    "Quantized",
    "QuantizedLinear",
    "count_quantized",
    "found_config",
    "quantize",
    "stored_bytes",
]
