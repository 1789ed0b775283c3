"""What is installed: the mapped folders, whole, and nothing else; and the wheel works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from lit_lora import __version__
from lit_lora.kernels import library
from tests.cli.answering import make_base

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
NOT_INSTALLED = {"scripts/benchmark_peers"}  # programs that run in the contenders' own environments


def installed_files() -> dict[str, str]:
    """Every file of the mapped folders: its path in the wheel -> its path in the checkout."""
    found = {}
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in sorted((ROOT / folder).rglob("*")):
            here = path.relative_to(ROOT)
            ours = not any(here.as_posix().startswith(name + "/") for name in NOT_INSTALLED)
            if path.is_file() and ours and "__pycache__" not in here.parts:
                inside = path.relative_to(ROOT / folder).as_posix()
                found[f"{package.replace('.', '/')}/{inside}"] = here.as_posix()
    return found


FILES = installed_files()


def test_the_list_of_packages_is_the_tree() -> None:
    with_init = {path.removesuffix("/__init__.py").replace("/", ".") for path in FILES if path.endswith("/__init__.py")}
    with_code = {path.rpartition("/")[0].replace("/", ".") for path in FILES if path.endswith(".py")}
    assert SETUPTOOLS["packages"] == sorted(with_init)
    assert with_code == with_init, "every folder with code needs an __init__.py"


def test_every_file_that_is_not_code_is_package_data() -> None:
    patterns = SETUPTOOLS["package-data"]
    missing = []
    for path in FILES:
        package, _, name = path.rpartition("/")
        if not name.endswith(".py"):
            known = patterns.get(package.replace("/", "."), [])
            if not any(fnmatchcase(name, pattern) for pattern in known):
                missing.append(FILES[path])
    assert missing == []


def test_no_script_or_recipe_hides_a_module_of_python() -> None:
    names = {path.stem for folder in ("finetune", "scripts") for path in (ROOT / folder).glob("*.py")}
    assert names & set(sys.stdlib_module_names) == set()


def test_the_tested_versions_satisfy_every_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [Requirement(text) for texts in (PROJECT["project"]["dependencies"], *extras) for text in texts]
    wrong = [
        str(need)
        for need in wanted
        if not need.specifier.contains(versions.get(need.name.lower().replace("_", "-"), "0"))
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of a copy of the checkout, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "checkpoints", "build", "dist")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; its dependencies are those of the environment the test runs in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    (site_packages(folder) / "of_the_test.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Output of a command that must succeed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=inherited | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_sdist_and_the_wheel_hold_the_mapped_folders_and_nothing_else(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    around = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"}
    assert names - made == set(FILES.values()) | around
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not name.startswith(f"lit_lora-{__version__}.dist-info/")}
    assert in_wheel == set(FILES)


@pytest.mark.slow
def test_only_lit_lora_gets_into_site_packages(installed: Path) -> None:
    names = {path.name for path in site_packages(installed).iterdir()}
    assert names == {"lit_lora", f"lit_lora-{__version__}.dist-info", "of_the_test.pth"}
    assert (installed / "bin" / "lit-lora").is_file()


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    command, python = installed / "bin" / "lit-lora", installed / "bin" / "python"
    cache = str(tmp_path / "cache")
    where = run(python, "-c", "import lit_lora.finetune.lora as m; print(m.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert "quickstart" in run(command, "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"{__version__}\n"
    assert run(command, "configs", cwd=tmp_path).count("\n") == 2 + len(list((ROOT / "configs").glob("*.yaml")))
    model = make_base(tmp_path / "model", endless=True)
    arguments = [f"model.path={model}", "data.path=tickets_train", "data.limit=20", "--dry-run"]
    out = run(command, "finetune", "--config", "lora", *arguments, cwd=tmp_path, LIT_LORA_CACHE=cache)
    assert "trainable parameters" in out
    assert not (tmp_path / "out").exists()
    run(python, "-m", "lit_lora.scripts.prepare", "tickets_train", "--model", model, cwd=tmp_path, LIT_LORA_CACHE=cache)
    source = "from lit_lora.kernels import library; print(library() is not None)"
    assert run(python, "-c", source, cwd=tmp_path, LIT_LORA_CACHE=cache) == f"{library() is not None}\n"
