"""A micro-batch on a GPU as one recording: its kernels are launched at once, not one by one from Python.

A small model's kernels run faster than Python can launch them. What a micro-batch computes differs from the next only
in the numbers, once sizes are rounded up; so each size is recorded as a CUDA graph when it first comes, and repeated
with other numbers from then on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_lora import kernels, log
from lit_lora.model import CausalLM
from lit_lora.model.attention import flash as varlen_attention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.train.loss import Batch, Inputs, backward, backward_from, inputs_of

__all__ = ["Given", "GraphRunner"]

_MOST = 32
"""Recordings kept, each in some memory of the driver's; the one unused for longest goes first, and is made anew when it
is needed again."""

_DOCUMENTS = 16
"""The number of documents is rounded up to a multiple of this."""


class GraphRunner:
    """The micro-batches of one model in training, recorded.

    Every step must do the same operations on it: what Python decides while a micro-batch is recorded stays decided.
    """

    def __init__(self) -> None:
        self._recordings: dict[tuple[int, ...], _Recording] = {}  # the most recently used last
        self._gradients: list[tuple[Tensor, Tensor]] = []  # (parameter, where its gradient is added up)
        self._pool: Any = None
        self._usable: bool | None = None

    def backward(self, model: CausalLM, batch: Batch, scale: float) -> Tensor | float:
        """As :func:`lit_lora.train.loss.backward`, and by it where nothing can be recorded.

        Raises:
            OutOfMemoryError: The micro-batch needs more memory than there is.
        """
        if self._usable is None:
            self._usable = _recordable(model)
        if self._usable:
            device = next(model.parameters()).device
            with torch.cuda.device(device):  # the one whose work is recorded
                inputs = inputs_of(batch, device)
                if inputs is None:
                    return 0.0
                loss = self._repeat(model, Given.of(model, inputs, scale))
            if loss is not None:
                return loss
            self._usable = False
        return backward(model, batch, scale)

    def _repeat(self, model: CausalLM, given: Given) -> Tensor | None:
        """By the recording of its size, which is made when there is none; ``None`` where it cannot be made."""
        self._hold_gradients(model)
        size = given.size
        recording = self._recordings.pop(size, None) or self._record(model, given)
        if recording is None:
            return None
        self._recordings[size] = recording  # now the last
        return recording.repeat(given)

    def _hold_gradients(self, model: CausalLM) -> None:
        """Let the gradients be where recordings add them, from 0 in each step."""
        if not self._gradients:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._gradients = [(parameter, torch.empty_like(parameter)) for parameter in trained]
        fresh = [gradient for parameter, gradient in self._gradients if parameter.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, gradient in self._gradients:
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _record(self, model: CausalLM, given: Given) -> _Recording | None:
        """A new recording; ``None`` where something asks the GPU for a number, or a driver cannot make one."""
        stream = torch.cuda.current_stream()
        try:
            return self._capture(model, given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # PyTorch stays in the stream of a recording that failed
            reason = str(error).partition("\n")[0]
            log.note(f"the GPU's work cannot be recorded here, its kernels are launched one by one: {reason}")
            return None

    def _capture(self, model: CausalLM, given: Given) -> _Recording:
        if self._pool is None:  # what libraries and kernels prepare on first use must not be recorded
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
                given.with_scale(0.0).backward(model)
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = torch.cuda.graph_pool_handle()
        while len(self._recordings) >= _MOST:
            del self._recordings[next(iter(self._recordings))]
        own = given.copy()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = own.backward(model)
        return _Recording(graph, own, loss)


class Given(NamedTuple):
    """What differs from micro-batch to micro-batch of one size: tensors on the GPU."""

    inputs: Inputs
    attend: PackedAttention
    scale: Tensor
    """float32 scalar."""

    @staticmethod
    def of(model: CausalLM, inputs: Inputs, scale: float) -> Given:
        """With documents of nothing but what all begin with, so that few numbers of documents occur."""
        lengths = inputs.lengths + [inputs.shared_prefix] * (-len(inputs.lengths) % _DOCUMENTS)
        device = inputs.input_ids.device
        attend = PackedAttention(model.config, lengths, device, shared_prefix=inputs.shared_prefix)
        return Given(inputs._replace(lengths=lengths), attend, torch.full((), scale, device=device))

    @property
    def size(self) -> tuple[int, ...]:
        """All that a recording depends on."""
        inputs, layout = self.inputs, self.attend.layout
        longest = varlen_attention.longest(layout)
        return inputs.input_ids.shape[1], len(inputs.positions), len(inputs.lengths), inputs.shared_prefix, longest

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        inputs, attend = self.inputs, self.attend
        places = attend.layout.on(attend.positions.device)
        return [inputs.input_ids, inputs.positions, inputs.labels, *attend.rope, *places, self.scale]

    def with_scale(self, scale: float) -> Given:
        """The same with another factor of the gradients."""
        return self._replace(scale=torch.full_like(self.scale, scale))

    def copy(self) -> Given:
        """With tensors of its own."""
        ids, positions, labels, cosine, sine, *places, scale = (tensor.clone() for tensor in self.tensors)
        inputs = self.inputs._replace(input_ids=ids, positions=positions, labels=labels)
        return Given(inputs, self.attend.copy((cosine, sine), places), scale)

    def backward(self, model: CausalLM) -> Tensor:
        """See :func:`lit_lora.train.loss.backward_from`."""
        hidden = model.hidden_states(self.inputs.input_ids, attend=self.attend)[0]
        return backward_from(model, hidden, self.inputs, self.scale)


class _Recording(NamedTuple):
    """A recorded micro-batch."""

    graph: torch.cuda.CUDAGraph
    given: Given
    """The tensors that it reads."""
    loss: Tensor
    """The scalar that it writes."""

    def repeat(self, given: Given) -> Tensor:
        """Compute another micro-batch of its size: gradients are added up; returns the sum of losses."""
        for own, tensor in zip(self.given.tensors, given.tensors, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        return self.loss.clone()


def _recordable(model: Any) -> bool:
    """Whether all that a micro-batch of the model does happens on a GPU, on tensors that stay where they are.

    ``LIT_LORA_KERNELS=0``, which leaves all to PyTorch, switches recording off too.
    """
    if not isinstance(model, CausalLM) or not next(model.parameters()).is_cuda:
        return False
    if model.recomputes or kernels.switched_off():
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config, embedding = model.config, model.get_input_embeddings().get_parameter("weight")
    head = embedding.new_empty(1, config.num_attention_heads, config.head_dim)
    # Gradients of parameters in half precision are handed on by Python, one by one.
    return varlen_attention.usable(head) and all(parameter.dtype == torch.float32 for parameter in trained)
