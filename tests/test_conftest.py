"""What a test run sees of the machine's GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("options", "mark", "seen"),
    [
        ([], "", ""),
        (["-m", "slow and not gpu"], "@pytest.mark.slow", ""),
        (["-m", "gpu"], "@pytest.mark.gpu", "0"),
        (["-m", "not slow"], "@pytest.mark.gpu", "0"),
    ],
)
def test_a_run_sees_the_gpu_only_where_it_selects_gpu_tests(
    tmp_path: Path, options: list[str], mark: str, seen: str
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_probe.py").write_text(
        f"import os, pytest\n{mark}\ndef test_probe():\n    print('seen:', repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
    )
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-s"]
    command = [sys.executable, "-m", "pytest", *settings, *options, str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seen: {seen!r}\n" in done.stdout
