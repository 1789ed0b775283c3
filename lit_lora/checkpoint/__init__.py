"""Checkpoints: Hugging Face folders, read and written tensor by tensor, and the formats that convert to them."""

from __future__ import annotations

from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.checkpoint.tensors import TensorReader, open_tensors

__all__ = ["CheckpointWriter", "TensorReader", "copy_side_files", "load_model", "open_tensors"]
