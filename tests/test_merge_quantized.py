"""Merging what was trained over a quantized base: onto the dequantized base, its original, or into codes again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.cli import main
from lit_lora.model import CausalLM
from lit_lora.quantize import QuantizeConfig, found_config
from tests.finetune.tiny_task import make_base
from tests.peft.tiny import adapted, lora, shake

Call = Callable[..., tuple[int, str, str]]
HELD = QuantizeConfig(block_size=32)
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", intermediate_size=64)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = adapted(load_model(base, quantize=HELD), lora(rank=4))
    shake(model, 0.1)
    return peft.save_adapter(model, lora(rank=4), tmp_path / "adapter", base=base)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``lit-lora merge``: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS)
    return found


def trained(base: Path, adapter: Path, held: QuantizeConfig | None = HELD) -> torch.Tensor:
    model = load_model(base, quantize=held)
    peft.load_adapter(model, adapter)
    return logits(model)


def test_pain_16_by_default_the_trained_function_is_written(
    base: Path, adapter: Path, tmp_path: Path, call: Call
) -> None:
    code, out, _ = call("merge", adapter, "--out", tmp_path / "merged")
    assert code == 0
    assert "merged into the dequantized base (nf4-dq, blocks of 32): the model computes what was trained" in out
    merged = load_model(tmp_path / "merged")
    assert found_config(merged) is None
    torch.testing.assert_close(logits(merged), trained(base, adapter), atol=1e-4, rtol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_pain_16_into_the_original_gives_original_and_adapter_and_says_what_differs(
    base: Path, adapter: Path, tmp_path: Path, call: Call
) -> None:
    code, out, _ = call("merge", adapter, "--into", "original", "--out", tmp_path / "merged")
    assert code == 0
    assert "merged into the original base: training was over nf4-dq" in out
    got = logits(load_model(tmp_path / "merged"))
    torch.testing.assert_close(got, trained(base, adapter, None), atol=1e-4, rtol=1e-4)
    worst = (got - trained(base, adapter))[:, -16:].abs().max()
    assert worst > 1e-2
    (figures,) = re.findall(r"logits differ by at most (\S+), KL (\S+) ", out)
    assert 0 < float(figures[0]) < 10 * worst
    assert float(figures[1]) > 0


def test_pain_16_into_quantized_writes_codes_and_says_what_they_keep(
    base: Path, adapter: Path, tmp_path: Path, call: Call
) -> None:
    code, out, _ = call("merge", adapter, "--into", "quantized", "--out", tmp_path / "merged")
    assert code == 0
    assert "merged and quantized again to nf4-dq, blocks of 32" in out
    (kept,) = re.findall(r"([\d.]+)% of its values survive", out)
    assert 10 < float(kept) < 99
    merged = load_model(tmp_path / "merged")
    assert found_config(merged) == HELD
    plain = logits(load_model(base, quantize=HELD))
    wanted = trained(base, adapter)
    assert (logits(merged) - wanted).norm() < (plain - wanted).norm()


def test_layers_without_an_update_keep_their_codes(base: Path, tmp_path: Path, call: Call) -> None:
    config = lora(rank=4, target_modules="q,v")
    model = adapted(load_model(base, quantize=HELD), config)
    shake(model, 0.1)
    folder = peft.save_adapter(model, config, tmp_path / "qv", base=base)
    assert call("merge", folder, "--into", "quantized", "--out", tmp_path / "merged")[0] == 0
    merged, before = load_model(tmp_path / "merged"), load_model(base, quantize=HELD)
    codes = dict(before.named_buffers())
    for name, buffer in merged.named_buffers():
        assert torch.equal(buffer, codes[name]) or "q_proj" in name or "v_proj" in name, name


def test_over_a_prequantized_folder(base: Path, adapter: Path, tmp_path: Path, call: Call) -> None:
    packed = tmp_path / "packed"
    assert call("convert", base, "--quantize", "nf4-dq", "--block-size", 32, "--out", packed)[0] == 0
    assert call("merge", adapter, "--base", packed, "--out", tmp_path / "merged")[0] == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), trained(base, adapter), atol=1e-4, rtol=1e-4)
    assert call("merge", adapter, "--base", packed, "--into", "quantized", "--out", tmp_path / "again")[0] == 0
    code, _, err = call("merge", adapter, "--base", packed, "--into", "original", "--out", tmp_path / "x")
    assert code == 2
    assert "is quantized itself (nf4-dq, blocks of 32)" in err
    assert "--base" in err
    assert not (tmp_path / "x").exists()


def test_into_has_no_effect_without_codes(base: Path, tmp_path: Path, call: Call) -> None:
    model = adapted(load_model(base), lora())
    shake(model)
    folder = peft.save_adapter(model, lora(), tmp_path / "plain", base=base)
    code, _, err = call("merge", folder, "--into", "original", "--out", tmp_path / "x")
    assert (code, err.count("error: ")) == (2, 1)
    assert "--into original: has no effect" in err


def test_a_dry_run_says_what_each_dtype_keeps_but_not_of_codes(adapter: Path, call: Call) -> None:
    code, out, _ = call("merge", adapter, "--dry-run")
    assert code == 0
    assert re.search(r"^bf16\t", out, re.MULTILINE)
    code, _, err = call("merge", adapter, "--dry-run", "--into", "quantized")
    assert code == 2
    assert "--dry-run" in err
