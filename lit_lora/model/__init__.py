"""The decoder. It knows nothing of finetuning methods or training.

Shape letters throughout the package: ``B`` batch, ``T`` tokens, ``S`` cached or source tokens, ``D`` width, ``F`` MLP
width, ``N`` query heads, ``K`` key/value heads, ``H`` head size, ``V`` vocabulary, ``R`` rank.

The rooms of this package, as in the table of ``lit_lora``:

    3  decoder                                           the model: embedding, layers, head
    2  interface                                         what the rest of the package asks of any language model
    1  attention moe > layers                            what a layer is made of
    0  rope kv_cache > config ops > products families quantization   positions, cache, settings, arithmetic, tables
"""

from lit_lora.model.config import DTYPES, ModelConfig
from lit_lora.model.decoder import CausalLM
from lit_lora.model.families import FAMILIES
from lit_lora.model.interface import Cache, LanguageModel
from lit_lora.model.kv_cache import KVCache

__all__ = ["Cache", "DTYPES", "FAMILIES", "CausalLM", "KVCache", "LanguageModel", "ModelConfig"]
