"""Layers that attend in their own ways: window, scale, softcap, sinks, rotation, and values of another size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_lora.model import KVCache, ModelConfig
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.packed import PackedAttention

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=64,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
LENGTHS = [9, 4, 13]
LAYERS = {
    "plain": LayerAttention(0),
    "window": LayerAttention(0, window=3),
    "scale": LayerAttention(0, scale=0.7),
    "softcap": LayerAttention(0, softcap=1.5, window=5),
    "sinks": LayerAttention(0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "no rope": LayerAttention(0, rope=None),
    "all": LayerAttention(0, window=4, scale=0.6, softcap=2.0, rope=None, sinks=torch.tensor([1.0, 0.0, -2.0, 0.3])),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def by_definition(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One document, head by head."""
    attend = PackedAttention(CONFIG, [len(query)], query.device)
    query, key = attend.rotate(layer, query), attend.rotate(layer, key)
    tokens = torch.arange(len(query))
    distance = tokens[:, None] - tokens
    seen = (distance >= 0) & (distance < (layer.window or 1000))
    outputs = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // 2].T * (layer.scale or 16**-0.5)
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        weights = scores.exp() * seen
        total = weights.sum(-1, keepdim=True)
        if layer.sinks is not None:
            total = total + layer.sinks[head].exp()
        outputs.append(weights / total @ value[:, head // 2])
    return torch.stack(outputs, dim=1)


def tensors(tokens: int, value_size: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(4, 16), (2, 16), (2, value_size)]
    return [torch.randn(tokens, heads, size) for heads, size in sizes]


@every_layer
@pytest.mark.parametrize("value_size", [16, 10])
def test_packed_documents_attend_as_the_definition_says(name: str, value_size: int) -> None:
    query, key, value = tensors(sum(LENGTHS), value_size)
    got = PackedAttention(CONFIG, LENGTHS, query.device)(LAYERS[name], query, key, value)
    pieces = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    expected = torch.cat([by_definition(LAYERS[name], *piece) for piece in pieces])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_layer
def test_the_kernel_gives_the_same_with_gradients(name: str) -> None:
    """In bfloat16; where the kernel does not take the layer, so do PyTorch's operations."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        attend = PackedAttention(CONFIG, LENGTHS, torch.device("cpu"))
        leaves = [x.to(dtype).requires_grad_() for x in tensors(sum(LENGTHS))]
        out = attend(LAYERS[name], *leaves)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for exact, rounded in zip(*results, strict=True):
        assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@every_layer
@pytest.mark.parametrize("pieces", [[13], [6, 1, 5, 1], [1] * 13])
def test_a_cache_gives_what_whole_documents_do(name: str, pieces: list[int]) -> None:
    query, key, value = tensors(13, value_size=10)
    cache = KVCache(1, 13)
    outputs = []
    for piece in zip(*(x.split(pieces) for x in (query, key, value)), strict=True):
        outputs.append(CachedAttention(CONFIG, cache, 1, len(piece[0]))(LAYERS[name], *piece))
        cache.advance(len(piece[0]))
    torch.testing.assert_close(torch.cat(outputs), by_definition(LAYERS[name], query, key, value), atol=1e-5, rtol=1e-5)


def test_layers_of_different_heads_share_a_cache() -> None:
    cache = KVCache(2, 6)
    for layer, (heads, size) in enumerate([(2, 16), (1, 8)]):
        keys, values = cache.append(layer, torch.ones(2, heads, 3, size), torch.ones(2, heads, 3, size + 1))
        assert (keys.shape, values.shape) == ((2, heads, 3, size), (2, heads, 3, size + 1))
    cache.advance(3)
    cache.select(torch.tensor([1]))
    keys, _ = cache.append(1, torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 9))
    assert keys.shape == (1, 1, 5, 8)


def test_rows_behind_a_prefix_attend_as_each_layer_does() -> None:
    for layer in LAYERS.values():
        query, key, value = tensors(4 + 9)
        behind = PackedAttention(CONFIG, [9], query.device).with_prefix(4)
        got = behind(replace(layer, index=3), query, key, value)
        torch.testing.assert_close(got, by_definition(layer, query, key, value), atol=1e-5, rtol=1e-5)
