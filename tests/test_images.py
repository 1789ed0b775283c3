"""The example of docs/images.md: a convolutional net by the same methods."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "images.md"


def example(tmp_path: Path, **replaced: str) -> Path:
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "example.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["lora", "residual"])
def test_a_net_learns_other_images_by_an_adapter_and_is_itself_without_it(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    lora = 'lora(rank=4, target_modules=["first", "second"], modules_to_save=["head"])'
    other = {lora: 'residual(modules_to_save=["head"])'} if method == "residual" else {}
    namespace = runpy.run_path(str(example(tmp_path, **other)))
    white, inverted = namespace["before"]
    assert white > 0.9
    assert inverted < 0.5
    assert namespace["after"] > 0.9
    assert namespace["restored"] == white
    assert namespace["accuracy"](namespace["net"], namespace["inverted"]) == namespace["after"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
