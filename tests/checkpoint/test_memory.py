"""Conversion of a checkpoint of several gigabytes within the memory of one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lit_lora.checkpoint import CheckpointWriter
from tests.checkpoint.makers import CONFIG, config_metadata, gguf_name, state_dict, tokenizer_metadata, write_hf_folder

pytestmark = pytest.mark.slow

BIG: dict[str, Any] = CONFIG | {
    "vocab_size": 64_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
LARGEST_BYTES = BIG["vocab_size"] * BIG["hidden_size"] * 2

# Runs one command and prints the peak of the memory that is the process's own (mapped files are not), over that
# of a bare import of torch.
PROBE = """
import sys, threading, time
import torch

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def sample():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.002)

done, bare = False, own()
peak = bare
thread = threading.Thread(target=sample)
thread.start()
try:
    from lit_lora.cli import main
    main(sys.argv[1:])
finally:
    done = True
    thread.join()
    print("PEAK", peak - bare)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The big model's tensors, from those of a tiny one, so that nothing big is made."""
    with torch.device("meta"):
        from lit_lora.model import CausalLM, ModelConfig

        model = CausalLM(ModelConfig.from_hf(BIG))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def convert_and_measure(source: Path, out: Path, *options: str) -> int:
    peak = run_and_measure("convert", source, out, *options)
    assert written_bytes(out) > 4e9, "too small to show anything"
    return peak


def written_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run_and_measure(command: str, source: Path, out: Path, *options: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, command, str(source), "--out", str(out), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[1])


def assert_bounded(peak: int) -> None:
    assert peak <= 2 * LARGEST_BYTES + 1e9
    assert peak > 1e7, "nothing was measured"


def test_pain_21_gguf_converts_in_the_memory_of_one_tensor(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "big.gguf"
    kind = GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (config_metadata(BIG) | tokenizer_metadata(tokenizer_folder)).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)  # type: ignore[operator]
    for name, shape in shapes().items():
        stored = kind if len(shape) > 1 else GGMLQuantizationType.F32
        block, block_bytes = GGML_QUANT_SIZES[stored]
        size = int(np.prod(shape)) // block * block_bytes
        packed = (*shape[:-1], shape[-1] // block * block_bytes) if stored == kind else shape
        dtype = np.dtype(np.uint8 if stored == kind else np.float32)
        writer.add_tensor_info(gguf_name(name), packed, dtype, size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 2_400_000_000)  # a hole: zeros that take no disk
    assert_bounded(convert_and_measure(path, tmp_path / "out"))


def test_pain_21_pickles_convert_in_the_memory_of_one_tensor(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = write_hf_folder(tmp_path / "in", tokenizer_folder, BIG)
    shards = {}
    for index, (name, shape) in enumerate(shapes().items()):
        shards[name] = f"pytorch_model-{index:05d}.bin"
        torch.save({name: torch.ones(shape, dtype=torch.bfloat16)}, folder / shards[name])
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_bounded(convert_and_measure(folder, tmp_path / "out", "--dtype", "fp16"))


def test_pain_21_safetensors_convert_in_the_memory_of_one_tensor(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = write_hf_folder(tmp_path / "in", tokenizer_folder, BIG)
    with CheckpointWriter(folder) as writer:
        for name, shape in shapes().items():
            writer.add(name, torch.ones(shape, dtype=torch.bfloat16))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_bounded(convert_and_measure(folder, tmp_path / "out", "--dtype", "fp16"))


def test_the_shapes_are_those_of_a_checkpoint() -> None:
    assert set(state_dict(CONFIG)) < set(shapes())
