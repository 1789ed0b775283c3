"""Names from outside, before they become paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.errors import InputError
from lit_lora.files import require_safe_names

UNSAFE = {
    "../config.json": "has the part '..'",
    "a/../../x": "has the part '..'",
    "a/..": "has the part '..'",
    "..": "has the part '..'",
    "./x": "has the part '.'",
    "a//x": "has the part ''",
    "a/": "has the part ''",
    "": "has the part ''",
    "/etc/passwd": "is an absolute path",
    "//server/share": "is an absolute path",
    "C:x": "contains one of",
    "C:/x": "contains one of",
    "..\\x": "contains one of",
    "a\\x": "contains one of",
    "x.json:stream": "contains one of",
    "a*": "contains one of",
    "x\0.json": "control or invisible",
    "x\n.json": "control or invisible",
    "\x1b[2J.json": "control or invisible",
    "nosj.\u202egpj": "control or invisible",
    "x\udc80": "control or invisible",
    "config.json.": "ends with a dot or a space",
    "config.json ": "ends with a dot or a space",
    "... /x": "ends with a dot or a space",
    "NUL": "reserved for a device",
    "con.json": "reserved for a device",
    "a/Aux .txt": "reserved for a device",
    "com1.tar.gz": "reserved for a device",
    "x" * 201: "more than 200 bytes",
    "é" * 101: "more than 200 bytes",
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(InputError, match=r"^some/model: the file name '") as caught:
        require_safe_names(["config.json", name], "some/model")
    assert UNSAFE[name] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 5, ["x"], b"x"])
def test_a_name_that_is_not_text_is_refused(name: object) -> None:
    with pytest.raises(InputError, match="is not text"):
        require_safe_names([name], "some/model")


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "config.json"],
        ["config.json", "CONFIG.json"],
        ["a/Straße", "a/STRASSE"],
        ["caf\u00e9.json", "cafe\u0301.json"],
    ],
)
def test_two_names_of_one_file_are_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="mean the same file on some systems"):
        require_safe_names(names, "some/model")


def test_safe_names_stay_below_their_folder(tmp_path: Path) -> None:
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "a/b/c.json",
        "..x/...y",
        ".gitattributes",
        "~x",
        "-x",
        "Modèle 北京 (1).json",
        "console.json",
        "com10.txt",
        "x" * 200,
    ]
    require_safe_names(names, "some/model")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        assert path.resolve().is_relative_to(tmp_path.resolve())
