"""Starts taken from rows, against the definitions and against PEFT."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.core.passes import Pass, each_gradient
from lit_lora.peft.lora.data_inits import Components, gradient_factors, principal_inputs, share_ranks
from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, quantize
from tests.peft.tiny import lora, make_model, put_on, rows, token_ids


def started(**settings: object) -> tuple[CausalLM, peft.Method]:
    model = make_model()
    peft.freeze(model)
    torch.manual_seed(2)
    return model, put_on(model, lora(**settings), rows(model, 8))


def principal(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Components and shares by definition."""
    centered = vectors.double() - vectors.double().mean(0)
    _, S, Vh = torch.linalg.svd(centered, full_matrices=False)
    return Vh[:count].float(), (S.square() / S.square().sum())[:count].float()


def same_directions(got: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close((got * expected).sum(1).abs(), torch.ones(len(got)), atol=atol, rtol=0)


@pytest.mark.parametrize("portions", [[40], [20, 20], [1, 9, 3, 27]])
@pytest.mark.parametrize("width", [6, 200])
def test_components_of_portions_are_those_of_all_vectors(portions, width):
    torch.manual_seed(0)
    vectors = torch.randn(40, 4) * torch.tensor([8.0, 4.0, 2.0, 1.0]) @ torch.randn(4, width) + 3
    components = Components(4)
    for portion in torch.split(vectors, portions):
        components.add(portion)
    expected, shares = principal(vectors, 4)
    same_directions(components.directions, expected)
    torch.testing.assert_close(torch.tensor(components.shares), shares, atol=1e-4, rtol=1e-3)
    assert components.seen == 40


def test_vectors_that_span_little_give_few_components():
    components = Components(5)
    components.add(torch.outer(torch.arange(10.0), torch.tensor([3.0, 4.0, 0.0])) + 1)
    same_directions(components.directions, torch.tensor([[0.6, 0.8, 0.0]]))
    assert components.shares == [pytest.approx(1.0)]


def test_layers_of_one_input_share_its_components_at_learned_positions_only():
    model = make_model().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    found = principal_inputs(model, names, 3, rows(model))
    assert len({id(components) for components in found.values()}) == 2 * 4
    attention = "model.layers.1.self_attn."
    assert found[f"{attention}q_proj"] is found[f"{attention}v_proj"] is not found[f"{attention}o_proj"]
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learned = torch.cat([one.target_positions for one in rows(model)])
    with torch.no_grad():
        for one in rows(model):
            one.run()
    vectors = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])[learned]
    same_directions(found["model.layers.1.mlp.down_proj"].directions, principal(vectors, 3)[0], atol=1e-3)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if "down" not in name)


def test_eva_keeps_the_number_of_ranks_and_the_scale_and_starts_at_components():
    model, method = started(init="eva", rank=2, alpha=4.0)
    base = make_model()
    layers = {name: module for name, module in own_modules(model).items() if isinstance(module, LoRALinear)}
    linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sum(layer.rank for layer in layers.values()) == 2 * len(linears)
    assert len({layer.rank for layer in layers.values()}) > 1
    assert max(layer.rank for layer in layers.values()) <= 4
    for layer in layers.values():
        assert layer.scaling == pytest.approx(2.0)
        A = layer.lora_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(layer.rank), atol=1e-4, rtol=0)
        assert not layer.lora_B.any()
    again = make_model()
    method.apply(again)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in again.named_parameters()} == shapes
    assert peft.methods()["lora"].model_validate(method.model_dump()) == method


def test_eva_without_redistribution_leaves_every_rank():
    model, _ = started(init="eva", rank=3, rho=1)
    assert {layer.rank for layer in own_modules(model).values() if isinstance(layer, LoRALinear)} == {3}


