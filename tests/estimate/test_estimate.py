"""Counted bytes, the founding claims, and advice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lit_lora.finetune.lora import Config

from lit_lora import peft
from lit_lora.checkpoint.load import empty_model
from lit_lora.estimate import SHAPES, RowLengths, Setup, estimate, model_shape, outline
from lit_lora.estimate.advice import advise
from lit_lora.quantize import QuantizeConfig
from lit_lora.recipe import setup_for
from lit_lora.train.optim import OPTIMIZERS
from lit_lora.train.optim.build import build_optimizer, state_bytes
from lit_lora.train.optim.master_weights import MasterWeights
from tests.train.tiny_run import optimizer_config

GB = 1e9


def setup_of(shape: str = "smollm2-135m", method: str = "lora", *, tokens: int = 512, **sections: object) -> Setup:
    data = {"model": {"path": "none"}, "data": {"path": "none"}, **sections}
    config = Config.model_validate({**data, "peft": {}})
    settings = peft.methods()[method].model_validate(sections.get("peft", {}))
    config = config.model_copy(update={"peft": settings})
    rows = RowLengths.alike(config.train.batch_size, tokens)
    return setup_for(config, shape=model_shape(shape), rows=rows, dtype=torch.bfloat16, device=torch.device("cpu"))


def count(shape: str) -> int:
    return peft.count_parameters(empty_model(model_shape(shape))).total


def lora_count(shape: str, rank: int, targets: object) -> int:
    model = outline(setup_of(shape, peft={"rank": rank, "target_modules": targets}))
    return peft.count_parameters(model).trainable


def test_claim_a1_and_b8_lora_trains_a_ten_thousandth_of_gpt3() -> None:
    assert count("gpt-3-175b") == pytest.approx(175e9, rel=0.01)
    assert lora_count("gpt-3-175b", 4, "q,v") == 18_874_368
    assert 0.9e-4 < 18_874_368 / 175e9 < 1.1e-4
    assert lora_count("gpt-3-175b", 1, "q,v") == lora_count("gpt-3-175b", 2, ["v_proj"]) == 4_718_592


@pytest.mark.parametrize(
    ("shape", "rank", "targets", "expected"),
    [
        ("llama-7b", 8, "q,v", 4_194_304),
        ("llama-7b", 8, "all-linear", 19_988_480),
        ("llama-7b", 64, "all-linear", 159_907_840),
        ("llama-13b", 8, "q,v", 6_553_600),
    ],
)
def test_published_counts(shape: str, rank: int, targets: object, expected: int) -> None:
    assert lora_count(shape, rank, targets) == expected


@pytest.mark.slow
def test_claim_a9_and_b6_full_finetuning_of_65b_takes_780_gb_of_state_and_qlora_fits_48_gb() -> None:
    assert 12 * count("llama-65b") == pytest.approx(780 * GB, rel=0.01)  # bf16 weights and gradients, Adam in fp32
    lora, qlora = (replace(setup_of("llama-65b"), quantize=quantize) for quantize in (None, QuantizeConfig()))
    assert _weights(lora) == pytest.approx(131 * GB, rel=0.01)
    assert _weights(qlora) < 37 * GB
    # Rank 64 as published fits 65B; of 7B it needs 6.6 GB, as what trains and its gradients are float32.
    for shape, rank, budget in (("llama-65b", 64, 48 * GB), ("llama-7b", 16, 6 * GB)):
        settings = {"train": {"activation_checkpointing": "full", "micro_batch_tokens": 512}}
        settings |= {"peft": {"rank": rank}, "optimizer": {"name": "paged_adamw8bit"}}
        setup = replace(setup_of(shape, tokens=512, **settings), quantize=QuantizeConfig())
        assert estimate(setup).memory.total < budget
        assert _weights(replace(setup, quantize=None)) > budget  # the 16-bit weights alone


def _weights(setup: Setup) -> int:
    model = outline(setup)
    own = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - own


def test_claim_a11_llama_adapter_trains_1_2_million() -> None:
    model = empty_model(model_shape("llama-7b"))
    peft.freeze(model)
    peft.methods()["llama-adapter"].model_validate({"adapter_len": 10, "adapter_layers": 30}).apply(model)
    assert peft.count_parameters(model).trainable == 30 * (10 * 4096) + 30 * 32 == 1_229_760


def test_claim_b2_a_7b_model_takes_27_gb_in_float32_and_b5_gpt3_takes_350_gb_in_16_bits() -> None:
    assert 4 * count("llama-7b") == pytest.approx(27 * GB, rel=0.01)
    assert 2 * count("gpt-3-175b") == pytest.approx(350 * GB, rel=0.01)


def test_claim_b7_ten_by_ten_at_rank_two_is_40_numbers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False))
    peft.freeze(model)
    peft.methods()["lora"].model_validate({"rank": 2, "target_modules": ["0"]}).apply(model)
    assert peft.count_parameters(model).trainable == 40
    assert sum(parameter.numel() for parameter in model.parameters()) == 140


def test_parts_are_the_bytes_of_what_they_name() -> None:
    lora = estimate(setup_of()).memory
    assert lora.weights == 2 * count("smollm2-135m")
    assert lora.trained == lora.gradients == 4 * 2_442_240
    assert lora.optimizer == 8 * 2_442_240
    full = estimate(setup_of(method="full")).memory
    assert (full.weights, full.trained) == (lora.weights, 2 * lora.weights)  # float32 masters
    assert full.optimizer == 2 * full.trained
    wide = estimate(replace(setup_of(method="full"), dtype=torch.float32)).memory
    assert (wide.weights, wide.trained) == (2 * lora.weights, 0)  # a float32 weight is its own master
    assert wide.optimizer == full.optimizer
    assert lora.total == sum(vars(lora).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_bytes_are_those_of_the_optimizer(name: str, momentum: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Linear(90, 3))
    master_weights = MasterWeights(model)
    config = optimizer_config(name, **({"momentum": momentum} if name == "sgd" else {}))
    optimizer = build_optimizer(config, master_weights)
    for master in master_weights.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor) and k != "step"]
    assert state_bytes(config, master_weights.masters.values()) == sum(tensor.nbytes for tensor in tensors)


def test_time_counts_what_eight_bit_moments_cost_on_a_cpu() -> None:
    plain = setup_of(method="full")
    eight = replace(plain, optimizer=optimizer_config("adamw8bit"))
    without, counted = estimate(plain), estimate(eight)
    assert without.seconds_per_step is not None
    assert counted.seconds_per_step is not None
    per_number = (counted.seconds_per_step - without.seconds_per_step) / counted.trainable
    assert 1e-10 < per_number < 1e-6  # of a slow, busy machine too; measured once, as the rate of products is
    lora = replace(setup_of(), optimizer=optimizer_config("paged_adamw8bit"))
    more = [estimate(setup).seconds_per_step or 0 for setup in (lora, setup_of())]
    assert more[0] - more[1] == pytest.approx(per_number * estimate(lora).trainable)


def test_every_shape_of_the_table_has_about_the_size_of_its_name() -> None:
    for name in SHAPES:
        number = name.rpartition("-")[2]
        size = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
        assert count(name) == pytest.approx(size, rel=0.25), name


def test_the_cheapest_change_that_is_enough_comes_last() -> None:
    setup = setup_of(train={"micro_batch_tokens": 4096, "batch_size": 16}, tokens=256)
    total = estimate(setup).memory.total
    (advice,) = advise(setup, 0.9 * total)
    assert advice.overrides == ("train.micro_batch_tokens=2048",)
    assert advice.fits
    smallest = estimate(replace(setup, train=setup.train.model_copy(update={"micro_batch_tokens": 256}))).memory.total
    tried = advise(setup, 0.97 * smallest)
    assert [advice.fits for advice in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[0].overrides == ("train.micro_batch_tokens=256",)
    assert len(tried[-1].overrides) > 1
    assert not any(advice.fits for advice in advise(setup, 1e8))


@pytest.mark.slow
def test_full_finetuning_is_led_to_lora_and_to_four_bits() -> None:
    setup = setup_of("tinyllama-1.1b", "full", tokens=256, train={"micro_batch_tokens": 256})
    lora = estimate(setup_of("tinyllama-1.1b", tokens=256, train={"micro_batch_tokens": 256})).memory.total
    assert advise(setup, 1.02 * lora)[-1].overrides == ("recipe=lora peft.name=lora",)
    assert advise(setup, 0.9 * lora)[-1].overrides == ("recipe=qlora peft.name=lora",)
