"""What a run will need, said before it starts: memory by arithmetic, time by arithmetic and one measured product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from lit_lora.data import Rows
from lit_lora.quantize import stored_bytes
from lit_lora.train.loop import TrainConfig
from lit_lora.train.loss import CHUNK

__all__ = ["Estimate", "estimate"]

_PROCESS_BYTES = 450_000_000
"""Python, torch and the libraries, measured on Linux."""

_EFFICIENCY = 0.4
"""Share of the matrix-product rate that a training step reaches; the rest is elementwise work and attention."""


@dataclass(frozen=True)
class Estimate:
    """Rough figures; a real measurement is in the run's result."""

    memory_bytes: int
    disk_bytes: int
    seconds_per_step: float


def estimate(model: nn.Module, rows: Rows, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Estimate:
    """Estimate peak memory, disk space, and time per step of training ``model`` on ``rows``.

    Memory: the weights; 16 bytes per trainable number (float32 value, gradient, two moments); what the layers keep of a
    micro-batch for their backward; one chunk of logits. Disk: 12 bytes per trainable number in each checkpoint
    (the best, those kept and one more while it is written), and the trained weights at the end.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = {id(p): p for p in model.parameters()}.values()
    trainable = sum(p.numel() for p in weights if p.requires_grad)
    stored = stored_bytes(model)
    longest = int(rows.token_counts.max())
    step_tokens = float(rows.token_counts.mean()) * config.batch_size
    at_once = max(longest, min(config.micro_batch_tokens, step_tokens))
    # Each linear layer keeps its input; normed inputs, gates and attention keep about as much again.
    widths = sum(linear.in_features + linear.out_features for linear in linears if linear.out_features < 20_000)
    activations = at_once * widths * dtype.itemsize
    logits = CHUNK * max((linear.out_features for linear in linears), default=0) * (4 + dtype.itemsize)
    memory = _PROCESS_BYTES * (device.type == "cpu") + stored + 16 * trainable + activations + logits
    products = 4 * step_tokens * sum(linear.in_features * linear.out_features for linear in linears)
    written = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    disk = 12 * trainable * (config.keep_last + 2) + written
    return Estimate(int(memory), int(disk), products / (_product_rate(dtype, device) * _EFFICIENCY))


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product here and now; takes a fraction of a second."""
    a, b = (torch.ones(1024, 1024, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best
