"""The decoder, ignorant of methods and of training.

One legend of shape letters for the whole package: ``B`` batch, ``T`` tokens, ``S`` cached or source tokens, ``D``
width, ``F`` MLP width, ``N`` query heads, ``K`` key/value heads, ``H`` head size, ``V`` vocabulary, ``R`` rank.

The rooms of this package, as in the table of ``lit_lora``:

    2  decoder                                           the model: embedding, layers, head
    1  attention layers                                  what a layer is made of
    0  rope kv_cache > config ops > products             positions, cache, settings, arithmetic
"""

from lit_lora.model.config import DTYPES, FAMILIES, ModelConfig
from lit_lora.model.decoder import CausalLM
from lit_lora.model.kv_cache import KVCache

__all__ = ["DTYPES", "FAMILIES", "CausalLM", "KVCache", "ModelConfig"]
