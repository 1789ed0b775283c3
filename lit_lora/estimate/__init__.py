"""What a run will need, before it starts: memory by rehearsing a step on tensors without values, time by its work."""

from lit_lora.estimate.estimate import Estimate, Memory, estimate, outline
from lit_lora.estimate.rehearsal import on_paper
from lit_lora.estimate.setup import RowLengths, Setup
from lit_lora.estimate.shapes import SHAPES, model_shape

__all__ = ["SHAPES", "Estimate", "Memory", "RowLengths", "Setup", "estimate", "model_shape", "on_paper", "outline"]
