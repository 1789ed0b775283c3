"""What every method must hold, on a GPU: the cases of tests/contract/test_methods.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.data.batches import collate
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.train.cuda_graphs import GraphRunner
from lit_lora.train.loss import backward
from tests.contract.test_methods import ADDED, CASES, EXACT, FOLDED, WITH_OWN, adapted, method, train
from tests.peft import tiny
from tests.peft.tiny import VOCABULARY, make_model, shake, token_ids
from tests.tiny import gradients_of, random_model
from tests.train.tiny_run import make_rows

pytestmark = pytest.mark.gpu

every_case = pytest.mark.parametrize("case", CASES)
every_case_with_own_modules = pytest.mark.parametrize("case", WITH_OWN)


def ids_of(case: str) -> torch.Tensor:
    return token_ids(VOCABULARY + 2 if "tokens" in case else VOCABULARY).cuda()


@torch.no_grad()
def logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).float().cpu()


@every_case
def test_logits_are_those_on_the_cpu_at_init_and_after_training(case: str) -> None:
    ids = ids_of(case)
    for values in ("at init", "changed"):
        here = adapted(case)
        if values == "changed":
            shake(here)
        expected = logits(here, ids.cpu())
        torch.testing.assert_close(logits(here.cuda(), ids), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", [name for name in WITH_OWN if name not in ADDED or name in EXACT])
def test_logits_at_init_are_those_of_the_base(case: str) -> None:
    got = logits(adapted(case).cuda(), token_ids().cuda())[..., :VOCABULARY]
    torch.testing.assert_close(got, logits(make_model().cuda(), token_ids().cuda()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_case
def test_every_own_parameter_moves(case: str, dtype: torch.dtype) -> None:
    model = adapted(case, dtype=dtype).cuda()
    high = VOCABULARY + 2 if "tokens" in case else VOCABULARY
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, 3, torch.arange(high, device="cuda").repeat(2)[None, :])
    assert not [name for name, value in peft.trainable_state(model).items() if torch.equal(value, before[name])]


@every_case_with_own_modules
def test_base_is_bit_identical_after_training_and_the_adapter_comes_out(case: str) -> None:
    original, model = make_model().cuda(), adapted(case).cuda()
    train(model, 3, token_ids().cuda())
    base = peft.base_tensors(model)
    assert all(torch.equal(base[name], value) for name, value in peft.base_tensors(original).items())
    peft.remove(model)
    assert torch.equal(logits(model, token_ids().cuda()), logits(original, token_ids().cuda()))


@every_case_with_own_modules
def test_saved_and_loaded_it_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    model = adapted(case).cuda()
    shake(model)
    peft.save_adapter(model, method(case), tmp_path / "adapter", base="some/base")
    fresh = make_model().cuda()
    peft.load_adapter(fresh, tmp_path / "adapter")
    expected, got = logits(model, ids_of(case)), logits(fresh, ids_of(case))
    if case in FOLDED or "dora" in case:  # norms of rows are summed in another order
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(got, expected)


@every_case
def test_losses_are_those_on_the_cpu(case: str) -> None:
    here, there = (train(adapted(case).to(device), 5, token_ids().to(device)) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=2e-3)


@pytest.mark.parametrize("case", [name for name in CASES if method(name).graph_safe])
def test_recorded_gradients_are_those_of_launched_kernels(case: str) -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attention_bias=True,
    )  # fmt: skip
    model = tiny.adapted(random_model(config, std=0.1).to(torch.bfloat16), method(case)).cuda()
    shake(model)
    recorder, batch = GraphRunner(), collate(make_rows(6), range(6))
    backward(model, batch, 0.1)
    expected = gradients_of(model)
    for _ in range(2):
        model.zero_grad()
        recorder.backward(model, batch, 0.1)
        found = gradients_of(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    in_half = [name for name, value in peft.trainable_state(model).items() if value.dtype != torch.float32]
    assert bool(recorder._graphs) != bool(in_half)
