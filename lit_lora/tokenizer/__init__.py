"""Tokenizer: text to ids, and conversations to ids with a loss mask."""

from lit_lora.tokenizer.backend import FAST, has_vocabulary, needs_conversion
from lit_lora.tokenizer.chat import (
    EncodedChat,
    RenderedChat,
    encode_chat,
    encode_completion,
    encode_prompt,
    encode_rendered,
    encode_text,
    render_chat,
)
from lit_lora.tokenizer.fields import REASONING_KEYS
from lit_lora.tokenizer.stream import TextStream
from lit_lora.tokenizer.template import ChatTemplate, Message, fold_system
from lit_lora.tokenizer.tokenizer import Tokenizer

__all__ = [
    "REASONING_KEYS",
    "ChatTemplate",
    "EncodedChat",
    "FAST",
    "Message",
    "RenderedChat",
    "TextStream",
    "Tokenizer",
    "encode_chat",
    "encode_completion",
    "encode_prompt",
    "encode_rendered",
    "encode_text",
    "fold_system",
    "has_vocabulary",
    "needs_conversion",
    "render_chat",
]
