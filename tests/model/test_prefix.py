"""Tokens that stand before every document of a packed row, and before every row of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_lora.generate import Sampling, generate
from lit_lora.generate.decoding import PrefixCache
from lit_lora.model import CausalLM, KVCache, ModelConfig

PREFIX = [5, 9, 11]


def make_model(window: int | None = None, dtype: torch.dtype = torch.float32, rope_type: str = "default") -> CausalLM:
    torch.manual_seed(0)
    rope = {"rope_theta": 100.0, "rope_type": rope_type}
    if rope_type == "yarn":
        rope |= {"factor": 2.0, "original_max_position_embeddings": 32}
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        sliding_window=window,
        rope=rope,
    )
    model = CausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def put_before(model: CausalLM, ids: Sequence[int]) -> CausalLM:
    """Let the decoder run with the tokens before everything, as a prompt method does."""

    def before(_: torch.nn.Module, args: tuple) -> tuple:
        x, attend = args
        attend = attend.with_prefix(len(ids))
        if attend.prefix_length:
            x = torch.cat([model.model.embed_tokens(torch.tensor(ids)), x])
        return x, attend

    model.model.register_forward_pre_hook(before)
    model.model.register_forward_hook(lambda _, args, out: out[args[1].prefix_length :])
    model.model.prefix_length = len(ids)
    return model


def rows(model: CausalLM, *documents: Sequence[int]) -> Tensor:
    """The hidden states of packed documents."""
    ids = torch.tensor([[token for document in documents for token in document]])
    return model.hidden_states(ids, lengths=[len(document) for document in documents])[0]


DOCUMENTS = [list(range(1, 8)), [3], [30, 20, 10, 40], list(range(10, 40))]
settings = pytest.mark.parametrize(
    "kwargs", [{}, {"window": 4}, {"window": 2}, {"rope_type": "yarn"}, {"dtype": torch.bfloat16}], ids=str
)


@settings
@torch.no_grad()
def test_packed_documents_behind_tokens_are_as_if_each_began_with_them(kwargs):
    expected = rows(make_model(**kwargs), *[PREFIX + document for document in DOCUMENTS])
    got = rows(put_before(make_model(**kwargs), PREFIX), *DOCUMENTS)
    parts = expected.split([len(PREFIX) + len(document) for document in DOCUMENTS])
    tolerance = 0.06 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, torch.cat([part[len(PREFIX) :] for part in parts]), atol=tolerance, rtol=tolerance)


@settings
@torch.no_grad()
def test_cached_rows_behind_tokens_are_as_if_each_began_with_them(kwargs):
    model = put_before(make_model(**kwargs), PREFIX)
    padding = torch.tensor([0, 5])
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(2, 12, padding=padding)
    pieces = [model.hidden_states(piece, cache=cache) for piece in ids.split([6, 1, 4, 1], dim=1)]
    got = torch.cat(pieces, dim=1)
    tolerance = 0.06 if got.dtype == torch.bfloat16 else 1e-5
    for row, start in enumerate(padding.tolist()):
        expected = rows(make_model(**kwargs), PREFIX + ids[row, start:].tolist())[len(PREFIX) :]
        torch.testing.assert_close(got[row, start:], expected, atol=tolerance, rtol=tolerance)


def test_answers_behind_tokens_are_those_to_prompts_that_begin_with_them():
    prompts = [list(range(1, 22)), [*range(1, 19), 40, 41], [2, 3]]
    plain, behind = make_model(), put_before(make_model(), PREFIX)
    sampling = Sampling(max_new_tokens=6)
    expected = [list(generate(plain, [PREFIX + prompt], sampling)) for prompt in prompts]
    batch = list(generate(behind, prompts, sampling))
    for row, one in enumerate(expected):
        assert [step[row] for step in batch] == [token for (token,) in one]
    prefix_cache = PrefixCache()
    for prompt, one in zip(prompts, expected, strict=True):  # each keeps some of the tokens before it
        assert list(generate(behind, [prompt], sampling, prefix_cache=prefix_cache)) == one


def test_the_context_is_shorter_by_the_tokens_before_and_answers_end_there():
    model = put_before(make_model(), PREFIX)
    assert model.context == 61
    assert len(list(generate(model, [[1] * 59], Sampling(max_new_tokens=9)))) == 2


def test_gradients_of_tokens_before_packed_documents_are_those_of_each_beginning_with_them():
    model, plain = put_before(make_model(), PREFIX), make_model()
    rows(model, *DOCUMENTS).square().sum().backward()
    documents = rows(plain, *[PREFIX + document for document in DOCUMENTS])
    parts = documents.split([len(PREFIX) + len(document) for document in DOCUMENTS])
    torch.cat([part[len(PREFIX) :] for part in parts]).square().sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            other = model.get_parameter(name).grad
            torch.testing.assert_close(other, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_cache_that_was_filled_without_what_stands_before_is_refused():
    model = make_model()
    cache = KVCache(1, 12)
    model.hidden_states(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="2 tokens are stored"):
        put_before(model, PREFIX).hidden_states(torch.tensor([[3]]), cache=cache)
