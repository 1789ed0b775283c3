"""Estimate what a run will need: memory from a rehearsed step, time from the matrix products that it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from lit_lora.checkpoint.load import AnyModel, decoder_linears, empty_model
from lit_lora.data import Rows
from lit_lora.data.batches import Batches
from lit_lora.estimate.rehearsal import MicroBatchShape, Peak, rehearse
from lit_lora.estimate.setup import RowLengths, Setup
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

# The allocator holds more than what is in use at a time. Measured: benchmarks/estimate_202611.md.
_UNUSED_HIDDEN_STATES = 60
"""In bfloat16 on a CPU: as a multiple of a micro-batch's hidden states."""
_UNUSED_SHARE = 0.32
"""In other dtypes on a CPU: as a share of what a step allocates."""
_UNUSED_SHARE_OTHER = 0.05
"""The same on other devices."""

# Share of the speed of a matrix product that a training step reaches; the rest is elementwise work and attention.
# Measured on CPUs: benchmarks/estimate_202611.md.
_EFFICIENCY = {"cpu": 0.6}
_OTHER_EFFICIENCY = 0.4

_MEASURED_SECONDS = 0.3
"""How long the speed of a matrix product is measured."""

_MEASURED_PARAMETERS = 1 << 21
"""Parameters with which the step of an optimizer is measured."""

_EXAMINED_STEPS = 500
"""Maximum number of steps that are searched for the largest micro-batch."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by component."""

    weights: int
    """The base model's tensors."""
    trained: int
    """What a method added, and float32 masters of weights that train in lower precision."""
    optimizer: int
    """Optimizer state."""
    gradients: int
    activations: int
    """Kept from the forward pass for the backward pass."""
    logits: int
    """In the output layer and the loss."""
    workspace: int
    """What the backward pass holds besides gradients, and what the allocator holds unused."""
    process: int
    """Before any tensor."""

    @property
    def total(self) -> int:
        """Sum of all components."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    memory: Memory
    """Memory of a step."""
    calibration_bytes: int
    """Memory before the first step, while calibration rows pass through the base in full; 0 without such rows."""
    disk_bytes: int
    seconds_per_step: float | None
    """``None`` if the device is not in this machine."""
    trainable: int
    """Number of trainable parameters."""

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the whole run."""
        return max(self.memory.total, self.calibration_bytes)


def outline(setup: Setup) -> AnyModel:
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
    """Estimate peak memory, disk space and time per step.

    Args:
        setup: The run.
        model: Its model from :func:`on_paper`; made by :func:`outline` when omitted.
    """
    model = outline(setup) if model is None else model
    assert isinstance(model, AnyModel)
    model.train()
    parameters = set(model.parameters())
    masters = list(MasterWeights(model).masters.values())

    # A float32 parameter is its own master. Where a method added it, it counts as trained, not as the model's weights.
    trained = sum(master.nbytes for master in masters)
    added = 0 if setup.peft.kind == "full" else sum(master.nbytes for master in masters if master in parameters)
    copies = sum(master.nbytes for master in masters if master not in parameters)

    micro_batch, accumulates, tokens_per_step = _largest(setup)
    peak = rehearse(model, micro_batch, fused=_kernels_of(setup), masters=masters if accumulates else ())
    gradients = min(trained, peak.backward)
    tokens = padded(micro_batch.tokens, setup.device.type)
    optimizer_bytes = state_bytes(setup.optimizer, masters)
    memory = Memory(
        weights=stored_bytes(model) - added,
        trained=added + copies,
        optimizer=optimizer_bytes,
        gradients=gradients,
        activations=peak.activations,
        logits=peak.logits,
        workspace=peak.backward - gradients + _unused(setup, tokens, peak),
        process=_PROCESS_BYTES.get(setup.device.type, 0),
    )

    result = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # The last checkpoints, the best one, and one that is being written.
    disk = (trained + optimizer_bytes) * (setup.train.keep_last + 2) + result
    trainable = sum(master.numel() for master in masters)
    seconds = _seconds(setup, peak.operations / tokens * tokens_per_step, trainable)
    return Estimate(memory, _calibration(setup), disk, seconds, trainable)


