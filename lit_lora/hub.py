"""Resumable downloads from the Hugging Face Hub; a file gets its name once its hash is verified.

``huggingface_hub`` lists the files and their addresses. This module downloads the bytes itself, because the library's
downloads start over after an interruption and check only sizes. The token comes from ``HF_TOKEN`` alone, goes to the
Hub only, and is never shown.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from tqdm import tqdm

from lit_lora import log
from lit_lora.errors import DiskError, InputError, UsageError
from lit_lora.files import disk_errors, human_bytes, require_free_space, require_safe_names, sha256_file

__all__ = [
    "RemoteFile",
    "choose_files",
    "fetch_file",
    "fetch_repo",
    "fetch_side_files",
    "is_safetensors",
    "list_repo",
    "read_start",
]

T = TypeVar("T")

# The files of a checkpoint. Anything else in a repository (other frameworks' weights, images, code) is not downloaded.
_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors")
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "lit_model.pth")
_OTHERS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.yaml",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)

# huggingface_hub uses httpx in 1.x and httpx2 in 2.x; this is the base of all errors of either.
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]

_ATTEMPTS = 4  # in a row without a new byte; progress restarts the count
_RETRY_SECONDS = 1.0  # doubled after every attempt
_DOWNLOADS = 3  # of a file whose hash is wrong
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hub repository.

    Attributes:
        name: Path in the repository.
        size: Bytes.
        url: Its address, pinned to the commit that was listed.
        sha256: Hash of a large file, which the Hub stores outside of git; None for a small one.
        git_sha1: Git's blob hash, by which a small file is verified.
    """

    name: str
    size: int
    url: str
    sha256: str | None
    git_sha1: str | None

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is exactly this file; reads all of it."""
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
        revision: Branch, tag or commit; the main branch if omitted.
        endpoint: The Hub's address; ``HF_ENDPOINT`` or the public one if omitted.

    Raises:
        UsageError: ``repo`` is not the name of a repository.
        InputError: There is no such repository, access is denied, the Hub cannot be reached, or it lists a malformed
            hash.
    """
    api = HfApi(endpoint=endpoint, token=_token())
    with _explained(repo):
        info = _with_retries(lambda: api.model_info(repo, revision=revision, files_metadata=True))
    files = []
    for entry in info.siblings or []:
        url = hf_hub_url(repo, entry.rfilename, revision=info.sha, endpoint=endpoint)
        sha256 = entry.lfs.sha256 if entry.lfs else None
        digest = sha256 or entry.blob_id  # becomes part of a file name, so it must be nothing but a hash
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
    """Download a checkpoint or an adapter from the Hub into the folder ``out``, which is complete or absent.

    Only safetensors, JSON and tokenizer files are downloaded; ``.bin`` and ``.pth`` only if there are no safetensors,
    with a warning. Files are collected in a hidden folder beside ``out``, from which a later call resumes.

    Args:
        repo: ``OWNER/NAME``.
        out: The folder. If it exists, its files must be those of the repository.
        revision: Branch, tag or commit; the main branch if omitted.
        endpoint: The Hub's address; ``HF_ENDPOINT`` or the public one if omitted.
        check: Called with the folder once it has all files but the weights; may raise before they are downloaded.

    Raises:
        UsageError: ``repo`` is not the name of a repository.
        InputError: There is no such repository, access is denied, it has no weights or unsafe file names, the Hub
            cannot be reached, or it repeatedly sends a file with a wrong hash.
        DiskError: ``out`` exists with other content, or the disk is full.
    """
    side_files, weights = _checkpoint_files(repo, list_repo(repo, revision=revision, endpoint=endpoint))
    files = [*side_files, *weights]
    if out.exists():
        differing = [file.name for file in files if not file.is_at(out / file.name)]
        if differing:
            raise DiskError(
                f"{out}: already exists, and its {differing[0]} differs from that of {repo}",
                hint="choose another --out, or remove it",
            )
        log.note(f"{out}: already downloaded; all hashes verified")
        return

    staging = out.with_name(f".{out.name}.part")
    with disk_errors(out):
        staging.mkdir(parents=True, exist_ok=True)
    # An interrupted download of another revision or repository may have left its files.
    expected = set()
    for file in files:
        target = staging / file.name
        expected |= {target, _part(file, target)}
    for path in staging.rglob("*"):
        if path.is_file() and path not in expected:
            path.unlink()

    _fetch_all(repo, side_files, staging)
    if check is not None:
        check(staging)
    _fetch_all(repo, files, staging)
    with disk_errors(out):
        staging.rename(out)


