"""Quantized while loading, quantized folders, and the memory of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.checkpoint import CheckpointWriter, load_model
from lit_lora.checkpoint.convert import convert, open_source, plan_conversion
from lit_lora.checkpoint.load import decoder_linears, empty_model
from lit_lora.errors import InputError, UsageError
from lit_lora.model import ModelConfig
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, found_config, quantize, stored_bytes
from tests.checkpoint.makers import CONFIG, state_dict, write_hf_folder

SIZES: dict[str, Any] = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TYPES = ["nf4-dq", "nf4", "fp4-dq", "int8"]


def settings(text: str) -> QuantizeConfig:
    return QuantizeConfig.model_validate(text)


@pytest.fixture
def base(tmp_path: Path, tokenizer_folder: Path) -> Path:
    folder = write_hf_folder(tmp_path / "base", tokenizer_folder, SIZES)
    save_file(state_dict(SIZES), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(base: Path, text: str) -> Path:
    out = base.parent / text
    convert(plan_conversion(open_source(base), quantize=settings(text)), out)
    return out


def logits(folder: Path, **options: Any) -> torch.Tensor:
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        result: torch.Tensor = load_model(folder, **options)(ids)
    return result


@pytest.mark.parametrize("text", TYPES)
def test_every_linear_layer_of_the_decoder_is_quantized_and_nothing_else(base: Path, text: str) -> None:
    model, original = load_model(base, quantize=settings(text)), load_model(base)
    linears = decoder_linears(original)
    assert linears
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == set(linears)
    assert type(model.lm_head) is type(original.lm_head)
    for name in linears:
        expected = quantize(original.get_parameter(f"{name}.weight"), settings(text))
        assert torch.equal(model.get_submodule(name).weight, expected.dequantize(torch.float32))
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)


@pytest.mark.parametrize("text", TYPES)
def test_a_quantized_folder_is_the_model_that_loading_quantizes(base: Path, text: str) -> None:
    folder = written(base, text)
    assert found_config(load_model(folder)) == settings(text)
    assert torch.equal(logits(folder), logits(base, quantize=settings(text)))
    assert torch.equal(logits(folder, quantize=settings(text)), logits(folder))


def test_every_stored_tensor_stands_at_an_address_that_its_dtype_allows(base: Path) -> None:
    for text in ("nf4-dq", "int8"):
        header = (written(base, text) / "model.safetensors").read_bytes()
        size = int.from_bytes(header[:8], "little")
        for name, entry in json.loads(header[8 : 8 + size]).items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}.get(entry["dtype"], 1) == 0, name


@pytest.mark.parametrize("text", ["nf4-dq", "fp4", "int8"])
def test_transformers_opens_what_convert_writes(base: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    folder = written(base, text)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = theirs.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear8bitLt" if text == "int8" else "Linear4bit")
    ours = load_model(folder)
    if text == "int8":
        assert torch.equal(layer.weight, ours.model.layers[0].mlp.up_proj.quantized.codes)
        return  # they quantize the inputs too
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["nf4-dq", "fp4", "int8"])
def test_what_transformers_wrote_opens(base: Path, tmp_path: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    chosen = settings(text)
    how = (
        {"load_in_8bit": True}
        if text == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": chosen.name,
            "bnb_4bit_use_double_quant": chosen.double_quant,
        }
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**how)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert found_config(load_model(tmp_path / "theirs")) == chosen
    if text != "int8":  # they round to half precision before they quantize to 8 bits
        assert torch.equal(logits(tmp_path / "theirs"), logits(base, quantize=chosen))


def test_a_quantized_folder_is_not_quantized_again(base: Path) -> None:
    folder = written(base, "nf4-dq")
    with pytest.raises(UsageError, match=r"already quantized \(nf4-dq\), cannot become fp4"):
        load_model(folder, quantize=settings("fp4"))
    with pytest.raises(InputError, match="already quantized"):
        plan_conversion(open_source(folder), quantize=settings("nf4-dq"))


def test_another_method_of_quantizing_is_named(base: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="already quantized, by gptq; expected bitsandbytes"):
        load_model(base)


@pytest.mark.parametrize(
    ("end", "change", "expected"),
    [
        (".weight.quant_map", lambda t: t * 2, "does not hold the standard values"),
        (".weight.absmax", lambda t: t[:-1], r"a tensor of \[\d+\] uint8, expected"),
        (".weight.absmax", lambda _: None, "is missing"),
        (".weight.quant_state.bitsandbytes__nf4", lambda t: t[:5], "quant_state is not JSON"),
        (".weight", lambda t: t[:-4], r"expected \[\d+, 1\] uint8"),
    ],
)
def test_a_damaged_quantized_tensor_is_one_clear_line(base: Path, end: str, change: Any, expected: str) -> None:
    path = written(base, "nf4-dq") / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.0.mlp.up_proj{end}"
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.clone()}, path)
    with pytest.raises(InputError, match=expected) as error:
        load_model(path.parent)
    assert "\n" not in str(error.value)


# Hidden, MLP width, layers, heads, key/value heads, vocabulary.
LLAMA = {"7B": (4096, 11008, 32, 32, 32, 32_000), "65B": (8192, 22016, 80, 64, 64, 32_000)}


@pytest.mark.parametrize("size", LLAMA)
def test_bytes_of_llama_are_those_of_the_arithmetic(size: str) -> None:
    """4 + 8/64 + 32/(64·256) = 4.127 bits per linear parameter; embedding, head and norms in 16 bits."""
    width, inner, layers, heads, key_heads, vocabulary = LLAMA[size]
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=128,
        dtype="bfloat16",
    )
    model = empty_model(config, QuantizeConfig())
    linear = layers * (4 * width * width + 3 * width * inner)
    plain = 2 * (2 * vocabulary * width + (2 * layers + 1) * width)
    by_bits = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert stored_bytes(model) == pytest.approx(by_bits + plain, rel=1e-6)
    assert 8 * (stored_bytes(model) - plain) / linear == pytest.approx(4.127, abs=1e-3)
    limit = {"7B": 6e9, "65B": 48e9}[size]
    assert stored_bytes(model) < limit
    if size == "7B":
        assert linear == 6_476_005_376
        assert stored_bytes(model) == pytest.approx(3.87e9, rel=2e-3)


BIG: dict[str, Any] = CONFIG | {
    "vocab_size": 8_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}

# Loads a folder and prints: the peak of the memory that is the process's own (mapped files are not) over that of a bare
# import of torch, how many bytes of files are mapped more than before, the bytes of the model, and the seconds.
PROBE = """
import sys, threading, time
import torch

