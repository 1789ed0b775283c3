"""Every family of the table: a random model of transformers goes into GGUF, and comes back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_lora.errors import InputError
from lit_lora.gguf import GGUFReader
from lit_lora.gguf.families import FAMILIES
from lit_lora.gguf.ops import LATENT_KEY_VALUE
from lit_lora.gguf.settings import values_of
from tests.checkpoint.makers import write_gguf
from tests.families import tiny_configs
from tests.gguf.export import disk_state, export, family_by_type

_FULL: dict[str, Any] = {"use_sliding_window": False}
_GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 8}
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention"] * 4}
_EVERY_4TH: dict[str, Any] = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}

# Key of the tiny models -> what is set otherwise, because llama.cpp has one way only.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama#biased": {},
    "llama#yarn": {},
    "mistral": {},
    "mixtral": {"sliding_window": None},
    "arcee": {},
    "qwen2": _FULL,
    "qwen2#full": {},
    "qwen2_moe": _FULL,
    "qwen3": _FULL,
    "qwen3#full": {},
    "qwen3_moe": _FULL | {"norm_topk_prob": True},
    "gemma": {},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | _SLIDING,
    "gemma3_text#scaled": _GEMMA | _SLIDING,
    "phi": {"qk_layernorm": False},
    "phi3": {},
    "phi3#longrope": {},
    "phi3#partial": {},
    "falcon": {},
    "falcon#new": {},
    "mpt": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neox#sequential": {},
    "bloom": {},
    "stablelm": {},
    "stablelm#parallel": {},
    "starcoder2": {"sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "olmo3": _EVERY_4TH,
    "olmoe": {"clip_qkv": None},
    "smollm3": _FULL,
    "granite": {},
    "granitemoe": {},
    "cohere": {},
    "cohere2": _EVERY_4TH,
    "deepseek_v2": {"n_group": 1},
    "deepseek_v2#whole_query": {"n_group": 1},
    "deepseek_v3": {},
    "deepseek_v3#yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        }
    },
    "gpt_oss": {},
    "glm": {},
    "glm4": {},
    "nemotron": {},
    "ernie4_5": {"use_bias": False},
    "hunyuan_v1_dense": {},
    "exaone4": _EVERY_4TH,
    "exaone4#full": {},
    "seed_oss": {"attention_out_bias": False},
    "lfm2": {"block_auto_adjust_ff_dim": False},
}

IDS = torch.randint(3, 380, (1, 24), generator=torch.Generator().manual_seed(3))


def build(key: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A tiny model whose vectors have so few bits that adding 1 to a norm loses none."""
    table: dict[str, Any] = tiny_configs._TABLE  # type: ignore[assignment]
    monkeypatch.setitem(table, key, {**table.get(key, {}), **CASES[key]})
    model = tiny_configs.build(key)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_((parameter * 4096).round() / 4096)
    return model


def test_every_family_is_tried() -> None:
    assert {tiny_configs.model_type(key) for key in CASES} == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("key", CASES)
def test_a_model_comes_back_from_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    model = build(key, monkeypatch)
    reader = GGUFReader(export(model, tmp_path / "model.gguf"))
    expected = disk_state(model)
    tensors = {name: reader.read(name) for name in reader.names()}
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []

    (tmp_path / "config.json").write_text(json.dumps(reader.config()))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("qwen2", {}, "use_sliding_window: True cannot be stored"),
        ("qwen3_moe", _FULL, "norm_topk_prob: False cannot be stored"),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "full attention every 4 layers"),
        ("gemma3_text", {}, "query_pre_attn_scalar: 12 cannot be stored"),
        ("falcon#alibi", {}, "parallel_attn: False cannot be stored|multi_query"),
        ("llama#dynamic", {}, "rope_type: 'dynamic' cannot be stored"),
        ("deepseek_v3#yarn", {}, "mscale"),
        ("smollm3#full", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
    ],
)
def test_what_llama_cpp_cannot_represent_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str, settings: dict[str, Any], words: str
) -> None:
    table: dict[str, Any] = tiny_configs._TABLE  # type: ignore[assignment]
    monkeypatch.setitem(table, key, {**table.get(key, {}), **settings})
    family = family_by_type(tiny_configs.model_type(key))
    with pytest.raises(InputError, match=words):
        family.metadata(values_of(tiny_configs.config(key)))


def test_experts_in_mxfp4_are_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "gpt_oss", {"intermediate_size": 64})
    model = build("gpt_oss", monkeypatch)
    reader = GGUFReader(export(model, tmp_path / "model.gguf", kind=GGMLQuantizationType.MXFP4))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    gate = quants.quantize(disk_state(model)[name][..., ::2].swapaxes(1, 2).numpy(), GGMLQuantizationType.MXFP4)
    expected = torch.from_numpy(quants.dequantize(gate, GGMLQuantizationType.MXFP4)).swapaxes(1, 2)
    assert torch.equal(reader.read(name, torch.float32)[..., ::2], expected)
    assert "MXFP4" in reader.quantizations()


def test_the_former_form_of_latent_projections_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("deepseek_v3", monkeypatch)
    family = family_by_type("deepseek_v3")
    former = replace(family, rules=tuple(rule for rule in family.rules if rule.op is not LATENT_KEY_VALUE))
    reader = GGUFReader(export(model, tmp_path / "model.gguf", family=former))
    name = "model.layers.2.self_attn.kv_b_proj.weight"
    assert torch.equal(reader.read(name), disk_state(model)[name])


@pytest.mark.parametrize(
    ("kind", "dtype"), [(GGMLQuantizationType.F16, torch.float16), (GGMLQuantizationType.BF16, torch.bfloat16)]
)
@pytest.mark.parametrize("key", ["mixtral", "falcon", "gpt2"])
def test_tensors_of_16_bits_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, kind: GGMLQuantizationType, dtype: torch.dtype
) -> None:
    model = build(key, monkeypatch)
    reader = GGUFReader(export(model, tmp_path / "model.gguf", kind=kind))
    for name, tensor in disk_state(model).items():
        expected = tensor.to(dtype) if tensor.ndim > 1 else tensor
        assert torch.equal(reader.read(name), expected), name


def test_damaged_counts_are_refused_before_a_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(build("mixtral", monkeypatch), tmp_path / "model.gguf")
    whole = path.read_bytes()
    for key, words in (("llama.block_count", "its block_count is"), ("llama.expert_count", "its expert_count is")):
        place = whole.index(key.encode()) + len(key) + 4  # after the type
        path.write_bytes(whole[:place] + (1 << 30).to_bytes(4, "little") + whole[place + 4 :])
        with pytest.raises(InputError, match=words):
            GGUFReader(path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "lora.gguf", {"general.type": "adapter"}, {"a.lora_a": np.ones((1, 1), np.float32)})
    with pytest.raises(InputError, match="holds 'adapter', expected a whole model"):
        GGUFReader(path)