def fetch_file(repo: str, name: str, out: Path, *, revision: str | None = None, endpoint: str | None = None) -> None:
    """Download one file of a Hub repository to the path ``out``, which is complete or absent; resumes.

    Raises:
        UsageError: ``repo`` is not the name of a repository.
        InputError: The name is not safe, there is no such repository or file, access is denied, the Hub cannot be
            reached, or it repeatedly sends a file with a wrong hash.
        DiskError: ``out`` exists with other content, or the disk is full.
    """
    require_safe_names([name], repo)
    files = {file.name: file for file in list_repo(repo, revision=revision, endpoint=endpoint)}
    if name not in files:
        suffix = PurePosixPath(name).suffix
        similar = [other for other in files if PurePosixPath(other).suffix == suffix]
        hint = f"it has {', '.join(similar[:5])}" if similar else None
        raise InputError(f"{repo}: no file {name} in it", hint=hint)

    file = files[name]
    if out.exists():
        if not file.is_at(out):
            raise DiskError(
                f"{out}: already exists, and differs from {repo}/{name}", hint="choose another --out, or remove it"
            )
        log.note(f"{out}: already downloaded; {'SHA-256' if file.sha256 else 'hash'} verified")
        return
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    _fetch_all(repo, [file], out.parent, names={name: out.name})


def fetch_side_files(
    repo: str, out: Path, *, revision: str | None = None, endpoint: str | None = None
) -> list[RemoteFile]:
    """Download configuration, tokenizer and model card of a checkpoint or an adapter into the folder ``out``.

    Returns:
        The files with the weights, which are not downloaded.

    Raises:
        UsageError: ``repo`` is not the name of a repository.
        InputError: As :func:`fetch_repo`.
        DiskError: The disk is full.
    """
    side_files, weights = _checkpoint_files(repo, list_repo(repo, revision=revision, endpoint=endpoint))
    _fetch_all(repo, side_files, out)
    return weights


def read_start(repo: str, file: RemoteFile, count: int) -> bytes:
    """The first ``count`` bytes of a file of a repository, or all if it has fewer.

    Raises:
        InputError: Access is denied, or the Hub cannot be reached.
    """

    def read() -> bytes:
        received = b""
        headers = _headers() | {"Range": f"bytes=0-{count - 1}"}
        with get_session().stream("GET", file.url, headers=headers, timeout=30) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) >= count:  # a server may ignore the range and send the whole file
                    break
        return received[:count]

    with _explained(repo):
        return _with_retries(read)


def _checkpoint_files(repo: str, listed: list[RemoteFile]) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """The files of a repository that belong to its checkpoint: all but the weights, and the weights.

    Raises:
        InputError: There are no weights, or a name is not safe.
    """
    others, weights = choose_files([file.name for file in listed])
    if not weights:
        ggufs = [file.name for file in listed if file.name.endswith(".gguf")]
        hint = f"download one of its GGUF files: lit-lora download {repo}/{ggufs[0]}" if ggufs else None
        raise InputError(f"{repo}: no model*.safetensors and no pytorch_model*.bin in it", hint=hint)
    require_safe_names([*others, *weights], repo)
    if not is_safetensors(weights[0]):
        log.warn(f"{repo} has no safetensors, only pickles ({weights[0]}); lit-lora convert reads them safely")
    by_name = {file.name: file for file in listed}
    return [by_name[name] for name in others], [by_name[name] for name in weights]


