"""Methods beside LoRA that PEFT has too, live: same outputs and gradients, and each opens the other's files."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
from torch import nn

from lit_lora import peft as ours
from lit_lora.peft.core.modules import model_updates

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

from tests.parity.test_peft import bases, ids, loss_of, open_in_peft, our_model, save_peft, shake, theirs_of
from tests.peft.tiny import rows

__all__ = ["bases"]

QKV = ["q_proj", "k_proj", "v_proj", "down_proj"]
DORA = {"r": 4, "lora_alpha": 8, "use_dora": True}
# PEFT's class and settings, and ours that mean the same
CASES = {
    "dora": ("LoraConfig", {**DORA, "target_modules": "all-linear"}, {"name": "dora", "rank": 4}),
    "dora bias": (
        "LoraConfig",
        {**DORA, "target_modules": QKV, "bias": "lora_only", "use_rslora": True},
        {"name": "dora", "rank": 4, "target_modules": QKV, "bias": "lora_only", "use_rslora": True},
    ),
    "vera": (
        "VeraConfig",
        {"r": 24, "target_modules": QKV},
        {"name": "vera", "rank": 24, "target_modules": QKV},
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"name": "ia3"},
    ),
    "glora": (
        "GloraConfig",
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "config_A_B": "lora", "config_C": "lora"},
        {"name": "glora", "target_modules": ["q_proj", "up_proj"], "C": "lora", "D": "constant", "E": "constant"},
    ),
    "glora vectors": (
        "GloraConfig",
        {"r": 4, "target_modules": QKV, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        {"name": "glora", "target_modules": QKV, "A": "vector", "B": "vector", "C": "vector"}
        | {"D": "vector", "E": "vector"},
    ),
    "glora constants": (
        "GloraConfig",
        {"r": 4, "target_modules": QKV, "config_A_B": "constant", "config_C": "none", "config_D_E": "constant"},
        {"name": "glora", "target_modules": QKV, "A": "constant", "B": "constant", "D": "constant", "E": "constant"},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def peft_model(folder, case):
    import peft

    kind, settings, _ = CASES[case]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs_of(folder), getattr(peft, kind)(**settings, task_type="CAUSAL_LM"))
    return model.eval()


def adapted(folder, case):
    settings = CASES[case][2]
    model = our_model(folder)
    ours.freeze(model)
    config = ours.methods()[settings["name"]].model_validate(settings)
    config.apply(model)
    return model, config


def file_gradients(model, config):
    """Gradients by the names and in the shapes of the file."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    return config.file_tensors(model)


@every_case
def test_an_adapter_of_peft_gives_the_same_logits_and_gradients(bases, case, tmp_path):
    theirs = peft_model(bases[False], case)
    shake(theirs)
    model = our_model(bases[False])
    report = ours.load_adapter(model, save_peft(theirs, tmp_path / "peft"))
    tokens = ids()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=2e-5, rtol=2e-5)
    for each in (model, theirs):
        loss_of(each, tokens).backward()
    expected = {
        name.replace("base_model.model.", "").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    got = file_gradients(model, report.adapter.config)
    got = {
        name: gradient
        for name, gradient in got.items()
        if not name.startswith("base_model.") and not name.endswith(".zeros")
    }
    assert got.keys() == {name.removesuffix(".weight") if "magnitude" in name else name for name in expected}
    for name, gradient in expected.items():
        name = name.removesuffix(".weight") if "magnitude" in name else name
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@every_case
def test_peft_opens_our_adapter_with_the_same_logits(bases, case, tmp_path):
    model, config = adapted(bases[False], case)
    shake(model)
    ours.save_adapter(model, config, tmp_path / "adapter", base=bases[False])
    theirs = open_in_peft(theirs_of(bases[False]), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids()).logits, model(ids()), atol=2e-5, rtol=2e-5)


def test_vera_draws_the_matrices_that_peft_draws(bases):
    theirs = peft_model(bases[False], "vera")
    module = adapted(bases[False], "vera")[0].model.layers[0].mlp.down_proj
    torch.testing.assert_close(module.vera_A, theirs.base_model.vera_A["default"], atol=0, rtol=1e-6)
    torch.testing.assert_close(module.vera_B, theirs.base_model.vera_B["default"], atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"name": "tied-lora", "rank": 4}, {"name": "bitfit"}, {"name": "glora", "A": "none"}],
    ids=lambda settings: settings["name"],
)
def test_peft_refuses_what_it_does_not_have(bases, settings, tmp_path):
    model = our_model(bases[False])
    ours.freeze(model)
    config = ours.methods()[settings["name"]].model_validate(settings)
    config.apply(model)
    ours.save_adapter(model, config, tmp_path / "adapter", base=bases[False])
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert raw["peft_type"].startswith("LIT_LORA_")
    with pytest.raises(KeyError, match=raw["peft_type"]):
        open_in_peft(theirs_of(bases[False]), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
        (lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=1), (2, 6, 9, 9)),
    ],
    ids=["1d", "2d"],
)
def test_convolutions_are_adapted_as_by_peft(layer, shape, tmp_path):
    import peft

    torch.manual_seed(0)
    base, x = nn.Sequential(layer(), nn.ReLU()), torch.randn(shape)
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8))
    shake(theirs)
    expected = theirs(x)
    expected.square().sum().backward()
    save_peft(theirs, tmp_path / "peft")
    model = nn.Sequential(layer(), nn.ReLU())
    model[0].load_state_dict(
        {
            k.replace("base_layer.", ""): v
            for k, v in theirs.base_model.model[0].state_dict().items()
            if "base_layer" in k
        }
    )
    plain = model(x)
    report = ours.load_adapter(model, tmp_path / "peft")
    got = model(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    conv = theirs.base_model.model[0]
    torch.testing.assert_close(model[0].lora_A.grad, conv.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model[0].lora_B.grad, conv.lora_B["default"].weight.grad[:, :, 0].view(8, 4), atol=1e-4, rtol=1e-4
    )
    ours.save_adapter(model, report.adapter.config, tmp_path / "ours", base="b")
    update = model_updates(model)["0.weight"]
    ours.remove(model)
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        model[0].weight.copy_(update.apply(model[0].weight, 0, 8))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "lora-ga"])
def test_peft_opens_an_adapter_that_started_elsewhere_on_the_original_base(bases, init, tmp_path):
    model = our_model(bases[False])
    ours.freeze(model)
    config = ours.methods()["lora"].model_validate({"init": init, "rank": 4, "use_rslora": init == "olora"})
    config = config.init_from_data(model, rows(model))
    shake(model)
    ours.save_adapter(model, config, tmp_path / "adapter", base=bases[False])
    theirs = open_in_peft(theirs_of(bases[False]), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids()).logits, model(ids()), atol=1e-4, rtol=1e-4)
