"""GGUF, llama.cpp's format: reading a file as a Hugging Face checkpoint, and the table that both directions share.

``file`` knows bytes, ``ops`` and ``settings`` know what llama.cpp does to tensors and configs, ``families`` lists both
for every architecture, ``reader`` and ``tokenizer`` make a checkpoint of a file.
"""

from lit_lora.gguf.file import part_number
from lit_lora.gguf.reader import GGUFReader
from lit_lora.gguf.tokenizer import write_tokenizer

__all__ = ["GGUFReader", "part_number", "write_tokenizer"]