def choose_files(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Choose the files of a folder that belong to a checkpoint: configuration and tokenizer, and weights.

    Code is never chosen, pickles only if there are no safetensors.
    """
    top = [name for name in names if "/" not in name or name.startswith("additional_chat_templates/")]
    weights = [name for name in top if is_safetensors(name)]
    unused_index = "*.bin.index.json" if weights else "*.safetensors.index.json"
    others = [name for name in top if _matches(name, _OTHERS) and not _matches(name, (unused_index,))]
    if not weights:
        weights = [name for name in top if _matches(name, _PICKLES)]
    return others, weights


def is_safetensors(name: str) -> bool:
    """Whether a file has the name of a checkpoint's or adapter's safetensors."""
    return _matches(name, _SAFETENSORS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _fetch_all(repo: str, files: list[RemoteFile], folder: Path, names: dict[str, str] | None = None) -> None:
    """Download the files that ``folder`` lacks; each gets its name once it is verified."""
    missing: dict[RemoteFile, Path] = {}
    for file in files:
        target = folder / (names or {}).get(file.name, file.name)
        if not file.is_at(target):
            missing[file] = target
    total = sum(file.size for file in missing)
    present = sum(_size(_part(file, target)) for file, target in missing.items())
    require_free_space(folder, total - present, repo)
    if present:
        log.note(f"resuming after {human_bytes(present)} of {human_bytes(total)}")

    bar: tqdm[Any]
    with log.progress(total=total, what="download", unit="B", initial=present) as bar:
        bar.unit_scale = True
        for file, target in missing.items():
            part = _part(file, target)
            with disk_errors(target), _explained(repo):
                target.parent.mkdir(parents=True, exist_ok=True)
                _fetch_verified(file, part, bar)
                part.replace(target)


def _part(file: RemoteFile, target: Path) -> Path:
    """Where an incomplete file is kept; the hash in its name keeps versions apart."""
    digest = file.sha256 or file.git_sha1 or ""
    return target.with_name(f"{target.name}.{digest[:12]}.part")


def _fetch_verified(file: RemoteFile, part: Path, bar: tqdm[Any]) -> None:
    """Complete ``part``, and start over if its hash is wrong.

    Raises:
        InputError: The hash was wrong every time.
    """
    for _ in range(_DOWNLOADS):
        _with_retries(lambda: _fetch_rest(file, part, bar), progress=lambda: _size(part))
        if file.is_at(part):
            return
        difference = _difference(file, part)
        bar.update(-_size(part))
        part.unlink()
    raise InputError(
        f"{file.name}: the server sent a wrong file {_DOWNLOADS} times ({difference})",
        hint="a proxy or mirror may be at fault",
    )


def _fetch_rest(file: RemoteFile, part: Path, bar: tqdm[Any]) -> None:
    """Append the missing bytes to ``part``.

    Raises:
        ConnectionError: The connection closed too early. What came before is kept.
    """
    size = _size(part)
    if size == file.size and part.is_file():
        return
    headers = _headers()
    if size:
        headers["Range"] = f"bytes={size}-"
    with get_session().stream("GET", file.url, headers=headers, timeout=30) as response:
        if response.status_code == 416:  # range not satisfiable: the part is longer than the file
            bar.update(-size)
            part.unlink()
        hf_raise_for_status(response)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if size and not resumed:  # a server may ignore the range and send the whole file
            bar.update(-size)
            size = 0
        with open(part, "ab" if size else "wb") as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
                if size > file.size:  # a wrong file, perhaps an endless one
                    break
            out.flush()
            os.fsync(out.fileno())
    if size < file.size:
        raise ConnectionError(f"connection closed after {size} of {file.size} bytes")


def _difference(file: RemoteFile, part: Path) -> str:
    """How a downloaded file differs from the one that was listed."""
    with open(part, "rb") as downloaded:
        start = downloaded.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if _size(part) != file.size:
        return f"{_size(part)} bytes or more, expected {file.size}"
    return "the size is right, the hash is not"


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _with_retries(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Repeat a call after a temporary failure: a dropped connection, an overloaded server, too many requests.

    Args:
        call: What to do.
        progress: A number that grows while the call succeeds in part; growth restarts the count of attempts.

    Raises:
        Exception: The last failure, if it is not temporary or came ``_ATTEMPTS`` times in a row.
    """
    failures = 0
    progress_before = progress()
    while True:
        try:
            return call()
        except OfflineModeIsEnabled:  # requested by HF_HUB_OFFLINE, so retrying is useless
            raise
        except (_HTTPError, ConnectionError, TimeoutError) as error:
            status = None
            retry_after = ""
            if isinstance(error, HfHubHTTPError):
                status = error.response.status_code
                retry_after = error.response.headers.get("Retry-After", "")
            failures = 1 if progress() > progress_before else failures + 1
            progress_before = progress()
            if (status is not None and status not in _RETRY_STATUS) or failures >= _ATTEMPTS:
                raise
            seconds = _RETRY_SECONDS * 2 ** (failures - 1)
            if retry_after.isdigit():
                seconds = min(float(retry_after), 60.0)
            problem = f"returned status {status}" if status else "did not respond"
            log.note(f"the Hub {problem}; retrying in {seconds:.0f} s")
            time.sleep(seconds)


def _headers() -> dict[str, str]:
    """The headers of a request for a file."""
    headers = {"Accept-Encoding": "identity"}  # compressed, a byte range would count other bytes
    if _token():  # the client drops it if the Hub redirects to another host
        headers["Authorization"] = f"Bearer {_token()}"
    return headers


def _token() -> str | bool:
    """The token from the environment, or False, which keeps huggingface_hub from using one saved in a file."""
    return os.environ.get("HF_TOKEN") or False


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the Hub's errors into one line and a hint.

    Raises:
        UsageError: ``repo`` is not the name of a repository.
        InputError: Any other error of the Hub or of the connection.
    """
    has_token = bool(_token())
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo}: not the name of a Hub repository, expected OWNER/NAME") from error
    except GatedRepoError as error:
        hint = f"request access at https://huggingface.co/{repo}"
        hint += " with the account of your HF_TOKEN" if has_token else ", then set HF_TOKEN to your token"
        raise InputError(f"{repo}: gated, its owner must grant access first", hint=hint) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo}: no such revision in it") from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{repo}: a file that was listed no longer exists", hint="run the same command again"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; "
        hint += "your HF_TOKEN may lack access" if has_token else "a private or gated repository needs HF_TOKEN"
        raise InputError(f"{repo}: no such repository on the Hub", hint=hint) from error
    except HfHubHTTPError as error:
        raise _status_error(repo, error.response.status_code) from error
    except ValueError as error:
        raise InputError(
            f"{repo}: the Hub's answer is not JSON", hint="a proxy or a login page may have answered instead"
        ) from error
    except (_HTTPError, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"{repo}: the Hub cannot be reached ({type(error).__name__})",
            hint="check the connection and HF_ENDPOINT, then run the same command again; it resumes",
        ) from error


def _status_error(repo: str, status: int) -> InputError:
    """The error for an HTTP status."""
    if status == 401 and not _token():
        return InputError(
            f"{repo}: no such repository on the Hub, or a private one",
            hint="a private one needs your token in HF_TOKEN",
        )
    if status == 401:
        return InputError(
            f"{repo}: the Hub rejected the token in HF_TOKEN (401)",
            hint="create a new one at https://huggingface.co/settings/tokens",
        )
    if status == 403:
        return InputError(f"{repo}: access denied (403)", hint="the token in HF_TOKEN needs permission to read it")
    if status == 429:
        return InputError(
            f"{repo}: too many requests (429)", hint="wait a few minutes; setting HF_TOKEN raises the limit"
        )
    return InputError(f"{repo}: the Hub returned status {status}", hint="run the same command again later; it resumes")
