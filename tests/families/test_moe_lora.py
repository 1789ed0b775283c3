"""LoRA of experts and routers against PEFT's ``target_parameters``, live: same numbers, and files open both ways.

The experts are those of our decoder, and of transformers' models in each layout that exists.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lit_lora import peft as ours
from lit_lora.errors import InputError, UsageError
from lit_lora.merge.combine import combine
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.core.modules import freeze, model_updates, own_modules
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.recipe.plan import left_out_rows, mixture_rows
from tests.families.tiny_configs import VOCABULARY, build, save

# PEFT asks transformers' models for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Key of a tiny model, and the parameters to adapt
CASES = {
    "experts": ("mixtral", EXPERTS),
    "one of two": ("qwen3_moe", EXPERTS[1:]),
    "experts and router": ("mixtral", ["gate.weight", *EXPERTS]),
    "transposed and biased": ("gpt_oss", EXPERTS),
    "not in transformers' interface": ("llama4_text", EXPERTS),
    "router with a correction": ("deepseek_v3", ["gate.weight", *EXPERTS]),
}


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return build("mixtral")


def own_model(theirs: nn.Module) -> CausalLM:
    """Our decoder with the values of transformers' model."""
    model = CausalLM(ModelConfig.from_hf(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def with_peft(model: nn.Module, parameters: list[str]) -> peft.PeftModel:
    """A copy of the model with a random adapter of PEFT's."""
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "q_b_proj"], target_parameters=parameters)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return adapted


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(0))
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def backward(out: Tensor) -> None:
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()


def error(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def file_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of an adapter's parameters, by their names and in their shapes in its file."""
    gradients = {}
    for name, module in own_modules(model).items():
        parameters = {parameter.data_ptr(): parameter for parameter in module.parameters()}
        for key, tensor in module.file_tensors().items():
            gradient = parameters[tensor.data_ptr()].grad
            assert gradient is not None
            gradients[f"base_model.model.{name}.{key}"] = gradient.view_as(tensor)
    return gradients


def check_against_peft(model: nn.Module, theirs: peft.PeftModel, folder: Path, base: nn.Module) -> None:
    """Load PEFT's adapter into our ``model``, compare, save it again and open that with PEFT on ``base``."""
    theirs.save_pretrained(folder / "theirs")
    applied = ours.load_adapter(model, folder / "theirs")
    for module in own_modules(model).values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("lora_"))
    expected, got = logits(theirs), logits(model)
    assert error(got, expected) < 1e-5
    assert error(got, logits(base)) > 1e-2, "the adapter has no effect"

    backward(expected)
    backward(got)
    gradients = file_gradients(model)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None
            assert error(gradients.pop(name.replace(".default", "")), parameter.grad) < 1e-4, name
    assert not gradients

    ours.save_adapter(model, applied.adapter.config, folder / "ours", base="base")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours")
    assert torch.equal(logits(opened), expected)


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_files_are_pefts_on_models_of_transformers(case: str, tmp_path: Path) -> None:
    key, parameters = CASES[case]
    base = build(key)
    check_against_peft(copy.deepcopy(base), with_peft(base, parameters), tmp_path, base)


@pytest.mark.parametrize("parameters", [EXPERTS, ["gate.weight", "experts.down_proj"]], ids=["experts", "router"])
def test_outputs_gradients_and_files_are_pefts_on_our_decoder(
    mixtral: nn.Module, parameters: list[str], tmp_path: Path
) -> None:
    check_against_peft(own_model(mixtral), with_peft(mixtral, parameters), tmp_path, mixtral)