def own(which="RssAnon"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))

def sample():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.001)

done, bare = False, own()
peak = bare
thread = threading.Thread(target=sample)
thread.start()
from pathlib import Path
from lit_lora.checkpoint import load_model
from lit_lora.quantize import QuantizeConfig, stored_bytes
quantize = QuantizeConfig.model_validate(sys.argv[2]) if sys.argv[2] != "none" else None
started, files = time.thread_time(), own("RssFile")  # of the processor: others may use the machine
model = load_model(Path(sys.argv[1]), dtype=torch.bfloat16, quantize=quantize)
seconds = time.thread_time() - started
done = True
thread.join()
print(max(peak, own()) - bare, own("RssFile") - files, stored_bytes(model), seconds)
"""


def probe(folder: Path, how: str, **environment: str) -> tuple[int, int, int, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), how],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, files, size, seconds = done.stdout.split()
    return int(peak), int(files), int(size), float(seconds)


@pytest.fixture
def big(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A checkpoint of 0.7 GB."""
    folder = write_hf_folder(tmp_path / "big", tokenizer_folder, BIG)
    with CheckpointWriter(folder, max_shard_bytes=300_000_000) as writer:
        for name, parameter in empty_model(ModelConfig.from_folder(folder)).named_parameters():
            writer.add(name, torch.randn(parameter.shape).mul_(0.02).bfloat16())
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 7e8, "too small to show anything"
    return folder


@pytest.mark.slow
def test_quantizing_while_loading_takes_the_result_and_one_tensor(big: Path) -> None:
    for environment in ({}, {"LIT_LORA_KERNELS": "0"}):
        peak, files, size, _ = probe(big, "nf4-dq", **environment)
        print(f"\nquantizing while loading: peak {peak:,}, of mapped files {files:,}, result {size:,}")
        assert size / 2 < peak < size + 2 * 2048 * 8192 + 100_000_000
        assert files < 150_000_000, "pages of the 16-bit weights stay with the process"


@pytest.mark.slow
def test_a_quantized_folder_stays_pages_of_its_files(big: Path, tmp_path: Path) -> None:
    convert(plan_conversion(open_source(big), quantize=settings("nf4-dq")), tmp_path / "packed")
    peak, _, _, seconds = probe(tmp_path / "packed", "none")
    print(f"\na quantized folder: peak {peak:,}, {seconds:.2f} s of the processor")
    assert peak < 200_000_000
    assert seconds < 2
