"""What a run will need, said before it starts: memory by rehearsing a step on paper, time by its products."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from lit_lora.checkpoint.load import decoder_linears, empty_model
from lit_lora.data import Rows
from lit_lora.data.batches import Batches
from lit_lora.estimate.rehearsal import MicroBatchShape, Peak, rehearse
from lit_lora.estimate.setup import RowLengths, Setup
from lit_lora.model import CausalLM
from lit_lora.peft import freeze
from lit_lora.peft.core.capabilities import ChoosesTypes, calibration_rows
from lit_lora.peft.core.passes import Pass, mean_squares
from lit_lora.quantize import QuantizeConfig, Quantizer, stored_bytes
from lit_lora.train.loss import padded
from lit_lora.train.optim import optimizers
from lit_lora.train.optim.build import build_optimizer, state_bytes
from lit_lora.train.optim.master_weights import MasterWeights

__all__ = ["Estimate", "Memory", "estimate", "outline"]

_PROCESS_BYTES = {"cpu": 506_000_000, "cuda": 500_000_000}
"""Python, torch and the libraries on the CPU; the driver's context and the libraries' workspaces on a GPU."""

_HOLES = 60
"""In bfloat16 on a CPU: times the hidden states of a micro-batch, what the allocator holds beside what is in use."""

_SLACK = 0.32
"""In other dtypes on a CPU: the same as a share of what a step allocates. Measured: benchmarks/estimate_202611.md."""

_EFFICIENCY = {"cpu": 0.6}

_OTHER_EFFICIENCY = 0.4
"""Share of the matrix-product rate that a training step reaches; the rest is elementwise work and attention. Measured
on CPUs, in the same place."""

_MEASURED_SECONDS = 0.3

_MOVED = 1 << 21
"""Numbers by which an optimizer's step is measured."""

_LOOKED_AT = 500
"""Steps among which the largest micro-batch is looked for."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak, by what holds them."""

    weights: int
    """The model's own tensors."""
    trained: int
    """What a method added, and float32 masters of weights that train in lower precision."""
    optimizer: int
    """Moments."""
    gradients: int
    activations: int
    """Kept from the forward pass for the backward."""
    logits: int
    """In the output layer and the loss."""
    workspace: int
    """What the backward holds beside gradients, and what the allocator cannot use."""
    process: int
    """Before any tensor."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    memory: Memory
    """Of a step."""
    weighing_bytes: int
    """Before the first step, while rows say how much errors of a quantised base matter; 0 where they do not."""
    disk_bytes: int
    seconds_per_step: float | None
    """``None`` where the device is not in this machine."""
    trainable: int
    """Numbers that train."""

    @property
    def peak_bytes(self) -> int:
        """Memory of the whole run at its peak."""
        return max(self.memory.total, self.weighing_bytes)


def outline(setup: Setup) -> CausalLM:
    """The model of a setup as its recipe makes it, on the meta device."""
    shape = setup.shape.model_copy(update={"dtype": str(setup.dtype).removeprefix("torch.")})
    quantize: QuantizeConfig | Quantizer | None = setup.quantize
    if quantize is not None and isinstance(setup.peft, ChoosesTypes):
        quantize = setup.peft.planned(empty_model(shape))
    model = empty_model(shape, quantize).to(setup.dtype)
    freeze(model)
    setup.peft.apply(model)
    model.checkpoint_activations(setup.train.activation_checkpointing)
    return model


def estimate(setup: Setup, model: nn.Module | None = None) -> Estimate:
    """Estimate peak memory, disk space, and time per step.

    Args:
        setup: The run.
        model: Its model from :func:`on_paper`; made by :func:`outline` when omitted.
    """
    model = outline(setup) if model is None else model
    assert isinstance(model, CausalLM)
    model.train()
    parameters = set(model.parameters())
    masters = list(MasterWeights(model).masters.values())
    trained = sum(master.nbytes for master in masters)
    own = 0 if setup.peft.kind == "full" else sum(master.nbytes for master in masters if master in parameters)
    copies = sum(master.nbytes for master in masters if master not in parameters)
    micro_batch, several, step_tokens = _largest(setup)
    peak = rehearse(model, micro_batch, fused=_kernels_of(setup), masters=masters if several else ())
    gradients = min(trained, peak.backward)
    tokens = padded(micro_batch.tokens, setup.device.type)
    memory = Memory(
        weights=stored_bytes(model) - own,
        trained=own + copies,
        optimizer=state_bytes(setup.optimizer, masters),
        gradients=gradients,
        activations=peak.activations,
        logits=peak.logits,
        workspace=peak.backward - gradients + _unused(setup, tokens, peak),
        process=_PROCESS_BYTES.get(setup.device.type, 0),
    )
    numbers = sum(master.numel() for master in masters)
    written = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    disk = (trained + state_bytes(setup.optimizer, masters)) * (setup.train.keep_last + 2) + written
    seconds = _seconds(setup, peak.operations / tokens * step_tokens, numbers)
    return Estimate(memory, _weighing(setup), disk, seconds, numbers)


def _largest(setup: Setup) -> tuple[MicroBatchShape, bool, float]:
    """The micro-batch with the most tokens, whether some step has several, and the mean tokens of a step."""
    rows, train = setup.rows, setup.train
    batches = Batches(
        cast(Rows, rows),
        batch_size=train.batch_size,
        micro_batch_tokens=train.micro_batch_tokens,
        seed=setup.seed,
        shared_prefix=rows.shared_prefix,
    )
    looked_at = range(min(train.total_steps(batches.steps_per_epoch), batches.steps_per_epoch, _LOOKED_AT))
    steps = [[_portion(rows, places) for places in batches.places(step)] for step in looked_at]
    largest = max((micro_batch for step in steps for micro_batch in step), key=lambda micro_batch: micro_batch.tokens)
    mean = sum(micro_batch.tokens for step in steps for micro_batch in step) / len(steps)
    return largest, any(len(step) > 1 for step in steps), mean


def _portion(rows: RowLengths, places: list[int]) -> MicroBatchShape:
    """A micro-batch of these rows."""
    shared_prefix = rows.shared_prefix if len(places) > 1 else 0
    targets = max(1, int(rows.target_counts[places].sum()))
    return MicroBatchShape(rows.token_counts[places].tolist(), targets, shared_prefix)


def _kernels_of(setup: Setup) -> str | None:
    """The type of device whose kernels a step takes."""
    return setup.device.type if setup.device.type in ("cpu", "cuda") else None


def _weighing(setup: Setup) -> int:
    """Bytes while a method looks at rows one by one with the model in full, and has one layer's gradient at a time."""
    rows, count = setup.rows, calibration_rows(setup.peft)
    if not count:
        return 0
    longest = int(rows.token_counts[:count].argmax())
    micro_batch = MicroBatchShape([int(rows.token_counts[longest])], max(1, int(rows.target_counts[longest])))
    model = empty_model(setup.shape).to(setup.dtype)
    freeze(model)
    peaks: list[Peak] = []

    def step() -> None:
        peaks.append(rehearse(model, micro_batch, fused=_kernels_of(setup)))

    mean_squares(model, decoder_linears(model), [Pass(torch.empty(0), step)])
    (peak,) = peaks
    used, kind = stored_bytes(model) + peak.activations + peak.logits + peak.backward, setup.device.type
    return used + _unused(setup, padded(micro_batch.tokens, kind), peak) + _PROCESS_BYTES.get(kind, 0)


