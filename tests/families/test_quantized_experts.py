"""Quantized experts: they compute what their dequantized weights do, one by one, and merge like linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lit_lora import peft
from lit_lora.checkpoint.load import AnyModel, empty_model, load_model
from lit_lora.cli import main
from lit_lora.errors import UsageError
from lit_lora.model.moe import ExpertLayer, run_experts
from lit_lora.peft.core.modules import freeze, own_modules
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, QuantizedStack, quantize, quantize_stack, stored_bytes
from lit_lora.recipe.plan import mixture_rows
from tests.families import tiny_configs
from tests.families.opened import error
from tests.families.test_moe_lora import backward, file_gradients, trained

NF4 = QuantizeConfig(block_size=32)
INT8 = QuantizeConfig(name="int8")
KEYS = ["mixtral", "qwen3_moe", "granitemoe", "olmoe", "deepseek_v3", "gpt_oss"]
IDS = torch.randint(10, tiny_configs.VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a tiny checkpoint whose rows are whole blocks."""
    folders: dict[str, Path] = {}

    def of(key: str) -> Path:
        if key not in folders:
            config = tiny_configs.config(key)
            for name in ("intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"):
                if hasattr(config, name):
                    setattr(config, name, 64)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
            folders[key] = tmp_path_factory.mktemp(key)
            logging.disable_progress_bar()
            model.save_pretrained(folders[key])
        return folders[key]

    return of


def stacks(model: nn.Module) -> dict[str, QuantizedStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedStack)}


@torch.no_grad()
def dequantized(folder: Path, model: AnyModel) -> AnyModel:
    """The same model in full, with the values that the quantized one has."""
    full = load_model(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            full.get_parameter(f"{name}.weight").copy_(module.dequantize())
        elif isinstance(module, QuantizedStack):
            full.get_parameter(name).copy_(module.dequantize())
    return full


def logits(model: AnyModel) -> Tensor:
    return model.logits(model.hidden_states(IDS)[0])


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "nf3-dq", "fp4", "int4", "int2", "int8"])
def test_a_matrix_alone_has_the_bits_that_it_has_among_all(name: str) -> None:
    config = QuantizeConfig.model_validate(name)
    # 9 blocks a matrix: the scales of 256 blocks begin and end inside matrices.
    weight = torch.randn(70, 3, 192, generator=torch.Generator().manual_seed(0))
    stack = QuantizedStack(quantize_stack(weight, config, name="w"), 70, torch.bfloat16)
    assert torch.equal(stack.dequantize().flatten(0, 1), quantize(weight.flatten(0, 1), config).dequantize(stack.dtype))
    assert torch.equal(torch.stack([stack[index] for index in range(len(stack))]), stack.dequantize())
    assert stack.dequantize().shape == stack.shape == weight.shape
    assert stack.to(torch.float32)[69].dtype == torch.float32


