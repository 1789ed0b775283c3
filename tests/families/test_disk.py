"""Checkpoints of other families: loaded, quantized, merged, saved, with transformers as the oracle."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lit_lora import merge as merging
from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.save import save_model
from lit_lora.checkpoint.tensors import TensorReader
from lit_lora.errors import InputError
from lit_lora.merge import find_places, plan_merge
from lit_lora.model import CausalLM
from lit_lora.peft import load_adapter
from lit_lora.quantize import QuantizeConfig, QuantizedLinear
from tests.checkpoint.test_parameters import NEW, OLD, expected_state, rename, text_model
from tests.families import tiny_configs
from tests.peft.tiny import adapted, lora, shake

TEXT = [
    "gpt2", "gpt_neox", "falcon", "mpt", "bloom", "opt", "phi", "mixtral", "qwen3_moe", "granitemoe", "deepseek_v3",
    "gpt_oss", "falcon_h1", "mamba", "qwen3_5", "falcon#alibi",
]  # fmt: skip
OWN = ["mixtral", "qwen3_moe", "granitemoe"]
FEED_FORWARD = ["mlp.c_proj", "dense_4h_to_h"]
OWN_COMPOSITE = ["gemma3#composite", "mistral3#composite", "mistral3#ministral3#composite"]
COMPOSITE = [*OWN_COMPOSITE, "gemma4#composite", "qwen3_5#composite"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """The checkpoint of a key, written once, and transformers' model of it."""
    written: dict[str, tuple[Path, PreTrainedModel]] = {}

    def save(key: str) -> tuple[Path, PreTrainedModel]:
        if key not in written:
            folder = tmp_path_factory.mktemp(key.replace("#", "_"))
            model = tiny_configs.save(key, folder)
            if key == "falcon#alibi":  # the eager attention adds the bias twice, to scores and to the mask
                model.config._attn_implementation = "sdpa"
            written[key] = folder, model
        return written[key]

    return save


def token_ids() -> torch.Tensor:
    return torch.randint(8, tiny_configs.VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=token_ids()).logits[0]


@torch.no_grad()
def ours(model) -> torch.Tensor:
    return model.logits(model.hidden_states(token_ids()))[0]