def trained(model: nn.Module, *, scale: float = 1.0, **settings: object) -> LoRAConfig:
    """Apply LoRA to the model, in place, with random factors as after training."""
    method = LoRAConfig.model_validate({"rank": 4, "target_parameters": EXPERTS, **settings})
    freeze(model)
    method.apply(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in own_modules(model).values():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.copy_(scale * 0.1 * torch.randn(parameter.shape, generator=generator))
    return method


# PEFT looks for the patterns among modules only, and uses them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_our_adapter_opens_in_peft_with_ranks_of_its_own(mixtral: nn.Module, tmp_path: Path) -> None:
    model = own_model(mixtral)
    method = trained(model, rank_pattern={"layers.1.*.down_proj": 2, "gate_up_proj": 6}, layers=[1, 3])
    ours.save_adapter(model, method, tmp_path / "adapter", base="base")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path / "adapter")
    assert error(logits(opened), logits(model)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("key", ["mixtral", "gpt_oss"])
def test_merged_weights_compute_what_base_and_adapter_do(key: str) -> None:
    model = build(key)
    trained(model, target_parameters=[*EXPERTS, "gate.weight" if key == "mixtral" else "router.weight"])
    expected = logits(model)
    updates = model_updates(model)
    base = ours.base_tensors(model)
    norm = sum(update.norm(base[name]) ** 2 for name, update in updates.items()) ** 0.5
    ours.remove(model)
    square = 0.0
    for name, update in updates.items():
        weight = model.get_parameter(name)
        merged = update.apply(weight, 0, len(weight))
        assert torch.allclose(update.apply(weight, 1, 2), merged[1:2])
        square += float((merged - weight).square().sum())
        weight.copy_(merged)
    assert norm == pytest.approx(square**0.5, rel=1e-4)
    assert error(logits(model), expected) < 1e-5


def test_nothing_changes_before_the_first_step(mixtral: nn.Module) -> None:
    model = own_model(mixtral)
    before = logits(model)
    method = LoRAConfig.model_validate({"target_modules": [], "target_parameters": EXPERTS, "loraplus_lr_ratio": 16})
    freeze(model)
    method.apply(model)
    assert error(logits(model), before) < 1e-6
    assert len(own_modules(model)) == 4
    assert method.lr_factors(model)["model.layers.0.mlp.experts.lora_B_down_proj"] == 16
    ours.remove(model)
    assert torch.equal(logits(model), before)


def test_a_router_adapted_by_name_is_also_read_with_its_update(mixtral: nn.Module) -> None:
    model = copy.deepcopy(mixtral)
    trained(model, target_modules=[], target_parameters=["gate.weight"])
    router = model.get_submodule("model.layers.0.mlp.gate")
    update = router.updates()["weight"]
    base = router.base_layer.weight
    assert torch.allclose(router.weight, update.apply(base, 0, len(base)))
    assert router.top_k == 2


PROBLEMS = {
    "no such parameter": ({"target_parameters": ["experts.gate_proj"]}, "'experts.gate_proj' matches no parameter out"),
    "of a linear layer": ({"target_parameters": ["q_proj.weight"]}, "'q_proj.weight' matches no parameter outside a l"),
    "rank": ({"target_parameters": EXPERTS, "rank": 33}, "33 is too large for model.layers.0.mlp.experts.gate_up_proj"),
    "dropout": ({"target_parameters": EXPERTS, "dropout": 0.1}, "target_parameters need dropout 0"),
    "init": ({"target_parameters": EXPERTS, "init": "pissa"}, "'pissa' is for linear layers"),
    "pattern": ({"target_parameters": EXPERTS, "rank_pattern": {"gate.weight": 2}}, "rank_pattern: 'gate.weight'"),
    "whole": ({"target_parameters": EXPERTS, "modules_to_save": ["experts"]}, "in both target_parameters and mod"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_settings_that_do_not_fit_are_named(mixtral: nn.Module, problem: str) -> None:
    settings, message = PROBLEMS[problem]
    with pytest.raises((UsageError, ValueError), match=message):
        LoRAConfig.model_validate({"target_modules": [], **settings}).apply(own_model(mixtral))


def plan(model: nn.Module) -> dict[str, str]:
    """The lines of the plan on the model's mixture of experts."""
    return {item: value for item, value in mixture_rows(model)}


def test_the_plan_says_what_of_a_mixture_trains() -> None:
    model = build("qwen2_moe")
    trained(model, target_parameters=[])
    assert plan(model) == {
        "experts": "4 per layer: experts.gate_up_proj frozen, experts.down_proj frozen; to train them, use lora with "
        "target_parameters=[experts.gate_up_proj,experts.down_proj]",
        "routers": "gate.weight frozen",
    }
    left_out = "shared_expert_gate (too narrow)"
    assert left_out_rows(model, LoRAConfig()) == [["left out by all-linear", left_out]]
    assert not any("shared_expert_gate" in name for name in own_modules(model))


def test_the_plan_says_in_how_many_layers_experts_train(mixtral: nn.Module) -> None:
    model = own_model(mixtral)
    trained(model, target_parameters=["gate.weight", "experts.down_proj"], layers=[1, 2])
    states = "experts.gate_up_proj frozen, experts.down_proj train in 2 of 4 layers"
    assert plan(model) == {"experts": f"4 per layer: {states}", "routers": "gate.weight train in 2 of 4 layers"}
    assert not plan(build("llama"))


def test_the_table_of_what_trains_has_one_row_for_a_layers_experts(mixtral: nn.Module) -> None:
    model = own_model(mixtral)
    trained(model)
    row = ours.matched_table(model)[-1]
    assert (row.pattern, row.count) == ("model.layers.*.mlp.experts", 4)
    assert row.shape == "gate_up_proj 4×96×32, down_proj 4×32×48, rank 4"
    assert row.trainable == 4 * 4 * 4 * (32 + 96 + 48 + 32)  # layers, experts, rank, rows and columns


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("experts", "experts.gate_up_proj, experts.down_proj"),
        ("mlp.experts.down_proj", "experts.down_proj"),
        ("gate", "gate.weight"),
        ("w1", "experts.gate_up_proj, experts.down_proj"),  # the name in Mixtral's checkpoints
    ],
)
def test_a_target_that_is_no_linear_layer_leads_to_target_parameters(
    mixtral: nn.Module, pattern: str, named: str
) -> None:
    with pytest.raises(UsageError, match=f"'{pattern}' matches no") as caught:
        LoRAConfig(target_modules=["q_proj", pattern]).apply(own_model(mixtral))
    assert str(caught.value.hint).endswith(f"lora adapts them by target_parameters: [{named}]")


@torch.no_grad()
@pytest.mark.parametrize(("how", "rank"), [("concatenate", None), ("linear", None), ("svd", 8)])
def test_adapters_of_experts_are_summed(how: str, rank: int | None, tmp_path: Path) -> None:
    base = save("mixtral", tmp_path / "base")
    adapters = []
    for scale in (1.0, -0.5):
        model = own_model(base)
        method = trained(model, target_parameters=["gate.weight", *EXPERTS], scale=scale)
        ours.save_adapter(model, method, tmp_path / f"adapter{scale}", base=tmp_path / "base")
        adapters.append(model_updates(model))

    sources = [tmp_path / "adapter1.0", tmp_path / "adapter-0.5"]
    combine(sources, [0.3, 2.0], tmp_path / "sum", how=how, rank=rank)
    model = own_model(base)
    ours.load_adapter(model, tmp_path / "sum")
    combined = model_updates(model)
    assert combined.keys() == adapters[0].keys()
    if how == "linear":  # PEFT's, with cross terms
        return
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.2.mlp.experts.down_proj"):
        first, second = (updates[name].product(0, 4) for updates in adapters)
        assert error(combined[name].product(0, 4), 0.3 * first + 2.0 * second) < 1e-4


def test_an_incomplete_file_is_refused(mixtral: nn.Module, tmp_path: Path) -> None:
    with_peft(mixtral, EXPERTS).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": EXPERTS[:1]}))
    with pytest.raises(InputError, match=r"8 tensors .* not expected"):
        ours.load_adapter(own_model(mixtral), tmp_path)