@pytest.mark.parametrize("config", [NF4, INT8], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_quantized_experts_compute_what_their_dequantized_weights_do(key: str, config: QuantizeConfig, saved) -> None:
    model = load_model(saved(key), quantize=config)
    assert len(stacks(model)) == 2 * (3 if key == "deepseek_v3" else 4)
    full = dequantized(saved(key), model)
    assert error(logits(model), logits(full)) < 1e-5
    assert error(logits(model), logits(load_model(saved(key)))) > 1e-3


@pytest.mark.parametrize("key", KEYS)
def test_lora_of_quantized_experts_has_the_gradients_over_dequantized_ones(key: str, saved) -> None:
    model = load_model(saved(key), quantize=NF4)
    full = dequantized(saved(key), model)
    trained(model)
    trained(full)
    got, expected = logits(model), logits(full)
    assert error(got, expected) < 1e-5
    backward(got)
    backward(expected)
    gradients = file_gradients(full)
    assert any("experts" in name for name in gradients)
    for name, gradient in file_gradients(model).items():
        assert error(gradient, gradients.pop(name)) < 1e-4, name
    assert not gradients


@pytest.mark.parametrize("transposed", [False, True])
def test_only_chosen_experts_are_dequantized_and_none_is_kept_for_the_backward_pass(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = QuantizedStack.__getitem__
    monkeypatch.setattr(QuantizedStack, "__getitem__", lambda self, index: made.append(index) or original(self, index))
    weight = torch.randn(8, 64, 64)
    layer = ExpertLayer(QuantizedStack(quantize_stack(weight, INT8, name="w"), 8, torch.float32), None, transposed)
    chosen, weights = torch.tensor([[5, 1], [1, 6]]), torch.ones(2, 2)
    kept: list[int] = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        out = run_experts(x, chosen, weights, layer, layer, torch.tanh)
    assert made == [1, 5, 6] * 2
    out.sum().backward()
    assert made == [1, 5, 6] * 4
    assert max(kept) < 64 * 64


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_estimates_know_the_bytes_of_quantized_experts(key: str, saved) -> None:
    model = load_model(saved(key), dtype=torch.bfloat16, quantize=NF4)
    on_paper = empty_model(model.config.model_copy(update={"dtype": "bfloat16"}), NF4)
    for name, stack in stacks(model).items():
        assert stored_bytes(stacks(on_paper)[name]) == stored_bytes(stack)
        # 4 bits per weight, a byte per block, 4 bytes per 256 blocks, and the mean scale
        values = stack.shape[0] * stack.shape[1] * stack.shape[2]
        assert stored_bytes(stack) == values // 2 + values // 32 + 4 * -(-values // 32 // 256) + 4
    assert not any(item == "not quantized" for item, _ in mixture_rows(model))


def test_the_plan_says_which_experts_stay_in_full(tmp_path: Path) -> None:
    folder = tmp_path / "llama4"
    tiny_configs.save("llama4_text", folder)  # its experts are not in transformers' interface
    model = load_model(folder, quantize=INT8)
    assert not stacks(model)
    assert ("not quantized", "the experts, 294.9 KB in float32") in [tuple(row) for row in mixture_rows(model)]


def test_a_table_and_a_refusal_name_the_quantized_experts(saved) -> None:
    model = load_model(saved("mixtral"), quantize=INT8)
    with pytest.raises(UsageError, match=r"experts.gate_up_proj is quantized \(int8\), its codes cannot train"):
        LoRAConfig(modules_to_save=["experts"]).apply(model)
    trained(model)
    assert peft.matched_table(model)[-1].shape == "gate_up_proj 4×128×32 int8, down_proj 4×32×64 int8, rank 4"
    assert peft.count_parameters(model).total - peft.count_parameters(model).trainable == sum(
        parameter.numel() for parameter in load_model(saved("mixtral")).parameters()
    )


def test_a_block_that_does_not_fit_is_named(saved) -> None:
    with pytest.raises(UsageError, match=r"128 does not divide the \d+ columns of"):
        load_model(saved("mixtral"), quantize=QuantizeConfig(block_size=128))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    return int(done.value.code or 0)


@torch.no_grad()
@pytest.mark.parametrize("with_experts", [True, False], ids=["experts", "linear layers"])
@pytest.mark.parametrize(
    "key",
    [
        "qwen3_moe",
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_merging_adds_to_the_experts_that_were_trained_over(
    key: str, with_experts: bool, saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(key)
    model = load_model(base, quantize=NF4)
    method = trained(model, **({} if with_experts else {"target_parameters": []}))
    peft.save_adapter(model, method, tmp_path / "adapter", base=base)
    expected = logits(model)

    # as in training: opened over the same codes
    again = load_model(base, quantize=NF4)
    peft.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    assert run("merge", tmp_path / "adapter", "--out", tmp_path / "dequantized") == 0
    assert error(logits(load_model(tmp_path / "dequantized")), expected) < 1e-4

    assert run("merge", tmp_path / "adapter", "--into", "original", "--out", tmp_path / "original") == 0
    original = load_model(base)
    peft.load_adapter(original, tmp_path / "adapter")
    assert error(logits(load_model(tmp_path / "original")), logits(original)) < 1e-4

    assert run("merge", tmp_path / "adapter", "--into", "quantized", "--out", tmp_path / "quantized") == 0
    assert "a small update; experts are dequantized" in capsys.readouterr().out
    merged = load_model(tmp_path / "quantized")
    assert not stacks(merged)
    assert not stacks(load_model(tmp_path / "quantized", quantize=NF4))  # beside stored codes, experts are as stored
    wanted = load_model(tmp_path / "dequantized")
    for name in (name for name, parameter in merged.named_parameters() if parameter.ndim == 3):
        torch.testing.assert_close(merged.get_parameter(name), wanted.get_parameter(name))


def test_an_adapter_goes_on_and_off_without_changing_anything(saved) -> None:
    model = load_model(saved("olmoe"), quantize=NF4)
    before = logits(model)
    freeze(model)
    LoRAConfig.model_validate({"target_modules": [], "target_parameters": ["experts.down_proj"]}).apply(model)
    assert len(own_modules(model)) == 4
    assert error(logits(model), before) < 1e-6
    peft.remove(model)
    assert torch.equal(logits(model), before)
