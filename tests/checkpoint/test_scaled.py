"""FP8 and MXFP4 checkpoints, dequantized as they are read: the values are those that transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora.checkpoint import load_model, open_tensors
from lit_lora.checkpoint.convert import convert, open_source, plan_conversion
from lit_lora.checkpoint.load import empty_model
from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.checkpoint.scaled import ScaledTensors
from lit_lora.errors import InputError
from lit_lora.hf import HostedConfig, build, read_config
from lit_lora.quantize import QuantizeConfig, found_config
from tests.checkpoint.makers import CONFIG, state_dict, write_hf_folder
from tests.families import tiny_configs

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
# 96 rows in blocks of 64 end within a block, as rows of DeepSeek's projections do.
FORMS: dict[str, tuple[dict[str, Any], str, tuple[int, int] | None]] = {
    "blocks": (FP8, "_scale_inv", (32, 32)),
    "blocks that do not divide the rows": ({**FP8, "weight_block_size": [64, 32]}, "_scale_inv", (64, 32)),
    "blocks that the config does not name": ({"quant_method": "fp8"}, "_scale_inv", (16, 32)),
    "one scale per row": ({"quant_method": "fbgemm_fp8"}, "_scale", (1, 10_000)),
    "one scale": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
        },
        "_scale",
        None,
    ),
}


def quantized_to_float8(weight: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the matrix that they stand for, spelled out block by block."""
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    values = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            values[at] = codes[at].float() * scales[i, j]
    return codes, scales if block else scales.reshape(1), values


def write_float8(folder: Path, tokenizer: Path, form: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose projections are in FP8, and the values of all its tensors."""
    settings, end, block = FORMS[form]
    write_hf_folder(folder, tokenizer, {**CONFIG, "quantization_config": settings, "torch_dtype": "bfloat16"})
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in state_dict(dtype=torch.bfloat16).items():
        if not name.endswith("proj.weight"):
            stored[name] = values[name] = tensor
            continue
        codes, scales, value = quantized_to_float8(tensor.float(), block)
        stored |= {name: codes, f"{name}{end}": scales}
        stored[f"{name.removesuffix('.weight')}.input_scale"] = torch.ones(1)
        values[name] = value.bfloat16()
    save_file(stored, folder / "model.safetensors")
    return folder, values


@pytest.mark.parametrize("form", FORMS)
def test_fp8_weights_are_codes_times_scales(
    tmp_path: Path, tokenizer_folder: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("lit_lora.checkpoint.scaled._CHUNK_VALUES", 1000)  # several pieces, which end within blocks
    folder, values = write_float8(tmp_path / "fp8", tokenizer_folder, form)
    model = load_model(folder)
    assert "weights are dequantized to bfloat16 while loading" in capsys.readouterr().err
    loaded = dict(model.named_parameters())
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(loaded[name], value), name
    # Into another dtype, they are rounded once.
    name = next(name for name in values if name.endswith("proj.weight"))
    assert not torch.equal(StoredTensors(folder).read(name, torch.float32), values[name].float())


def test_fp8_weights_are_those_of_transformers(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 96, generator=generator).to(torch.float8_e4m3fn)
    scales = {
        "float32": torch.rand(3, 2, 3, generator=generator) + 0.1,
        "bytes": torch.randint(120, 135, (3, 2, 3), generator=generator, dtype=torch.uint8),
        "exponents": (2.0 ** torch.randint(-7, 8, (3, 2, 3), generator=generator)).to(torch.float8_e8m0fnu),
    }
    stored = {}
    for name, scale in scales.items():
        stored |= {name: weight.clone(), f"{name}_scale_inv": scale}
    save_file(stored, tmp_path / "model.safetensors")
    ours = ScaledTensors(open_tensors(tmp_path), {"quantization_config": FP8}, "here")
    assert ours.names() == sorted(scales)
    for name, scale in scales.items():
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)
        assert torch.equal(ours.read(name, torch.float32), theirs), name


def test_mxfp4_experts_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    monkeypatch.setattr("lit_lora.checkpoint.scaled._CHUNK_VALUES", 1000)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 4), generator=generator, dtype=torch.uint8)
    bias = torch.randn(3, 40, generator=generator).bfloat16()
    place = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{place}_blocks": blocks, f"{place}_scales": scales, f"{place}_bias": bias}
    save_file(stored, tmp_path / "model.safetensors")
    ours = ScaledTensors(open_tensors(tmp_path), {"quantization_config": {"quant_method": "mxfp4"}}, "here")
    assert sorted(ours.names()) == [place, f"{place}_bias"]
    assert ours.shape(place) == (3, 128, 40)
    assert ours.dtype(place) == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(ours.read(place, dtype), theirs)
        assert theirs.std() > 0
    assert torch.equal(ours.read(f"{place}_bias"), bias)


def test_fp8_weights_can_be_quantized_again_and_converted(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder, values = write_float8(tmp_path / "fp8", tokenizer_folder, "blocks")
    assert found_config(load_model(folder, quantize=QuantizeConfig(name="nf4", block_size=32))) is not None
    convert(plan_conversion(open_source(folder)), tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = open_tensors(tmp_path / "plain")
    assert sorted(plain.names()) == sorted(values)
    assert all(torch.equal(plain.read(name), value) for name, value in values.items())


@pytest.mark.parametrize(
    ("scales", "problem"),
    [
        (torch.ones(5, 2), r"5 × 2 scales for 64 × 64 codes"),
        (torch.ones(7), r"scales of shape \[7\] for 64 × 64 codes"),
        (None, "its scales are missing"),
    ],
)
def test_scales_that_do_not_fit_are_one_clear_line(
    tmp_path: Path, tokenizer_folder: Path, scales: Tensor | None, problem: str
) -> None:
    folder, _ = write_float8(tmp_path / "fp8", tokenizer_folder, "blocks")
    reader = open_tensors(folder)
    stored = {name: reader.read(name).clone() for name in reader.names()}
    name = "model.layers.0.self_attn.q_proj.weight"
    del stored[f"{name}_scale_inv"]
    if scales is not None:
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {name} cannot be dequantized: {problem}"):
        load_model(folder)


def mxfp4_experts(folder: Path) -> dict[str, Any]:
    """A tiny gpt-oss whose experts are random 4-bit codes; its quantization settings."""
    config = tiny_configs.config("gpt_oss")
    config.intermediate_size = 64  # blocks have 32 values
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 128, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"quant_method": "mxfp4"}


def float8_experts(folder: Path) -> dict[str, Any]:
    """A tiny mixture of experts in FP8, one matrix per expert in the file; its quantization settings."""
    tiny_configs.save("qwen3_moe", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes, scales, _ = quantized_to_float8(tensors[name].float(), (8, 8))
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", "gate"]}


@pytest.mark.parametrize("write", [mxfp4_experts, float8_experts])
def test_a_whole_mixture_of_experts_is_dequantized_as_by_transformers(
    tmp_path: Path, write: Callable[[Path], dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    settings = write(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    # In float32: in bfloat16, transformers rounds the scales before it multiplies.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=False)
    hosted = read_config(tmp_path)
    model = build(hosted) if isinstance(hosted, HostedConfig) else empty_model(hosted)
    ours = StoredParameters(tmp_path, model)
    parameters = dict(theirs.named_parameters())
    assert set(ours.names()) >= set(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(ours.read(name, torch.bfloat16), parameter.bfloat16()), name
