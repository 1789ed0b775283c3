"""Linear layers and experts in 2 to 8 bits per weight: NF4, NF3 and NF2, FP4, groups of int4 or int2, rows of int8."""

from lit_lora.quantize.config import QuantizeConfig
from lit_lora.quantize.linear import QuantizedLinear, count_quantized, found_config, stored_bytes
from lit_lora.quantize.stack import QuantizedStack, quantize_stack, quantized_stacks
from lit_lora.quantize.weights import Blocks, Groups, Int8, Quantized, Quantizer, quantize

__all__ = [
    "Blocks",
    "Groups",
    "Int8",
    "QuantizeConfig",
    "Quantized",
    "QuantizedLinear",
    "QuantizedStack",
    "Quantizer",
    "count_quantized",
    "found_config",
    "quantize",
    "quantize_stack",
    "quantized_stacks",
    "stored_bytes",
]
