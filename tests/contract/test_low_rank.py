"""What every low-rank method must hold beside the rest: decoding, resuming, checkpointed activations."""

from __future__ import annotations

import pytest
import torch

from lit_lora import peft
from lit_lora.errors import InputError
from lit_lora.generate import Sampling, generate
from lit_lora.model import CausalLM, KVCache
from lit_lora.peft.files.frozen_state import frozen_state, keep_frozen
from tests.contract.test_methods import LOW_RANK, PARTLY_FROZEN, method
from tests.peft import tiny
from tests.peft.tiny import make_model, put_on, shake
from tests.train.tiny_run import losses, make_rows, same, stored, train

every_case = pytest.mark.parametrize("case", LOW_RANK)


def adapted(case: str, seed: int = 2) -> CausalLM:
    model = make_model()
    peft.freeze(model)
    torch.manual_seed(seed)
    put_on(model, method(case))
    return model


def shaken(case: str) -> CausalLM:
    """So that everything in it has an effect."""
    model = adapted(case)
    shake(model, 0.1)
    return model.eval()


@every_case
def test_decoding_with_a_cache_is_the_full_pass(case):
    model = shaken(case)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [1, 3]]
    steps = list(generate(model, prompts, Sampling(max_new_tokens=6)))
    for row, prompt in enumerate(prompts):
        answer = [step[row] for step in steps]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        assert (logits.max(-1).values - logits[range(6), answer]).max() <= 1e-5
    plain = list(generate(make_model().eval(), prompts, Sampling(max_new_tokens=6)))
    assert plain != steps, "the adapter has no effect"


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("lora", 1e-3),
        ("pissa", 2e-4),
        ("dora", 1e-3),
        ("multilora", 3e-3),
        ("tied", 1e-3),
        ("vera", 1e-2),
        ("glora", 1e-3),
    ],
)
def test_a_change_far_below_the_rounding_of_a_bfloat16_output_is_kept(case, size):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)})
    torch.nn.init.normal_(model["v_proj"].weight)
    peft.freeze(model)
    method(case).apply(model)
    shake(model, size)
    layer, x = model["v_proj"], torch.randn(512, 128, dtype=torch.bfloat16)
    weight = layer.base_layer.weight
    base = x.double() @ weight.double().T
    change = x.double() @ layer.updates()["weight"].apply(weight, 0, 128).double().T - base
    assert 1e-4 < change.norm() / base.norm() < 6e-4  # bfloat16 rounds by 1.6e-3 of an output's size
    kept = float(((layer(x).detach().double() - base) * change).sum() / change.square().sum())
    assert kept == pytest.approx(1, abs=0.2)


@every_case
def test_logits_of_one_token_after_a_cache_are_those_of_the_full_pass(case):
    """The kernel for one token is one of its own."""
    model, ids = shaken(case), torch.tensor([[5, 3, 7, 8, 9]])
    with torch.no_grad():
        expected = model(ids)[:, -1:]
        cache = KVCache(1, 8)
        model(ids[:, :-1], cache=cache)
        torch.testing.assert_close(model(ids[:, -1:], cache=cache), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("what", ["selective", "full"])
@every_case
def test_checkpointed_activations_give_the_same_gradients(case, what):
    gradients = []
    for checkpointing in ("none", what):
        model = shaken(case).train()
        model.checkpoint_activations(checkpointing)
        torch.manual_seed(5)
        model(torch.tensor([[3, 4, 5, 6, 7, 8]]), lengths=[2, 4]).square().mean(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(again[name], gradient), name


class Stop(Exception):
    pass


def stop(step: int) -> None:
    if step == 2:
        raise Stop


@every_case
def test_a_resumed_run_is_the_whole_run_bit_for_bit(case, tmp_path):
    """Even where what is drawn or computed for the resumed run is not what it was, as on another device."""
    config = method(case)

    def run(name: str, seed: int = 2, **settings: object) -> CausalLM:
        model = adapted(case, seed)
        keep_frozen(model, tmp_path / name / "start", resume="resume" in settings)
        factors = peft.lr_factors(config, model)
        rows = {"validation": make_rows(3, seed=9), "eval_every": 2, "optimizer": {"lr": 1e-3}, "lr_factors": factors}
        train(model, tmp_path / name, max_steps=4, **rows, **settings)
        return model

    def saved(name: str, model: CausalLM) -> bytes:
        folder = peft.save_adapter(model, config, tmp_path / name / "adapter", base="some/base")
        return (folder / "adapter_model.safetensors").read_bytes()

    whole = saved("whole", run("whole"))
    with pytest.raises(Stop):
        run("parts", sample=stop)
    parts = saved("parts", run("parts", seed=99, resume=True))
    assert parts == whole
    assert same(stored(tmp_path / "parts", 4), stored(tmp_path / "whole", 4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@every_case
def test_a_trained_model_is_the_one_that_its_file_gives(case, tmp_path):
    """After the loop's own optimizer, and validations between its steps, nothing in the model is out of date."""
    model, ids = adapted(case), torch.tensor([[3, 4, 5, 6]])
    train(model, tmp_path, max_steps=4, validation=make_rows(3, seed=9), eval_every=2, optimizer={"lr": 0.05})
    peft.save_adapter(model, method(case), tmp_path / "adapter", base="some/base")
    loaded = make_model()
    peft.load_adapter(loaded, tmp_path / "adapter")
    with torch.no_grad():
        expected, got = model.eval()(ids), loaded.eval()(ids)
    assert torch.equal(got, expected)


@every_case
def test_what_does_not_train_is_kept_and_put_back(case, tmp_path):
    model = adapted(case)
    kept = {name: value.detach().clone() for name, value in frozen_state(model).items()}
    assert bool(kept) == (case in PARTLY_FROZEN)
    keep_frozen(model, tmp_path / "start", resume=False)
    assert (tmp_path / "start").exists() == bool(kept)
    other = tiny.adapted(make_model(), method(case))
    with torch.no_grad():
        for parameter in frozen_state(other).values():
            parameter.add_(1.0)
    keep_frozen(other, tmp_path / "start", resume=True)
    assert all(torch.equal(value, kept[name]) for name, value in frozen_state(other).items())


def test_a_start_that_is_missing_broken_or_of_another_adapter_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"frozen\.safetensors: cannot be read"):
        keep_frozen(adapted("pissa"), tmp_path / "none", resume=True)
    keep_frozen(adapted("olora"), tmp_path / "start", resume=False)
    with pytest.raises(InputError, match="another adapter"):
        keep_frozen(adapted("pissa"), tmp_path / "start", resume=True)
    (tmp_path / "start" / "frozen.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match="cannot be read"):
        keep_frozen(adapted("olora"), tmp_path / "start", resume=True)