def test_ranks_go_where_components_explain_most_and_some_layers_get_none():
    flat, steep = Components(4), Components(4)
    torch.manual_seed(0)
    flat.add(torch.randn(200, 50))
    steep.add(torch.randn(200, 50) * torch.tensor([30.0, 20.0, 15.0, 12.0] + 46 * [0.1]))
    assert share_ranks({"a": 2, "b": 2}, {"a": 4, "b": 4}, {"a": flat, "b": steep}) == {"a": 0, "b": 4}
    assert share_ranks({"a": 2, "b": 2}, {"a": 4, "b": 3}, {"a": flat, "b": steep}) == {"a": 1, "b": 3}
    assert share_ranks({"a": 2, "b": 2}, {"a": 2, "b": 2}, {"a": flat, "b": steep}) == {"a": 2, "b": 2}


def test_gradients_are_those_of_all_passes_together_and_nothing_requires_one_after():
    model = make_model()
    peft.freeze(model)
    name = "model.layers.0.mlp.up_proj"
    total = torch.zeros(24, 16)
    each_gradient(model, [name], rows(model), lambda _, gradient: total.add_(gradient))
    weight = model.get_parameter(f"{name}.weight")
    assert not weight.requires_grad
    assert weight.grad is None
    weight.requires_grad_()
    for one in rows(model):
        one.run()
    torch.testing.assert_close(total, weight.grad)


def test_lora_ga_starts_at_singular_vectors_of_the_gradient_and_changes_nothing():
    torch.manual_seed(0)
    gradient = torch.randn(12, 20)
    A, B = gradient_factors(gradient, 3)
    U, _, Vh = torch.linalg.svd(gradient)
    size = 12**0.25 / 4
    torch.testing.assert_close(A @ A.T, size**2 * torch.eye(3), atol=1e-5, rtol=0)
    same_directions(A / size, Vh[:3])
    same_directions(B.T / size, U.T[3:6])
    model, method = started(init="lora-ga", rank=3)
    plain = make_model()
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), plain(token_ids()), atol=1e-5, rtol=1e-5)
    assert method.rank == 3


def cosine_of_first_step(model: CausalLM) -> float:
    """Of the change of all weights by one step of plain gradient descent, and the negative gradient of the weights."""
    base = make_model()
    peft.freeze(base)
    names = [name for name, module in own_modules(model).items() if isinstance(module, LoRALinear)]
    full: dict[str, Tensor] = {}
    each_gradient(base, names, rows(base, 8), lambda name, g: full.update({name: full.get(name, 0) + g}))
    layers = {name: model.get_submodule(name) for name in names}
    before = {name: layer.lora_B.detach() @ layer.lora_A.detach() for name, layer in layers.items()}
    for one in rows(model, 8):
        one.run()
    dot = sizes = steps = 0.0
    for name, layer in layers.items():
        A, B = (factor.detach() - 1e-4 * factor.grad for factor in (layer.lora_A, layer.lora_B))
        step, aim = B @ A - before[name], -full[name]
        dot, sizes, steps = dot + float((step * aim).sum()), sizes + aim.norm() ** 2, steps + step.norm() ** 2
    return dot / math.sqrt(sizes * steps)


def test_the_first_step_of_lora_ga_goes_more_like_full_finetuning_than_loras():
    ga, plain = started(init="lora-ga", rank=3)[0], started(rank=3)[0]
    assert cosine_of_first_step(ga) > cosine_of_first_step(plain) + 0.1


def test_eva_starts_at_the_directions_of_peft():
    pytest.importorskip("peft")
    import peft as theirs

    torch.manual_seed(0)
    inputs = torch.randn(64, 4) * torch.tensor([8.0, 4.0, 2.0, 1.0]) @ torch.randn(4, 12)
    ours = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    eva = theirs.EvaConfig(rho=2.0, use_label_mask=False)
    config = theirs.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights="eva", eva_config=eva)
    model = theirs.get_peft_model(deepcopy(ours), config, low_cpu_mem_usage=True)
    settings = {"dataloader": [inputs], "forward_fn": lambda model, x: model(x), "show_progress_bar": False}
    plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda x, *_: x[0]}
    theirs.initialize_lora_eva_weights(model, **settings, **plain)
    peft.freeze(ours)
    passes = [Pass(torch.ones(64, dtype=torch.bool), lambda: ours(inputs))] * 2
    lora(init="eva", rank=2, alpha=8.0, target_modules=["0", "2"]).init_from_data(ours, passes)
    found = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in found.items()} == {
        name: layer.rank for name, layer in own_modules(ours).items()
    }
    for name, layer in found.items():
        expected = layer.lora_A["default"].weight.detach()
        same_directions(ours.get_submodule(name).lora_A.detach(), expected, atol=2e-2)
        mine = ours.get_submodule(name)
        assert layer.scaling["default"] / (8 / 2) == pytest.approx(mine.scaling / (8.0 / 2))


