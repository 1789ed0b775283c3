"""Packing, padding and the cache of the decoder."""

from __future__ import annotations

import pytest
import torch

from lit_lora.errors import InputError
from lit_lora.model import CausalLM, KVCache, ModelConfig

TINY = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_hf(TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@torch.no_grad()
def test_pain_07_packed_documents_give_the_logits_of_each_alone(model: CausalLM) -> None:
    documents = [torch.randint(61, (1, length)) for length in (5, 1, 9)]
    packed = model(torch.cat(documents, 1), lengths=[5, 1, 9])
    alone = torch.cat([model(document) for document in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pain_07_changing_one_packed_document_leaves_the_others_bit_equal(model: CausalLM) -> None:
    ids = torch.randint(61, (1, 12))
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % 61
    before, after = model(ids, lengths=[5, 7]), model(changed, lengths=[5, 7])
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.equal(before[0, :5], after[0, :5])


@torch.no_grad()
def test_left_padding_in_the_cache_changes_nothing(model: CausalLM) -> None:
    prompts = [torch.randint(61, (length,)) for length in (3, 7)]
    batch = torch.zeros(2, 7, dtype=torch.int64)
    batch[0, 4:], batch[1] = prompts[0], prompts[1]
    cache = KVCache(2, 9, padding=torch.tensor([4, 0]))
    first = model(batch, cache=cache)
    following = torch.randint(61, (2, 2))
    second = model(following, cache=cache)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, following[row]))[None])[0]
        torch.testing.assert_close(first[row, -1], alone[len(prompt) - 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second[row], alone[-2:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_truncated_cache_continues_as_if_the_rest_had_not_been(model: CausalLM) -> None:
    ids = torch.randint(61, (1, 8))
    cache = KVCache(1, 20)
    model(torch.cat((ids[:, :5], torch.randint(61, (1, 6))), 1), cache=cache)
    cache.truncate(5)
    torch.testing.assert_close(model(ids[:, 5:], cache=cache), model(ids)[:, 5:], rtol=1e-5, atol=1e-5)


def test_lengths_that_do_not_cover_the_row_are_refused(model: CausalLM) -> None:
    with pytest.raises(ValueError, match="lengths sum to 3"):
        model(torch.zeros(1, 4, dtype=torch.int64), lengths=[1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"rope_scaling": {"type": "cubic"}}, "'cubic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs low_freq_factor, high_freq_factor"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_hf({**TINY, **change})
    assert "\n" not in str(caught.value)


def test_a_config_survives_the_way_to_hugging_face_and_back() -> None:
    old_style = {
        **TINY,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "bfloat16",
    }
    config = ModelConfig.from_hf(old_style)
    assert config.rope.rope_type == "linear"
    assert config.dtype == "bfloat16"
    assert ModelConfig.from_hf(config.to_hf()).model_dump() == config.model_dump()
    made = config.model_copy(update={"source": {}})
    assert ModelConfig.from_hf(made.to_hf()).rope == config.rope
