"""Tokenizer: text to ids, and conversations to ids with a loss mask."""

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
from lit_lora.tokenizer.stream import TextStream
from lit_lora.tokenizer.template import ChatTemplate, Message
from lit_lora.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "EncodedChat",
    "Message",
    "RenderedChat",
    "TextStream",
    "Tokenizer",
    "encode_chat",
    "encode_completion",
    "encode_prompt",
    "encode_rendered",
    "encode_text",
    "render_chat",
]