def _unused(setup: Setup, tokens: int, peak: Peak) -> int:
    """Bytes that the allocator holds and nothing uses."""
    if setup.device.type == "cpu" and setup.dtype == torch.bfloat16:
        return _HOLES * tokens * setup.shape.hidden_size * setup.dtype.itemsize
    share = _SLACK if setup.device.type == "cpu" else 0.05
    return int(share * (peak.activations + peak.logits + peak.backward))


def _seconds(setup: Setup, operations: float, trained: int) -> float | None:
    """Of one step, by a matrix product that is measured here and now; ``None`` where the device is not here.

    On a CPU most optimizers take less than a nanosecond per parameter, which is left out; the others are measured too.
    """
    if setup.device.type == "cuda" and not torch.cuda.is_available():
        return None
    rate = _product_rate(setup.dtype, setup.device, setup.shape.hidden_size, setup.shape.intermediate_size)
    products = operations / (rate * _EFFICIENCY.get(setup.device.type, _OTHER_EFFICIENCY))
    slow_optimizer = setup.optimizer.cpu_time_of if setup.device.type == "cpu" else None
    return products + (trained * _seconds_per_parameter(slow_optimizer) if slow_optimizer else 0.0)


@lru_cache(maxsize=8)
def _product_rate(dtype: torch.dtype, device: torch.device, width: int, inner: int) -> float:
    """Floating-point operations per second of an MLP's product here and now; takes a fraction of a second.

    The best of many products, short ones on a CPU: what else runs there interrupts few of those.
    """
    tokens = 128 if device.type == "cpu" else 512
    a, b = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (tokens, inner))
    best, begun = 0.0, time.perf_counter()
    while best == 0 or time.perf_counter() - begun < _MEASURED_SECONDS:
        started = time.perf_counter()
        float((a @ b.T)[0, 0])  # waits for a GPU
        best = max(best, 2 * tokens * width * inner / (time.perf_counter() - started))
    return best


@lru_cache(maxsize=8)
def _seconds_per_parameter(optimizer_name: str) -> float:
    """Time of an optimizer's step on this CPU, measured now; takes a fraction of a second."""
    master_weights = MasterWeights(nn.ParameterList([torch.ones(_MOVED)]))
    optimizer = build_optimizer(optimizers()[optimizer_name](), master_weights)
    for master in master_weights.masters.values():
        master.grad = torch.ones_like(master)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return min(times) / _MOVED
