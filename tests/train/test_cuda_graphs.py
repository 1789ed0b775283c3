"""What a CUDA graph captures of a micro-batch, run on a CPU: rounded up and from tensors of its own, it is the same."""

from __future__ import annotations

import pytest
import torch

from lit_lora.data.batches import collate
from lit_lora.train.cuda_graphs import GraphInputs
from lit_lora.train.loss import backward, inputs_of, padded
from lit_lora.train.objectives.next_token import NextToken
from tests.tiny import gradients_of
from tests.train.tiny_run import adapted, make_rows, with_beginning

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shared_prefix", [0, 3])
def test_it_adds_the_gradients_of_the_loss(shared_prefix: int, dtype: torch.dtype) -> None:
    model = adapted(dtype, shaken=True)
    batch = collate(with_beginning(make_rows(5), [7, 8, 9]), range(5), shared_prefix)
    expected = float(backward(model, batch, 0.5))
    gradients = gradients_of(model)
    model.zero_grad()
    inputs = inputs_of(batch, CPU)
    assert inputs is not None
    given = GraphInputs.of(model, inputs, 0.5)
    assert len(given.inputs.lengths) == 16
    copied = given.copy()
    for tensor in given.tensors:  # it reads its own
        tensor.zero_()
    assert float(copied.backward(model)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients_of(model), gradients, rtol=1e-4, atol=1e-6)


def test_few_sizes_occur_on_a_gpu() -> None:
    sizes = {padded(tokens, "cuda") for tokens in range(1, 8193)}
    assert len(sizes) == 32
    assert all(padded(n, "cuda") - n < max(128, n / 8) for n in range(1, 20000, 7))


def test_where_no_graph_can_be_captured_it_is_the_plain_loss() -> None:
    batch = collate(make_rows(5), range(5))
    losses = [float(NextToken(graph_safe=graph_safe).backward(adapted(), batch, 1.0)) for graph_safe in (False, True)]
    assert losses[0] == losses[1]
