"""Data: files of rows in, token ids with their learned targets out.

:mod:`lit_lora.data.batches` lays rows into training steps; it is the only part that imports torch, so it stands apart.
"""

from lit_lora.data.config import DataConfig
from lit_lora.data.prepare import Prepared, prepare
from lit_lora.data.report import Report, show_rows
from lit_lora.data.rows import Row, Rows
from lit_lora.files import cache_folder

__all__ = ["DataConfig", "Prepared", "Report", "Row", "Rows", "cache_folder", "prepare", "show_rows"]
