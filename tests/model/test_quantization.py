"""Which quantized checkpoints are refused, decided by config.json alone, and what to download instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_lora.errors import InputError
from lit_lora.model.quantization import quantization_method, require_readable, without_quantization

FLOAT8_GROUPS = {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
INT4_GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    "aqlm": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    "eetq": ({"quantization_config": {"quant_method": "eetq"}}, "eetq"),
    "quanto": ({"quantization_config": {"quant_method": "quanto"}}, "quanto"),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    "vptq": ({"quantization_config": {"quant_method": "vptq"}}, "vptq"),
    "exl2": ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "exl2"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    "mlx, both keys": ({"quantization_config": {"group_size": 64, "bits": 4}}, "mlx"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": INT4_GROUPS}},
        r"compressed-tensors \(integers\)",
    ),
    "compressed-tensors, its format": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        r"compressed-tensors \(pack-quantized\)",
    ),
    "its former key": ({"compression_config": {"config_groups": INT4_GROUPS}}, "compressed-tensors"),
    "experts in 4 bits": ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}, "fp8 with experts"),
    "of a model of text and images": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
}

READABLE: list[dict[str, Any]] = [
    {},
    {"quantization_config": None},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"load_in_8bit": True}},
    {"quantization_config": {"quant_method": "lit_lora"}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": FLOAT8_GROUPS}},
    {"quantization_config": {"quant_method": "mxfp4"}},
]


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_quantization_is_one_line_with_a_remedy(case: str) -> None:
    config, words = REFUSED[case]
    with pytest.raises(InputError, match=f"config.json: already quantized, by {words}") as caught:
        require_readable(config, "config.json")
    assert "\n" not in str(caught.value) + str(caught.value.hint)
    assert "use the 16-bit checkpoint it was made from, which its model card should name" in str(caught.value.hint)
    assert quantization_method(without_quantization(config)) is None


@pytest.mark.parametrize("config", READABLE)
def test_a_supported_quantization_is_let_through(config: dict[str, Any]) -> None:
    require_readable(config, "config.json")


GPTQ = REFUSED["gptq"][0]


@pytest.mark.parametrize(
    ("card", "config", "base"),
    [
        ("---\nbase_model: meta/Original-1B\n---\n", GPTQ, "meta/Original-1B"),
        ("---\nbase_model:\n- meta/Original-1B\nbase_model_relation: quantized\n---\n", GPTQ, "meta/Original-1B"),
        ("---\nbase_model: a/card\n---\n", {**GPTQ, "_name_or_path": "a/config"}, "a/card"),
        ("no front matter", {**GPTQ, "_name_or_path": "meta/Original-1B"}, "meta/Original-1B"),
        ("---\n: : [\n---\n", {**GPTQ, "_name_or_path": "meta/Original-1B"}, "meta/Original-1B"),
        ("---\nlicense: mit\n---\n", {**GPTQ, "_name_or_path": "/home/me/model"}, None),
        ("---\nbase_model: some/Model-GPTQ\n---\n", {**GPTQ, "_name_or_path": "some/Model-4bit"}, None),
        ("---\nbase_model: --out=x/y\n---\n", GPTQ, None),
    ],
)
def test_the_remedy_names_the_original_where_a_file_does(
    tmp_path: Path, card: str, config: dict[str, Any], base: str | None
) -> None:
    (tmp_path / "README.md").write_text(card)
    for name in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(InputError) as caught:
            require_readable(config, str(name))
        told = "which its model card should name" if base is None else f"made from: lit-lora download {base};"
        assert told in str(caught.value.hint)
