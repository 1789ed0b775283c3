from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.checkpoint.tensors import INDEX, open_tensors

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "float": torch.randn(7, 5),
    "transposed": torch.randn(4, 6).T,
    "half": torch.randn(3).half(),
    "bfloat": torch.randn(9, 2).bfloat16(),
    "ints": torch.arange(5),
    "flags": torch.tensor([True, False]),
}


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_shards_are_split_by_size_and_indexed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, max_shard_bytes=100) as writer:
        for index in range(5):
            writer.add(f"t{index}", torch.full((10,), float(index)))  # 40 bytes: two to a shard
        writer.add("big", torch.zeros(1000))
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{shard:05d}-of-00004.safetensors" for shard in range(1, 5)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4200
    assert index["weight_map"]["t3"] == "model-00002-of-00004.safetensors"
    reader = open_tensors(tmp_path)
    assert float(reader.read("t4")[0]) == 4.0
    assert reader.shape("big") == (1000,)


def test_more_tensors_than_one_header_describes_start_another_shard(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.some_long_module_name.q_proj.weight"
    with CheckpointWriter(tmp_path) as writer:
        for index in range(1000):
            writer.add(name.format(index), torch.tensor([index]))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reader = open_tensors(tmp_path)
    assert [int(reader.read(name.format(index))) for index in range(1000)] == list(range(1000))


def test_a_checkpoint_without_tensors_is_readable(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path).close()
    assert open_tensors(tmp_path).names() == []


def test_an_error_leaves_no_finished_file(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with CheckpointWriter(tmp_path) as writer:
            writer.add("a", torch.ones(3))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_name_cannot_be_written_twice(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.add("a", torch.ones(3))
        with pytest.raises(ValueError, match="a was added twice"):
            writer.add("a", torch.ones(3))
        with pytest.raises(ValueError, match="complex64 cannot be stored"):
            writer.add("b", torch.ones(3, dtype=torch.complex64))


def test_side_files_are_copied_but_neither_weights_nor_code(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    dst.mkdir()
    (src / "additional_chat_templates").mkdir(parents=True)
    (src / "additional_chat_templates" / "rag.jinja").write_text("r")
    wanted = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "LICENSE"]
    unwanted = ["model.safetensors", INDEX, "pytorch_model.bin", "modeling_custom.py", "README.md", "optimizer.pt"]
    for name in [*wanted, *unwanted]:
        (src / name).write_text(name)
    (dst / "config.json").write_text("kept")
    assert sorted(copy_side_files(src, dst)) == sorted({*wanted, "additional_chat_templates"} - {"config.json"})
    assert {path.name for path in dst.iterdir()} == {*wanted, "additional_chat_templates"}
    assert (dst / "config.json").read_text() == "kept"
    assert (dst / "additional_chat_templates" / "rag.jinja").read_text() == "r"
