"""Open data files as bytes and as text, and tell what is no data by its first bytes."""

from __future__ import annotations

import gzip
import io
import re
import shlex
import zipfile
from pathlib import Path
from typing import IO, TextIO

from lit_lora.errors import InputError

__all__ = ["find_undecodable", "first_bytes", "is_web_page", "open_bytes", "open_text", "read_text", "require_data"]

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""How ``surrogateescape`` writes a byte that is not UTF-8. Valid text never contains these characters."""

_COMPRESSED = {
    b"\xfd7zXZ\x00": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"BZh": ("bzip2", "bzip2 -dk"),
}
"""First bytes -> name of the compression, and the command that unpacks it."""


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if it is gzipped."""
    if _is_gzip(path):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _is_gzip(path: Path) -> bool:
    # By content, not by name: browsers and proxies may unpack a .gz and leave its name.
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The file's text, without its byte order mark.

    A byte that is not UTF-8 does not stop the reader: :func:`find_undecodable` finds it in what was read.

    Args:
        path: The file.
        newline: As of ``open``: ``None`` turns all line endings into a newline, an empty string leaves them.
    """
    encoding = _encoding(first_bytes(path, 4))
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors="surrogateescape", newline=newline)


def read_text(path: Path) -> str:
    """All of the file's text.

    Raises:
        InputError: It is not UTF-8.
    """
    lines = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            undecodable = find_undecodable(line, path)
            if undecodable is not None:
                problem, hint = undecodable
                raise InputError(f"{path}:{number}: {problem}", hint=hint)
            lines.append(line)
    return "".join(lines)


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes, unpacked if the file is gzipped."""
    with open_bytes(path) as file:
        return file.read(count)


def _encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # Without a byte order mark, the zero byte of the first ASCII character tells the order.
    if head[1:2] == b"\x00":
        return "utf-16-le"
    if head[:1] == b"\x00":
        return "utf-16-be"
    return "utf-8-sig"


def find_undecodable(text: str, path: Path) -> tuple[str, str] | None:
    """The problem and the hint if the text of :func:`open_text` holds a byte that is not UTF-8; else None."""
    if text.isascii():
        return None
    match = _ESCAPED_BYTE.search(text)
    if match is None:
        return None
    problem = f"not UTF-8 text (byte 0x{ord(match[0]) - 0xDC00:02x})"
    if not _ESCAPED_BYTE.sub("", text).isascii():
        return problem, "the rest of the row is UTF-8: correct this byte"

    # Western European text has single bytes between ASCII letters; other scripts have runs of them.
    is_western = re.search("[\udc80-\udcff]{3}", text) is None
    encoding = "WINDOWS-1252" if is_western else "ENCODING"
    hint = f"save it as UTF-8: {_convert(path, encoding)}"
    if not is_western:
        hint += ", where ENCODING is the file's, such as GB18030, SHIFT-JIS or WINDOWS-1251"
    return problem, hint


def _convert(path: Path, encoding: str) -> str:
    """The shell command that writes the file as UTF-8 under a new name."""
    source = shlex.quote(str(path))
    if _is_gzip(path):
        path = path.with_suffix("")
        command = f"gunzip -c {source} | iconv -f {encoding} -t UTF-8"
    else:
        command = f"iconv -f {encoding} -t UTF-8 {source}"
    target = shlex.quote(str(path.with_name(f"{path.stem}-utf8{path.suffix}")))
    return f"{command} > {target}"


def require_data(path: Path, *, plain_text: bool) -> None:
    """Refuse a file whose first bytes say that it is something else than its name does.

    Args:
        path: The file.
        plain_text: Whether all text is data, such as a page of HTML in a ``.txt``.

    Raises:
        InputError: It is a Git LFS pointer, a web page, an archive, a spreadsheet or a pickle.
    """
    head = first_bytes(path, 512)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(f"{path}: a Git LFS pointer, not the data", hint="run git lfs pull in its repository")
    if head.startswith(b"PK\x03\x04"):
        raise _zip_error(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise InputError(
            f"{path}: a Python pickle, which is not read, because it can run code",
            hint="have who made it write the rows as JSON Lines",
        )
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            source = shlex.quote(str(path))
            raise InputError(f"{path}: compressed with {name}", hint=f"unpack it: {command} {source}")

    if is_web_page(head) and not plain_text:
        raise InputError(
            f"{path}: a web page (HTML), not the data",
            hint="download the file itself: on GitHub its Raw link, on the Hugging Face Hub its download link",
        )


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is HTML."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _zip_error(path: Path) -> InputError:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # truncated, or gzipped once more
        names = []
    if any(name.startswith("xl/") for name in names):
        return InputError(f"{path}: an Excel workbook", hint="save the sheet as CSV UTF-8 in the spreadsheet program")
    return InputError(f"{path}: a zip archive", hint=f"unpack it: unzip {shlex.quote(str(path))}")
