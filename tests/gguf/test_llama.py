from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from lit_lora.errors import InputError
from lit_lora.gguf import GGUFReader
from lit_lora.gguf import file as module
from lit_lora.gguf.ops import in_pairs
from tests.checkpoint.makers import (
    CONFIG,
    config_metadata,
    gguf_tensors,
    interleaved,
    state_dict,
    tokenizer_metadata,
    write_gguf,
    write_tiny_gguf,
)

Kind = GGMLQuantizationType


def test_float32_tensors_come_back_bit_for_bit(tmp_path: Path, tokenizer_folder: Path) -> None:
    reader = GGUFReader(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder))
    state = state_dict()
    assert set(reader.names()) == set(state)
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(name), tensor), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_quantized_tensors_are_the_ones_that_gguf_dequantizes(
    tmp_path: Path, tokenizer_folder: Path, kind: GGMLQuantizationType
) -> None:
    reader = GGUFReader(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder, kind))
    for name, tensor in state_dict().items():
        stored = kind if tensor.ndim > 1 else Kind.F32
        # Blocks lie within rows, so the order of the rows does not matter to the values.
        expected = torch.from_numpy(quants.dequantize(quants.quantize(tensor.numpy(), stored), stored))
        assert torch.equal(reader.read(name, torch.float32), expected), name


def test_transformers_reads_the_same_tensors_from_the_same_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder, Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    reader = GGUFReader(path)
    for name in reader.names():
        assert torch.equal(reader.read(name, torch.float32), theirs[name]), name


@pytest.mark.parametrize("kind", sorted(quants._type_traits))
def test_every_quantization_is_dequantized_in_pieces_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: GGMLQuantizationType
) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 0x78, (37, 2 * block_bytes), dtype=np.uint8)  # no infinite scale
    path = tmp_path / "raw"
    path.write_bytes(b"12345" + data.tobytes())
    monkeypatch.setattr(module, "_CHUNK_VALUES", 10 * block)
    found = module.dequantize(module.Stored(path, 5, kind, (37, 2 * block)), torch.float32)
    assert torch.equal(found, torch.from_numpy(quants.dequantize(data, kind)))


def test_rows_of_q_and_k_are_put_back_head_by_head() -> None:
    weight = np.arange(3 * 8 * 2).reshape(3 * 8, 2)
    assert interleaved(weight, 3)[:4, 0].tolist() == [0, 8, 2, 10]  # rows 0, 4, 1, 5 of the first head
    restored = in_pairs("heads").to_hf([torch.from_numpy(interleaved(weight, 3))], {"heads": 3})
    assert np.array_equal(restored.numpy(), weight)


def test_biases_of_q_and_k_are_put_back_too(tmp_path: Path) -> None:
    tensors = gguf_tensors(state_dict())
    bias = np.arange(32, dtype=np.float32)
    for layer, (part, size) in itertools.product((0, 1), {"q": 64, "k": 32, "v": 32, "output": 64}.items()):
        tensors[f"blk.{layer}.attn_{part}.bias"] = np.zeros(size, np.float32)
    tensors["blk.0.attn_k.bias"] = interleaved(bias, 2)
    reader = GGUFReader(write_gguf(tmp_path / "tiny.gguf", config_metadata(), tensors))
    assert reader.read("model.layers.0.self_attn.k_proj.bias").tolist() == bias.tolist()


def test_the_config_is_the_one_that_was_stored(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = GGUFReader(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder)).config()
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["rope_scaling"] is None
    assert config["pad_token_id"] == 2
    untied = write_tiny_gguf(tmp_path / "untied.gguf", tokenizer_folder, tie_word_embeddings=False)
    assert GGUFReader(untied).config()["tie_word_embeddings"] is False


