from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lit_lora.errors import UsageError
from lit_lora.train.device import choose_device, choose_dtype, peak_memory_bytes
from tests.train.tiny_run import adapted, losses, train


def test_a_device_that_is_not_there_is_named_with_those_that_are():
    for name in ("cuda", "mps", "tpu"):
        if (name == "cuda" and torch.cuda.is_available()) or (name == "mps" and torch.backends.mps.is_available()):
            continue
        with pytest.raises(UsageError, match=name) as caught:
            choose_device(name)
        assert caught.value.hint
        assert "cpu" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such segments")
def test_memory_segments_of_a_gpu_grow_unless_the_user_says_how_they_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    choose_device("cpu")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    choose_device("auto")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_dtypes_have_short_names_and_auto_is_what_the_device_multiplies():
    cpu = torch.device("cpu")
    assert [choose_dtype(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(UsageError, match="bf16"):
        choose_dtype("float64", cpu)


def test_peak_memory_counts_what_was_held():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + (50 << 20) // 4)
    assert peak_memory_bytes(torch.device("cpu")) > before
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    """Linux hands getrusage's peak on to a child, where it would hide how little that one needs."""
    held = torch.ones((1 << 30) // 4)
    program = "import torch; from lit_lora.train.device import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 1 << 30
    del held


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_trains_as_the_cpu_does(tmp_path, dtype):
    train(adapted(dtype).to("cuda"), tmp_path / "gpu", max_steps=10)
    train(adapted(torch.float32), tmp_path / "cpu", max_steps=10)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    train(adapted(dtype).to("cuda"), tmp_path / "gpu", max_steps=10, resume=True)
