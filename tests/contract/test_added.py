"""What every method with added modules must hold beside the rest: packing, decoding, resuming, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError
from lit_lora.generate import Sampling, generate
from lit_lora.merge import TaskSwitcher, find_places, plan_merge
from lit_lora.model import CausalLM
from tests.contract.added_cases import ADDED, BEFORE
from tests.peft import tiny
from tests.peft.tiny import VOCABULARY, make_model, save_base, shake
from tests.train.tiny_run import losses, make_rows, same, stored, train

every_added_case = pytest.mark.parametrize("case", ADDED)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def method(case: str) -> peft.Method:
    return peft.methods()[ADDED[case]["name"]].model_validate(ADDED[case])


def adapted(case: str, dtype: torch.dtype = torch.float32, window: int | None = None) -> CausalLM:
    """Shaken, so that everything in it has an effect."""
    model = tiny.adapted(make_model(dtype=dtype, window=window), method(case))
    model.config = model.config.model_copy(update={"max_position_embeddings": 40})
    shake(model, 0.1)
    return model.eval()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}


@both_dtypes
@every_added_case
def test_packed_documents_are_as_if_each_were_alone(case, dtype):
    model = adapted(case, dtype)
    documents = [list(range(1, 8)), [3], [30, 20, 10, 40]]
    row = torch.tensor([[token for document in documents for token in document]])
    with torch.no_grad():
        packed = model(row, lengths=[len(document) for document in documents])[0]
        alone = torch.cat([model(torch.tensor([document]))[0] for document in documents])
    torch.testing.assert_close(packed, alone, **tolerance(dtype))


@every_added_case
def test_gradients_of_packed_documents_are_the_sum_of_each_alone(case):
    documents = [list(range(1, 8)), [3, 9], [30, 20, 10, 40]]
    model = adapted(case)
    row = torch.tensor([[token for document in documents for token in document]])
    model(row, lengths=[len(document) for document in documents]).square().mean(-1).sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for document in documents:
        model(torch.tensor([document])).square().mean(-1).sum().backward()
    for name, gradient in packed.items():
        alone = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, alone, atol=1e-4 * alone.abs().max().item(), rtol=1e-3, msg=name)


@pytest.mark.parametrize("window", [None, 4], ids=["whole", "window"])
@both_dtypes
@every_added_case
def test_decoding_with_a_cache_is_the_full_pass(case, dtype, window):
    model = adapted(case, dtype, window)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [1, 2]]
    steps = list(generate(model, prompts, Sampling(max_new_tokens=6)))
    for row, prompt in enumerate(prompts):
        answer = [step[row] for step in steps]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :].float()
        best = logits.max(-1).values
        chosen = logits[range(6), answer]
        assert (best - chosen).max() <= (0.15 if dtype == torch.bfloat16 else 1e-4)  # ties in bfloat16 go either way


@pytest.mark.parametrize("case", sorted(BEFORE))
def test_the_context_is_shorter_by_what_stands_before(case):
    model = adapted(case)
    before = model.model.prefix_length
    assert before == method(case).length
    assert model.context == 40 - before
    peft.remove(model)
    assert model.context == 40


@pytest.mark.parametrize("what", ["selective", "full"])
@every_added_case
def test_checkpointed_activations_give_the_same_gradients(case, what):
    gradients = []
    for checkpointing in ("none", what):
        model = adapted(case).train()
        model.checkpoint_activations(checkpointing)
        torch.manual_seed(5)
        model(torch.tensor([[3, 4, 5, 6, 7, 8]]), lengths=[2, 4]).square().mean(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None), name  # of an adapter that was left out
        assert gradient is None or torch.equal(again[name], gradient), name


@every_added_case
def test_a_resumed_run_is_the_whole_run_bit_for_bit(case, tmp_path):
    settings = {"validation": make_rows(3, seed=9), "eval_every": 2, "optimizer": {"lr": 1e-3}}
    train(tiny.adapted(make_model(), method(case)), tmp_path / "whole", max_steps=4, **settings)
    batches_of_two = tiny.adapted(make_model(), method(case))

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(batches_of_two, tmp_path / "parts", max_steps=4, sample=stop, **settings)
    train(tiny.adapted(make_model(), method(case)), tmp_path / "parts", max_steps=4, resume=True, **settings)
    assert same(stored(tmp_path / "parts", 4), stored(tmp_path / "whole", 4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@every_added_case
def test_a_copied_model_is_a_model_of_its_own(case):
    model = adapted(case)
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids)
    other = copy.deepcopy(model)
    shake(other, 0.5)
    assert torch.equal(model(ids), before)
    assert not torch.allclose(other(ids), before, atol=1e-3)
    peft.remove(other)
    assert torch.equal(model(ids), before)


@every_added_case
def test_merging_and_switching_are_refused_with_a_reason(case, tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    model = tiny.adapted(load_model(base), method(case))
    adapter = peft.save_adapter(model, method(case), tmp_path / "adapter", base=base)
    with pytest.raises(InputError, match="cannot be merged") as caught:
        plan_merge(find_places(adapter))
    assert "lora" in caught.value.hint
    with pytest.raises(InputError, match="cannot be merged"):
        TaskSwitcher(load_model(base), base).switch(adapter)


@every_added_case
def test_an_adapter_for_another_model_is_refused_in_one_line(case, tmp_path):
    peft.save_adapter(adapted(case), method(case), tmp_path / "adapter", base="some/base")
    with pytest.raises(InputError, match="another base model"):
        peft.load_adapter(make_model(seed=9), tmp_path / "adapter")
    larger = make_model(vocabulary=VOCABULARY + 1)
    with pytest.raises(InputError) as caught:
        peft.load_adapter(larger, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