def test_lora_ga_takes_the_vectors_of_peft():
    pytest.importorskip("peft")
    import peft as theirs

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20))
    gradient = torch.randn(20, 12)
    base[0]._peft_loraga_grad = gradient
    ga = theirs.LoraGAConfig(scale="unit")
    config = theirs.LoraConfig(target_modules=["0"], r=3, init_lora_weights="lora_ga", lora_ga_config=ga)
    layer = theirs.get_peft_model(base, config).base_model.model[0]
    A, B = gradient_factors(gradient, 3)
    same_directions(F.normalize(A, dim=1), F.normalize(layer.lora_A["default"].weight.detach(), dim=1), atol=1e-3)
    same_directions(F.normalize(B.T, dim=1), F.normalize(layer.lora_B["default"].weight.detach().T, dim=1), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_rows": 8}, "init_rows has no effect with init 'kaiming', only with eva and lora-ga"),
        ({"init": "lora-ga", "rho": 2}, "rho has no effect with init 'lora-ga', only with eva"),
        ({"init": "eva", "rho": 0.5}, "rho"),
        (
            {"init": "eva", "target_modules": ["embed_tokens"]},
            "'eva' is for linear layers, but .*embed_tokens is Embedd",
        ),
        ({"init": "lora-ga", "rank": 8, "target_modules": ["k_proj"]}, "16 is too large for .*k_proj"),
        ({"init": "eva", "rank": 8, "alpha": 1.0}, "eva has seen 5 target tokens, which span too few directions"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(settings, message):
    model = make_model()
    with pytest.raises((UsageError, ValueError), match=message):
        lora(**settings).init_from_data(model, rows(model, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "multilora", "init": "eva"}, "init 'eva' is for lora, MultiLoRA supports kaiming and gaussian"),
        ({"name": "dora", "init": "lora-ga"}, "init 'lora-ga' is for lora, DoRA supports kaiming"),
        (
            {"name": "composed", "methods": [{"name": "lora", "init": "eva"}, {"name": "prefix"}]},
            "init eva and lora-ga are only for",
        ),
    ],
)
def test_methods_that_cannot_start_so_refuse_it(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.methods()[settings["name"]].model_validate(settings)


def test_dora_can_start_from_eva():
    model = make_model()
    peft.freeze(model)
    method = peft.methods()["dora"].model_validate({"name": "dora", "init": "eva", "rank": 3})
    method.init_from_data(model, rows(model, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), make_model()(token_ids()), atol=1e-5, rtol=1e-5)


def test_lora_ga_over_codes_is_refused():
    model = make_model()
    peft.freeze(model)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    packed = quantize(layer.weight.detach(), QuantizeConfig(name="int8"), name=name)
    model.model.layers[0].mlp.up_proj = QuantizedLinear(packed, layer.bias, torch.float32)
    with pytest.raises(UsageError, match=r"lora-ga starts from gradients of the weights, but .*up_proj is quantized"):
        lora(init="lora-ga", rank=3, target_modules=["up_proj"]).init_from_data(model, rows(model))


def test_the_former_name_of_init_rows_is_accepted(capsys):
    assert lora(init="eva", start_rows=8) == lora(init="eva", init_rows=8)
    assert "start_rows is now called init_rows" in capsys.readouterr().err
