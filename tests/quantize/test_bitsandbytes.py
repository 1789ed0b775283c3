"""bitsandbytes: imported without a hub, only where it is used, and its kernels as this package calls them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_lora.quantize import Blocks, QuantizeConfig, bitsandbytes, quantize

# Stands in for the package through which bitsandbytes fetches kernels; says so if anybody asks it for one.
FAKE_KERNELS = """
import pathlib
def get_kernel(*names, **options):
    pathlib.Path({mark!r}).write_text(repr(names))
    raise RuntimeError("no hub here")
"""


def run(code: str, folder: Path) -> str:
    """Output of a program that finds a fake ``kernels``."""
    (folder / "kernels.py").write_text(FAKE_KERNELS.format(mark=str(folder / "asked")))
    code = f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_importing_bitsandbytes_asks_no_hub(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    code = "from lit_lora.quantize.bitsandbytes import load\nmodule = load()\n"
    code += "import kernels\nprint(module.__name__, kernels.get_kernel.__name__)"
    assert run(code, tmp_path) == "bitsandbytes get_kernel\n"
    assert not (tmp_path / "asked").exists()


def test_the_fake_would_notice(tmp_path: Path) -> None:
    """On this kind of CPU the plain import asks for kernels: else the test above shows nothing."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes asks for kernels on other CPUs only")
    (tmp_path / "kernels.py").write_text(FAKE_KERNELS.format(mark=str(tmp_path / "asked")))
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport bitsandbytes"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (tmp_path / "asked").is_file()


@pytest.mark.parametrize("content", [None, "raise RuntimeError('broken')"], ids=["missing", "broken"])
def test_without_it_there_is_none_and_paging_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "bitsandbytes.py").write_text(content or "raise ModuleNotFoundError('bitsandbytes')")
    code = """
import torch
from lit_lora.errors import UsageError
from lit_lora.quantize.bitsandbytes import load
from lit_lora.train.optim.small_state import SmallStateAdamW
print(load())
torch.cuda.is_available = lambda: True
settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
try:
    SmallStateAdamW([{"params": [torch.zeros(4)], "weight_decay": 0.0}], paged=True, **settings)
except UsageError as error:
    print(error, "|", error.hint)
SmallStateAdamW([{"params": [torch.zeros(4)], "weight_decay": 0.0}], **settings)
"""
    refusal = "optimizer.name: paged optimizers need bitsandbytes | pip install bitsandbytes, or use adamw8bit"
    assert run(code, tmp_path) == f"None\n{refusal}\n"


def test_quantizing_and_multiplying_on_a_cpu_imports_no_bitsandbytes(tmp_path: Path) -> None:
    code = """
import torch
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, quantize
layer = QuantizedLinear(quantize(torch.randn(64, 64), QuantizeConfig()), None, torch.float32)
layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
print([name for name in sys.modules if name.split(".")[0] in ("bitsandbytes", "kernels")])
"""
    assert run(code, tmp_path) == "[]\n"


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_its_kernel_gives_the_matrix_that_ours_gives(name: str) -> None:
    if bitsandbytes.load() is None:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    made = quantize(torch.randn(96, 128), QuantizeConfig(name=name))
    assert isinstance(made, Blocks)
    theirs = bitsandbytes.dequantize(made.codes, made.scales(), name, 64, made.shape, torch.float32)
    assert torch.equal(theirs, made.dequantize(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_on_cuda_the_same_codes_and_values(name: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(96, 128)
    here, there = (quantize(matrix.to(device), QuantizeConfig(name=name)) for device in ("cpu", "cuda"))
    for ours, theirs in zip(here.buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours)
    torch.testing.assert_close(there.dequantize(torch.float32).cpu(), here.dequantize(torch.float32))
    x = torch.randn(128)
    torch.testing.assert_close(there.matrix_vector(x.cuda()).cpu(), here.matrix_vector(x), atol=1e-3, rtol=1e-3)