def _largest(setup: Setup) -> tuple[MicroBatchShape, bool, float]:
    """The micro-batch with the most tokens, whether any step has several, and the mean number of tokens of a step."""
    rows, train = setup.rows, setup.train
    batches = Batches(
        cast(Rows, rows),
        batch_size=train.batch_size,
        micro_batch_tokens=train.micro_batch_tokens,
        seed=setup.seed,
        shared_prefix=rows.shared_prefix,
        mixture=rows.mixture,
    )
    count = min(train.total_steps(batches.steps_per_epoch), batches.steps_per_epoch, _EXAMINED_STEPS)
    micro_batches: list[MicroBatchShape] = []
    accumulates = False
    for step in range(count):
        of_step = [_micro_batch(rows, places) for places in batches.places(step)]
        accumulates = accumulates or len(of_step) > 1
        micro_batches += of_step
    largest = max(micro_batches, key=lambda micro_batch: micro_batch.tokens)
    mean = sum(micro_batch.tokens for micro_batch in micro_batches) / count
    return largest, accumulates, mean


def _micro_batch(rows: RowLengths, places: list[int]) -> MicroBatchShape:
    """The micro-batch of the rows at these places."""
    shared_prefix = rows.shared_prefix if len(places) > 1 else 0
    targets = max(1, int(rows.target_counts[places].sum()))
    return MicroBatchShape(rows.token_counts[places].tolist(), targets, shared_prefix)


def _kernels_of(setup: Setup) -> str | None:
    """The type of device whose kernels a step uses."""
    return setup.device.type if setup.device.type in ("cpu", "cuda") else None


def _calibration(setup: Setup) -> int:
    """Bytes while calibration rows pass, one by one, through the whole model with one layer's gradient at a time."""
    rows = setup.rows
    count = calibration_rows(setup.peft)
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
    device = setup.device.type
    tensors = stored_bytes(model) + peak.activations + peak.logits + peak.backward
    return tensors + _unused(setup, padded(micro_batch.tokens, device), peak) + _PROCESS_BYTES.get(device, 0)


def _unused(setup: Setup, tokens: int, peak: Peak) -> int:
    """Bytes that the allocator holds although nothing uses them."""
    if setup.device.type == "cpu" and setup.dtype == torch.bfloat16:
        return _UNUSED_HIDDEN_STATES * tokens * setup.shape.hidden_size * setup.dtype.itemsize
    share = _UNUSED_SHARE if setup.device.type == "cpu" else _UNUSED_SHARE_OTHER
    return int(share * (peak.activations + peak.logits + peak.backward))


def _seconds(setup: Setup, operations: float, trainable: int) -> float | None:
    """Duration of a step, by the measured speed of a matrix product; ``None`` if the device is not in this machine.

    On a CPU most optimizers take less than a nanosecond per parameter, which is ignored; the others are measured too.
    """
    if setup.device.type == "cuda" and not torch.cuda.is_available():
        return None
    rate = _product_rate(setup.dtype, setup.device, setup.shape.hidden_size, setup.shape.intermediate_size)
    products = operations / (rate * _EFFICIENCY.get(setup.device.type, _OTHER_EFFICIENCY))
    slow_optimizer = setup.optimizer.cpu_time_of if setup.device.type == "cpu" else None
    return products + (trainable * _seconds_per_parameter(slow_optimizer) if slow_optimizer else 0.0)


@lru_cache(maxsize=8)
def _product_rate(dtype: torch.dtype, device: torch.device, width: int, inner: int) -> float:
    """Floating-point operations per second of an MLP's matrix product on this machine; measured for 0.3 seconds.

    The best of many products. On a CPU they are short, so that few of them are interrupted by other processes.
    """
    tokens = 128 if device.type == "cpu" else 512
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(inner, width, dtype=dtype, device=device)
    best = 0.0
    begun = time.perf_counter()
    while best == 0 or time.perf_counter() - begun < _MEASURED_SECONDS:
        started = time.perf_counter()
        float((x @ weight.T)[0, 0])  # reading a value waits for a GPU
        best = max(best, 2 * tokens * width * inner / (time.perf_counter() - started))
    return best


@lru_cache(maxsize=8)
def _seconds_per_parameter(optimizer_name: str) -> float:
    """Seconds per parameter that a step of this optimizer takes on this CPU; measured in a fraction of a second."""
    master_weights = MasterWeights(nn.ParameterList([torch.ones(_MEASURED_PARAMETERS)]))
    optimizer = build_optimizer(optimizers()[optimizer_name](), master_weights)
    for master in master_weights.masters.values():
        master.grad = torch.ones_like(master)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return min(times) / _MEASURED_PARAMETERS
