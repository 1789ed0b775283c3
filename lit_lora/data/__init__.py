"""Data: files of rows in, token ids with a loss mask out.

:mod:`lit_lora.data.batches` and :mod:`lit_lora.data.padded` turn rows into training steps. They import torch, so this
file does not import them.
"""

from lit_lora.data.config import DataConfig
from lit_lora.data.prepare import Prepared, prepare
from lit_lora.data.report import Report, show_rows
from lit_lora.data.rows import Row, Rows
from lit_lora.files import cache_folder

__all__ = ["DataConfig", "Prepared", "Report", "Row", "Rows", "cache_folder", "prepare", "show_rows"]
