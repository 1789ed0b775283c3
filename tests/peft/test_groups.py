"""Attention in shifted groups: who sees whom, against a mask, and never what comes later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_lora.model import ModelConfig
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.cpu_kernel import usable
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.kv_cache import KVCache
from lit_lora.peft.lora.longlora import in_groups

LAYER = LayerAttention(0)


def config(heads: int, keys: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=7,
        hidden_size=8 * heads,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=8,
    )


def tensors(tokens: int, heads: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(tokens, n, 8).to(dtype) for n in (heads, keys, keys))  # type: ignore[return-value]


def shifted(head: int, heads: int, keys: int) -> bool:
    """Whether a query head has the shifted groups: those of the second half of the keys."""
    if keys == 1:
        return head >= -(-heads // 2)
    return head // (heads // keys) >= -(-keys // 2)


def by_mask(
    attend: PackedAttention, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], size: int
) -> Tensor:
    """The definition: j <= i, the same document, and the same group of the head's half."""
    heads, keys = q.shape[1], k.shape[1]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    whole = torch.tensor(lengths)[document] <= size
    q, k = attend.rotate(layer, q), attend.rotate(layer, k)
    outputs = []
    for head in range(heads):
        group = (place + (size - max(1, size // 2) if shifted(head, heads, keys) else 0)) // size
        group = torch.where(whole, 0, group)
        mask = (place[:, None] >= place) & (document[:, None] == document) & (group[:, None] == group)
        if layer.window is not None:
            mask &= place[:, None] - place < layer.window
        key, value = k[:, head // (heads // keys)], v[:, head // (heads // keys)]
        scores = (q[:, head] @ key.T * 8**-0.5).masked_fill(~mask, -torch.inf)
        outputs.append(scores.softmax(-1) @ value)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (4, 2), (9, 3), (3, 1), (4, 1)])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_groups_are_what_the_mask_says(heads, keys, size, window):
    lengths = [13, 4, 1, 8]
    q, k, v = tensors(sum(lengths), heads, keys)
    attend, layer = PackedAttention(config(heads, keys), lengths, q.device), LayerAttention(0, window)
    got = in_groups(attend, size)(layer, q, k, v)
    torch.testing.assert_close(got, by_mask(attend, layer, q, k, v, lengths, size), atol=1e-5, rtol=1e-5)
    assert in_groups(attend, size) is in_groups(attend, size)


def test_a_group_as_long_as_the_document_is_plain_attention():
    q, k, v = tensors(20, 4, 2)
    attend = PackedAttention(config(4, 2), [12, 8], q.device)
    torch.testing.assert_close(in_groups(attend, 12)(LAYER, q, k, v), attend(LAYER, q, k, v), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(in_groups(attend, 6)(LAYER, q, k, v), attend(LAYER, q, k, v), atol=1e-3)


def test_the_kernel_gives_the_same_with_gradients():
    lengths = [70, 9, 40]
    exact = [x.requires_grad_() for x in tensors(sum(lengths), 6, 3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    if not usable(LAYER, *rounded):
        pytest.skip("no kernel for this CPU")
    outputs = []
    for q, k, v in (exact, rounded):
        attend = PackedAttention(config(6, 3), lengths, q.device)
        outputs.append(in_groups(attend, 16)(LAYER, q, k, v))
        outputs[-1].float().square().sum().backward()
    torch.testing.assert_close(outputs[1].float(), outputs[0], atol=0.04, rtol=0.04)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert (narrow.grad.float() - wide.grad).norm() < 0.02 * wide.grad.norm()


def test_what_stands_before_documents_and_a_cache():
    q = tensors(6, 2, 2)[0]
    attend = PackedAttention(config(2, 2), [6], q.device)
    with pytest.raises(ValueError, match="attention in groups does not support"):
        in_groups(attend.with_prefix(2), 4)
    with pytest.raises(ValueError, match="attention in groups does not support"):
        in_groups(attend, 4).with_prefix(2)
    cached = CachedAttention(config(2, 2), KVCache(1, 8), 1, 6)
    assert in_groups(cached, 4) is cached
