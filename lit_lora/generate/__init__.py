"""Generation: sampling, streaming, chat sessions with a key/value cache."""

from lit_lora.generate.answer import Answer, AnswerStream, answer_all, stream_answer
from lit_lora.generate.chat import ChatSession
from lit_lora.generate.decoding import Generation, PrefixCache, generate
from lit_lora.generate.sample import Sampling, choose, draw, probabilities

__all__ = [
    "Answer",
    "AnswerStream",
    "ChatSession",
    "Generation",
    "PrefixCache",
    "Sampling",
    "answer_all",
    "choose",
    "draw",
    "generate",
    "probabilities",
    "stream_answer",
]
