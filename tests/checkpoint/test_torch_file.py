from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_lora
from lit_lora.checkpoint.torch_file import TorchReader
from lit_lora.errors import InputError

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_a_state_dict_is_read_by_name(tmp_path: Path) -> None:
    reader = TorchReader([saved(tmp_path / "x.bin", OrderedDict(STATE))])
    assert reader.names() == ["a", "b"]
    assert (reader.shape("a"), reader.dtype("b")) == ((3, 4), torch.bfloat16)
    assert torch.equal(reader.read("a"), STATE["a"])
    assert reader.read("a", torch.float16).dtype == torch.float16


def test_the_format_before_zip_files_is_read_too(tmp_path: Path) -> None:
    reader = TorchReader([saved(tmp_path / "x.bin", STATE, _use_new_zipfile_serialization=False)])
    assert torch.equal(reader.read("a"), STATE["a"])


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_the_wrapping_of_training_scripts_is_taken_off(tmp_path: Path, key: str) -> None:
    prefixed = {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in STATE.items()}
    reader = TorchReader([saved(tmp_path / "x.pth", {key: prefixed, "step": 3})])
    assert reader.names() == ["a", "b"]
    assert not reader.read("a").requires_grad


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    files = [saved(tmp_path / "1.bin", STATE), saved(tmp_path / "2.bin", {"b": torch.ones(1)})]
    with pytest.raises(InputError, match=r"2\.bin: tensor b is in another file too"):
        TorchReader(files)


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 3}, {1: torch.ones(1)}, torch.ones(2)])
def test_anything_but_tensors_by_name_is_an_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="expected a state dict"):
        TorchReader([saved(tmp_path / "x.bin", value)])


def test_a_truncated_or_foreign_file_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", STATE)
    whole = path.read_bytes()
    for content in [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs", whole[:30], whole[: len(whole) // 2]]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.bin: "):
            TorchReader([path])
    old = saved(tmp_path / "old.bin", STATE, _use_new_zipfile_serialization=False)
    for length in range(0, len(old.read_bytes()) - 60, 7):
        path.write_bytes(old.read_bytes()[:length])
        with pytest.raises(InputError, match=r"x\.bin: "):
            TorchReader([path])


class Bomb:
    """Unpickled without care, this leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_pain_48_a_pickle_with_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "fired"
    plain, old, zipped = tmp_path / "plain.bin", tmp_path / "old.bin", tmp_path / "zip.bin"
    plain.write_bytes(pickle.dumps({"a": Bomb(canary)}, protocol=2))
    saved(old, {"a": Bomb(canary)}, _use_new_zipfile_serialization=False)
    saved(zipped, {"a": STATE["a"], "b": Bomb(canary)})
    for path in (plain, old, zipped):
        with pytest.raises(InputError, match=r"refused: the file asks for (posix|nt)\.system") as caught:
            TorchReader([path])
        assert "\n" not in str(caught.value)
        assert not canary.exists()
    pickle.loads(plain.read_bytes())  # noqa: S301 - shows that the bomb is live
    assert canary.exists()


def test_pain_48_a_bomb_beside_the_data_of_a_zip_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "fired"
    path = saved(tmp_path / "x.bin", STATE)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, pickle.dumps(Bomb(canary)) if name.endswith("data.pkl") else content)
    with pytest.raises(InputError):
        TorchReader([path])
    assert not canary.exists()


def test_pain_48_only_one_place_unpickles_and_only_weights() -> None:
    package = Path(lit_lora.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        calls = [line for line in lines if "torch.load(" in line or "pickle.load" in line or "torch.save(" in line]
        if calls:
            found[path.relative_to(package).as_posix()] = calls
    assert list(found) == ["checkpoint/torch_file.py"]
    assert all("weights_only=True" in call for call in found["checkpoint/torch_file.py"])
