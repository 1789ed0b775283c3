"""Any decoder that transformers implements, behind the protocol that our own decoder has.

A hosted model is transformers' own modules with transformers' own parameter names. Attention is ours where that is
right for the model, so that documents are packed and share a prefix; see :mod:`lit_lora.hf.rows`. Nothing is taken on
trust: :func:`lit_lora.hf.selftest.choose` compares with the model itself when it is opened.
"""

from lit_lora.hf.causal import HostedLM, build, fill_buffers
from lit_lora.hf.config import HostedConfig, config_from_hf, is_decoder, read_config
from lit_lora.hf.quiet import quiet
from lit_lora.hf.selftest import choose

__all__ = [
    "HostedConfig",
    "HostedLM",
    "build",
    "choose",
    "config_from_hf",
    "fill_buffers",
    "is_decoder",
    "quiet",
    "read_config",
]