def assert_equal(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("key", TEXT + COMPOSITE)
def test_a_loaded_model_computes_what_transformers_does(key: str, saved) -> None:
    folder, net = saved(key)
    model = load_model(folder)
    left_empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert left_empty == []
    assert isinstance(model, CausalLM) == (key in [*OWN, *OWN_COMPOSITE])
    assert_equal(ours(model), theirs(net))


def test_a_head_in_the_files_of_a_composite_that_seems_tied_is_used_as_transformers_does(saved, tmp_path) -> None:
    folder, _ = saved("mistral3#composite")
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(tiny_configs.VOCABULARY, 32, generator=torch.Generator().manual_seed(1))
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert not model.config.tie_word_embeddings
    net = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(net.lm_head.weight, head)
    assert_equal(ours(model), theirs(net))


@pytest.mark.parametrize("key", ["gpt2", "falcon", "gemma3#composite", "mamba"])
def test_quantized_while_loading_is_what_its_dequantized_weights_compute(key: str, saved) -> None:
    folder, net = saved(key)
    model = load_model(folder, quantize=QuantizeConfig(name="int8"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) >= 8
    full = load_model(folder)
    with torch.no_grad():
        for name, layer in layers.items():
            full.get_parameter(f"{name}.weight").copy_(layer.dequantize())
    assert_equal(ours(model), ours(full))
    assert not torch.allclose(ours(model), theirs(net), rtol=1e-4, atol=1e-4)


def test_a_dtype_is_applied_except_where_transformers_keeps_float32(saved) -> None:
    folder, _ = saved("deepseek_v3")
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, stored)


def make_adapter(base: Path, folder: Path, **settings: object) -> Path:
    """An adapter that looks trained, for the base in a folder."""
    model = load_model(base)
    config = lora(**{"target_modules": "all-linear", "rank": 2, **settings})
    adapted(model, config)
    shake(model, 0.1)
    return peft.save_adapter(model, config, folder, base=base)


def merge(base: Path, adapter: Path, out: Path) -> merging.MergeReport:
    return merging.merge(plan_merge(find_places(adapter, base=base, out=out)), out)


def reopened(key: str, folder: Path) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if key.endswith("#composite") else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("key", TEXT + COMPOSITE)
def test_merged_folder_opens_in_transformers_and_gives_base_plus_adapter(key: str, saved, tmp_path: Path) -> None:
    base, net = saved(key)
    adapter = make_adapter(base, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "merged")
    assert len(report.proof.blocks) == 4
    assert report.proof.logits.agreement == 1

    model = load_model(base)
    load_adapter(model, adapter)
    expected = ours(model)
    merged = reopened(key, tmp_path / "merged")
    assert_equal(theirs(merged), expected)
    assert not torch.allclose(expected, theirs(net), atol=1e-3)

    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(report.tensors)
    assert not any("vision" in name or "visual" in name or "audio" in name for name in changed)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert configs[1].pop("keep_dtype")
    assert configs[0] == configs[1]


@pytest.mark.parametrize("key", TEXT + COMPOSITE)
def test_a_model_trained_in_full_is_saved_as_its_checkpoint_was(key: str, saved, tmp_path: Path) -> None:
    base, _ = saved(key)
    model = load_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_model(model, tmp_path / "saved", side_files=base, card="")
    assert_equal(theirs(reopened(key, tmp_path / "saved")), ours(model))
    assert_equal(ours(load_model(tmp_path / "saved")), ours(model))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    same = {name for name in before if torch.equal(before[name], after[name])}
    buffers = {name for name in before if name.endswith(("e_score_correction_bias", "layer_scalar"))}
    assert same == set(StoredParameters(base, model).others()) | buffers
    assert json.loads((base / "config.json").read_text()) == json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.parametrize(
    ("key", "layout"), [("gemma3#composite", NEW), ("gemma3#composite", OLD), ("gpt2", {}), ("qwen3_5#composite", NEW)]
)
def test_a_head_that_is_trained_apart_from_its_embedding_is_stored_beside_it(key, layout, saved, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(saved(key)[0], base)
    rename(base, layout)
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["c_attn" if key == "gpt2" else "q_proj"],
        modules_to_save=["lm_head"],
    )
    merge(base, adapter, tmp_path / "merged")
    model = load_model(base)
    load_adapter(model, adapter)
    assert_equal(theirs(reopened(key, tmp_path / "merged")), ours(model))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("tie_word_embeddings") is False
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("key", ["gpt2", "falcon", "qwen3_moe", "gpt_oss", "gemma3#composite", "qwen3_5#composite"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_adapters_open_in_peft_and_those_of_peft_open_here(key: str, method: str, saved, tmp_path: Path) -> None:
    base, net = saved(key)
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "falcon": ["query_key_value", "dense_4h_to_h"]}
    settings = {"target_modules": targets.get(key, ["k_proj", "o_proj"])}
    if method == "ia3":
        settings["feedforward_modules"] = [name for name in settings["target_modules"] if name in FEED_FORWARD]
    config = peft.methods()[method].model_validate({"name": method, **settings})
    model = adapted(load_model(base), config)
    shake(model, 0.1)
    folder = peft.save_adapter(model, config, tmp_path / "ours", base=base)

    theirs_adapted = PeftModel.from_pretrained(text_part(key, base, net), folder).eval()
    assert_equal(theirs(theirs_adapted), ours(model))
    theirs_adapted.save_pretrained(tmp_path / "theirs")
    opened = load_model(base)
    load_adapter(opened, tmp_path / "theirs")
    assert torch.equal(ours(opened), ours(model))


def text_part(key: str, base: Path, net: PreTrainedModel) -> PreTrainedModel:
    """transformers' text model alone, which the adapter of a composite is for, with the values of ``net``."""
    if not key.endswith("#composite"):
        return copy.deepcopy(net)
    model = AutoModelForCausalLM.from_config(text_model(base).config, attn_implementation="eager")
    model.load_state_dict(expected_state(net, model), strict=False)
    return model.eval()


@pytest.mark.parametrize("key", ["gpt2", "qwen3_moe"])
def test_tasks_are_switched_on_a_hosted_model_without_drift(key: str, saved, tmp_path: Path) -> None:
    base, _ = saved(key)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    model = load_model(base)
    switcher = merging.TaskSwitcher(model, base)
    switcher.switch(adapter)
    assert_equal(ours(model), theirs(reopened(key, tmp_path / "merged")))
    switcher.switch(None)
    assert torch.equal(ours(model), ours(load_model(base)))


def test_an_adapter_over_a_quantized_hosted_base_merges_into_what_was_trained(saved, tmp_path: Path) -> None:
    base, _ = saved("falcon")
    quantize = QuantizeConfig(name="int8")
    model, config = load_model(base, quantize=quantize), lora(target_modules="all-linear", rank=2)
    adapted(model, config)
    shake(model, 0.1)
    adapter = peft.save_adapter(model, config, tmp_path / "adapter", base=base)
    report = merge(base, adapter, tmp_path / "merged")
    assert "dequantized" in report.onto
    assert_equal(theirs(reopened("falcon", tmp_path / "merged")), ours(model))


@pytest.mark.parametrize("key", ["gpt2", "qwen3_moe", "gemma3#composite"])
@pytest.mark.parametrize("problem", ["missing", "shape", "extra"])
def test_a_wrong_tensor_is_one_line_before_weights_are_read(key, problem, saved, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(saved(key)[0], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(
        name
        for name in tensors
        if ".2." in name and name.endswith("mlp.c_proj.weight" if key == "gpt2" else "o_proj.weight")
    )
    if problem == "missing":
        del tensors[name]
    elif problem == "shape":
        tensors[name] = torch.zeros(3, 5)
    else:
        tensors[name.replace(".2.", ".7.")] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(TensorReader, "read", None)
    monkeypatch.setattr(TensorReader, "read_once", None)
    with pytest.raises(InputError, match=r"tensors? ") as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