def _config_with(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Any:
    every = gguf_tensors(state_dict()) | (tensors or {})
    return GGUFReader(write_gguf(tmp_path / "x.gguf", config_metadata() | metadata, every)).config()


def test_linear_and_yarn_scaling_are_read(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert _config_with(tmp_path, linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert _config_with(tmp_path, {"llama.rope.scale_linear": 2.0})["rope_scaling"]["factor"] == 2.0
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 16.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    expected = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    assert _config_with(tmp_path, yarn)["rope_scaling"] == expected
    scaled = _config_with(tmp_path, yarn | {"llama.rope.scaling.attn_factor": 0.5})["rope_scaling"]
    assert scaled["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(16) + 1))
    with pytest.raises(InputError, match="rope scaling 'longrope' is not supported"):
        _config_with(tmp_path, {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0})


def _llama3_factors(head_dim: int, theta: float, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What llama.cpp's converter stores, frequency by frequency."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(
    ("head_dim", "factor", "low", "high", "context"),
    [(128, 8.0, 1.0, 4.0, 8192), (64, 32.0, 1.0, 4.0, 8192), (128, 16.0, 1.0, 8.0, 4096), (16, 8.0, 1.0, 4.0, 8192)],
)
def test_llama3_scaling_is_recovered_from_its_factors(
    tmp_path: Path, head_dim: int, factor: float, low: float, high: float, context: int
) -> None:
    factors = _llama3_factors(head_dim, 500000.0, factor, low, high, context)
    found = _config_with(tmp_path, {"llama.rope.freq_base": 500000.0}, {"rope_freqs.weight": factors})["rope_scaling"]
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 9, 8, dtype=np.float32)
    with pytest.raises(InputError, match=r"the rope factors in .* are not those of Llama 3"):
        _config_with(tmp_path, {}, {"rope_freqs.weight": factors})


def test_a_sliding_window_makes_it_a_mistral(tmp_path: Path) -> None:
    config = _config_with(tmp_path, {"llama.attention.sliding_window": 128})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 128)


def test_a_split_file_is_read_as_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    tensors = gguf_tensors(state_dict())
    names = list(tensors)
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    write_gguf(first, config_metadata() | {"split.count": 2}, {name: tensors[name] for name in names[:7]})
    write_gguf(second, {"split.count": 2}, {name: tensors[name] for name in names[7:]})
    for path in (first, second):
        reader = GGUFReader(path)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in state_dict().items())
    second.unlink()
    with pytest.raises(InputError, match=r"1 of 2 parts are missing: m-00002-of-00002\.gguf"):
        GGUFReader(first)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", {}, {"token_embd.weight": np.ones((4, 32), np.float32)}, architecture="qwen3next"
    )
    with pytest.raises(InputError, match="architecture 'qwen3next' is not supported") as caught:
        GGUFReader(path)
    assert "qwen3" in str(caught.value.hint)


def test_a_tensor_that_would_be_lost_is_an_error(tmp_path: Path) -> None:
    tensors = gguf_tensors(state_dict()) | {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_q_norm\.weight is not part of a llama model"):
        GGUFReader(write_gguf(tmp_path / "x.gguf", config_metadata(), tensors))


def test_something_else_named_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(InputError, match="not a GGUF file, it starts with b'<!DO'"):
        GGUFReader(path)


def test_a_file_cut_anywhere_is_an_error_not_a_crash(tmp_path: Path, tokenizer_folder: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf", tokenizer_folder, Kind.Q8_0).read_bytes()
    path = tmp_path / "cut.gguf"
    header = whole.index(b"output_norm.weight")  # within the list of tensors, all metadata before it
    for length in [*range(0, 400), *range(400, header, 97), *range(header, len(whole) - 32, 1009)]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.gguf: "):
            GGUFReader(path)


def test_random_damage_to_the_header_is_an_error_or_harmless(tmp_path: Path, tokenizer_folder: Path) -> None:
    whole = bytearray(write_tiny_gguf(tmp_path / "whole.gguf", tokenizer_folder, Kind.Q8_0).read_bytes())
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    end = whole.index(b"token_embd.weight") + 2000
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(4, end)] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            reader = GGUFReader(path)
            reader.config()
        except InputError:
            continue


def test_missing_metadata_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    metadata = config_metadata() | tokenizer_metadata(tokenizer_folder)
    del metadata["llama.embedding_length"]
    with pytest.raises(InputError, match=r"metadata key llama\.embedding_length is missing"):
        GGUFReader(write_gguf(tmp_path / "x.gguf", metadata, gguf_tensors(state_dict()))).config()
