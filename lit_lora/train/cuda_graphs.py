"""A micro-batch on a GPU as one CUDA graph: its kernels are launched at once, not one by one from Python.

A small model's kernels run faster than Python can launch them. Once sizes are rounded up, a micro-batch differs from
the next only in its numbers; so each size is captured as a CUDA graph when it first occurs, and replayed with other
numbers from then on.

A graph replays kernels with the addresses and the arguments of its capture. Hence the rules that this file keeps:

- Inputs lie at the same addresses in every replay: new ones are copied into the graph's own tensors.
- Gradients too: the same buffers in every step, zeroed instead of dropped.
- What Python decides while capturing stays decided: sizes, documents' count and the longest document are the key.
- Nothing may wait for the GPU, or be copied from the CPU, while capturing.
- What libraries set up on first use must be set up before: a warm-up pass precedes the first capture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_lora import kernels, log
from lit_lora.model import CausalLM
from lit_lora.model.attention import flash
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.train.loss import Batch, Inputs, backward, backward_from, inputs_of

__all__ = ["GraphInputs", "GraphRunner"]

_MOST_GRAPHS = 32
"""Graphs kept, as each takes memory of the driver's. The least recently used goes first, and is captured anew when it
is needed again."""

_DOCUMENT_STEP = 16
"""The number of documents is rounded up to a multiple of this."""


class GraphRunner:
    """The micro-batches of one model in training, as CUDA graphs.

    Every step must do the same operations on the model, which :attr:`Method.graph_safe` of its method promises.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, ...], _Graph] = {}  # by size; the most recently used last
        self._gradients: list[tuple[Tensor, Tensor]] = []  # (parameter, the buffer in which graphs add its gradient up)
        self._pool: Any = None  # one memory pool for all graphs, as only one runs at a time
        self._usable: bool | None = None

    def backward(self, model: CausalLM, batch: Batch, scale: float) -> Tensor | float:
        """As :func:`lit_lora.train.loss.backward`, and by it where no graph can be captured.

        Raises:
            OutOfMemoryError: The micro-batch needs more memory than there is.
        """
        if self._usable is None:
            self._usable = _capturable(model)
        if not self._usable:
            return backward(model, batch, scale)

        device = next(model.parameters()).device
        with torch.cuda.device(device):  # capturing is of the current device's work
            inputs = inputs_of(batch, device)
            if inputs is None:
                return 0.0
            loss = self._run(model, GraphInputs.of(model, inputs, scale))
        if loss is None:
            self._usable = False
            return backward(model, batch, scale)
        return loss

    def _run(self, model: CausalLM, inputs: GraphInputs) -> Tensor | None:
        """The loss by the graph of this size, captured when there is none; ``None`` where that fails."""
        self._place_gradients(model)
        size = inputs.size
        graph = self._graphs.pop(size, None) or self._try_capture(model, inputs)
        if graph is None:
            return None
        self._graphs[size] = graph  # now the last
        return graph.replay(inputs)

    def _place_gradients(self, model: CausalLM) -> None:
        """Let every ``.grad`` be the buffer that graphs add to, zeroed where the optimizer has dropped it."""
        if not self._gradients:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._gradients = [(parameter, torch.empty_like(parameter)) for parameter in trained]

        dropped = [gradient for parameter, gradient in self._gradients if parameter.grad is None]
        if dropped:
            torch._foreach_zero_(dropped)
        for parameter, gradient in self._gradients:
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)  # of a micro-batch that ran without a graph
            parameter.grad = gradient

    def _try_capture(self, model: CausalLM, inputs: GraphInputs) -> _Graph | None:
        """A new graph; ``None``, with a note, where something waits for the GPU, or the driver cannot capture."""
        stream = torch.cuda.current_stream()
        try:
            return self._capture(model, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # after a capture that failed, PyTorch stays in its stream
            reason = str(error).partition("\n")[0]
            log.note(f"CUDA graphs cannot be used here; launching kernels one by one: {reason}")
            return None

    def _capture(self, model: CausalLM, inputs: GraphInputs) -> _Graph:
        if self._pool is None:
            self._warm_up(model, inputs)
            self._pool = torch.cuda.graph_pool_handle()
        while len(self._graphs) >= _MOST_GRAPHS:
            least_recent = next(iter(self._graphs))
            del self._graphs[least_recent]

        graph_inputs = inputs.copy()  # made before capturing starts, outside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = graph_inputs.backward(model)
        return _Graph(graph, graph_inputs, loss)

    def _warm_up(self, model: CausalLM, inputs: GraphInputs) -> None:
        """Run a micro-batch that changes nothing, in a stream of its own as PyTorch asks for before a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Scale 0 adds 0 to the gradients, and dropout draws the same numbers afterwards as it would have before.
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
            inputs.with_scale(0.0).backward(model)
        torch.cuda.current_stream().wait_stream(stream)


class GraphInputs(NamedTuple):
    """What differs between micro-batches of one size: tensors on the GPU."""

    inputs: Inputs
    attend: PackedAttention
    scale: Tensor
    """float32 scalar."""

    @staticmethod
    def of(model: CausalLM, inputs: Inputs, scale: float) -> GraphInputs:
        """Of a micro-batch, with documents of nothing but the shared prefix, so that few numbers of documents occur."""
        missing = -len(inputs.lengths) % _DOCUMENT_STEP
        lengths = inputs.lengths + [inputs.shared_prefix] * missing
        device = inputs.input_ids.device
        attend = PackedAttention(model.config, lengths, device, shared_prefix=inputs.shared_prefix)
        return GraphInputs(inputs._replace(lengths=lengths), attend, torch.full((), scale, device=device))

    @property
    def size(self) -> tuple[int, ...]:
        """All that a graph depends on beside the numbers in its tensors."""
        inputs = self.inputs
        longest = flash.longest(self.attend.layout)
        return inputs.input_ids.shape[1], len(inputs.positions), len(inputs.lengths), inputs.shared_prefix, longest

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in one order."""
        inputs, attend = self.inputs, self.attend
        return [inputs.input_ids, inputs.positions, inputs.labels, self.scale, *attend.tensors]

    def with_scale(self, scale: float) -> GraphInputs:
        """The same with another factor of the gradients."""
        return self._replace(scale=torch.full_like(self.scale, scale))

    def copy(self) -> GraphInputs:
        """The same in new tensors, which a graph can keep."""
        input_ids, positions, labels, scale, *attention = (tensor.clone() for tensor in self.tensors)
        inputs = self.inputs._replace(input_ids=input_ids, positions=positions, labels=labels)
        return GraphInputs(inputs, self.attend.with_tensors(attention), scale)

    def backward(self, model: CausalLM) -> Tensor:
        """See :func:`lit_lora.train.loss.backward_from`."""
        hidden = model.hidden_states(self.inputs.input_ids, attend=self.attend)[0]
        return backward_from(model, hidden, self.inputs, self.scale)


class _Graph(NamedTuple):
    """A captured micro-batch."""

    graph: torch.cuda.CUDAGraph
    inputs: GraphInputs
    """The tensors that it reads."""
    loss: Tensor
    """The scalar that it writes."""

    def replay(self, inputs: GraphInputs) -> Tensor:
        """Compute another micro-batch of the same size: adds to the gradients, and returns the sum of losses."""
        for graph_tensor, tensor in zip(self.inputs.tensors, inputs.tensors, strict=True):
            graph_tensor.copy_(tensor)
        self.graph.replay()
        return self.loss.clone()  # the next replay overwrites it


def _capturable(model: Any) -> bool:
    """Whether all that a micro-batch of the model does happens on a GPU, on tensors that stay where they are.

    ``LIT_LORA_KERNELS=0``, which leaves everything to PyTorch, switches CUDA graphs off too.
    """
    if not isinstance(model, CausalLM) or not next(model.parameters()).is_cuda:
        return False
    if model.recomputes or kernels.switched_off():
        return False

    # Half-precision parameters hand their gradients to float32 masters by Python hooks, which a graph does not run.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.dtype != torch.float32 for parameter in trained):
        return False

    # Other kinds of attention run document by document, and each document's length would be a size of its own.
    config = model.config
    weight = model.get_input_embeddings().get_parameter("weight")
    query = weight.new_empty(1, config.num_attention_heads, config.head_dim)
    key = weight.new_empty(1, config.num_key_value_heads, config.head_dim)
    layer = LayerAttention(0, softcap=config.attn_logit_softcapping)
    return config.rope_switch is None and flash.usable(layer, query, key, key)
