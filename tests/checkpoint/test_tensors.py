from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_lora.checkpoint.tensors import INDEX, open_tensors
from lit_lora.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return tmp_path


def test_tensors_of_all_shards_are_read_by_name(folder: Path) -> None:
    reader = open_tensors(folder)
    assert reader.names() == ["a", "b"]
    assert reader.shape("a") == (2, 3)
    assert reader.dtype("b") == torch.bfloat16
    assert torch.equal(reader.read("a"), torch.arange(6.0).reshape(2, 3))
    assert reader.read("a", torch.float16).dtype == torch.float16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["once", "converted"])
def test_the_pages_of_a_tensor_that_is_read_once_go_with_it(folder: Path, name: str) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder))

    reader = open_tensors(folder)
    before = mappings()
    tensor = reader.read_once("a") if name == "once" else reader.read("a", torch.float16)
    assert torch.equal(tensor.float(), torch.arange(6.0).reshape(2, 3))
    assert mappings() == before + (name == "once")
    del tensor
    assert mappings() == before


def test_every_dtype_is_told_without_reading(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = open_tensors(tmp_path)
    assert {name: reader.dtype(name) for name in reader.names()} == {str(dtype): dtype for dtype in DTYPES}


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"):
        open_tensors(folder)


def test_a_tensor_that_no_shard_holds_is_named(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="lists c, which no shard holds"):
        open_tensors(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_told_from_its_header_alone(folder: Path, kept: int) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: truncated or not a safetensors file"):
        open_tensors(folder)


def test_a_web_page_in_place_of_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(InputError, match="not a safetensors file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_a_broken_index_is_an_error(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(InputError, match="not an index of shards"):
        open_tensors(folder)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../model.safetensors", r"'\.\./model\.safetensors' has the part '\.\.'"),
        ("/etc/model.safetensors", "is an absolute path"),
        ("..", r"has the part '\.\.'"),
        ("a\0b", "control or invisible"),
        ("C:model.safetensors", "contains one of"),
        (5, "is not text"),
        ("a/model.safetensors", "is not a plain file name"),
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, shard: object, words: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match=words):
        open_tensors(folder)


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model\.safetensors") as caught:
        open_tensors(tmp_path)
    assert "lit-lora convert" in str(caught.value.hint)
    with pytest.raises(InputError, match="no such folder"):
        open_tensors(tmp_path / "nowhere")
