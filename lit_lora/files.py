"""Files that are complete or absent: atomic writes, hashes, free space."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_lora.errors import DiskError, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_folder",
    "cache_folder",
    "disk_errors",
    "folder_bytes",
    "free_bytes",
    "human_bytes",
    "lock_folder",
    "read_json",
    "read_text",
    "remove_folder",
    "require_free_space",
    "require_new",
    "require_safe_names",
    "restore_replaced",
    "sha256_file",
    "write_text",
]


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, and rename it to ``target`` once the block ends without an error.

    Every file is fsynced before the rename, and the parent folder after it, so after a power cut the folder is complete
    or absent. On an error the temporary folder is removed and ``target`` is untouched; one that a killed process left
    is removed when ``target`` is written again. A replaced folder is exchanged with the new one in one step, so that
    one of the two always has the name; if the system cannot do that, the old folder is moved aside for a moment, and
    :func:`restore_replaced` puts it back after a crash.

    Args:
        target: The folder to create, with its parents.
        replace: Replace an existing ``target``, which is removed last.

    Raises:
        DiskError: ``target`` exists and ``replace`` is false, or the disk is full or read-only.
    """
    target = Path(target)
    with disk_errors(target):
        restore_replaced(target)
    if not replace:
        require_new(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    try:
        lock: int | None = lock_folder(temporary)
    except OSError:  # locks are not supported: then no other process can take the folder for abandoned, either
        lock = None
    try:
        with disk_errors(target):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
                    _fsync(path)
            _fsync(temporary)
            _put(temporary, target)
            shutil.rmtree(temporary, ignore_errors=True)  # now the replaced folder, if there was one
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _put(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``. An existing ``target`` is afterwards named ``temporary``, or removed."""
    try:
        if not target.exists():
            temporary.rename(target)
        elif not _exchange(temporary, target):
            target.rename(_aside(target))
            temporary.rename(target)
        _fsync(target.parent)
    finally:
        restore_replaced(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system and the disk support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    # The zeros are handles of folders for relative paths, which absolute paths ignore.
    rename_exchange = 2
    status = rename(0, os.fsencode(one.absolute()), 0, os.fsencode(other.absolute()), rename_exchange)
    return bool(status == 0)


def restore_replaced(target: Path) -> None:
    """Put back a folder that a killed process moved aside to replace it, or remove it if the new one is in place.

    Only for callers that write ``target`` or lock it: between its two renames, a live process looks like a killed one.

    Raises:
        OSError: The folder cannot be renamed.
    """
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        remove_folder(aside)
    else:
        aside.rename(target)


def _aside(target: Path) -> Path:
    """The name of a folder while it is being replaced."""
    return target.with_name(f".old-{target.name}")


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as possible; it is renamed first, so that its name never stands for half of it."""
    renamed = folder.with_name(f".tmp-{folder.name}-old")
    shutil.rmtree(renamed, ignore_errors=True)  # from an earlier process
    with suppress(OSError):
        folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove temporary folders of ``target`` that no live process has locked."""
    for folder in target.parent.glob(f".tmp-{glob.escape(target.name)}-*"):
        with suppress(OSError):  # locked, or locks are not supported
            lock = lock_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned handle is closed or this process ends, even by SIGKILL.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: Locks are not supported: on Windows, and on some network drives.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: It cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: The file cannot be read, is not JSON, or holds something else.
    """
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of thousands of levels
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8: under a temporary name, fsynced, then renamed.

    Raises:
        DiskError: The disk is full or read-only, or ``path`` is a folder; an existing file keeps its content.
    """
    path = Path(path)
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's disk errors within the block into a :class:`DiskError` about ``path``.

    Raises:
        DiskError: The disk is full, over quota, read-only or failing, permission is denied, or the path is not valid.
    """
    reasons = {
        errno.ENOSPC: "no space left on the disk",
        errno.EDQUOT: "disk quota exceeded",
        errno.EROFS: "read-only file system",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EIO: "input/output error on the disk",
        errno.ENOTDIR: "part of this path is a file, expected a folder",
        errno.EEXIST: "part of this path is a file, expected a folder",
        errno.EISDIR: "is a folder, expected a file",
        errno.ENAMETOOLONG: "the name is too long",
        errno.EFBIG: "the file is too large for the disk or a limit",
    }
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors raises an error of its own, with the number in its text.
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(match[1])
        if number not in reasons:
            raise

        message = f"{path}: {reasons[number]}"
        if number == errno.ENOSPC:
            message += f", {human_bytes(free_bytes(path))} free"
        hint = None
        if cache_folder() in Path(path).parents:
            hint = "set LIT_LORA_CACHE=FOLDER to move the cache"
        elif number in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or choose a folder on another disk"
        raise DiskError(f"{message}; existing files are unchanged", hint) from error


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Check, before work starts, that the disk of ``path`` has room for ``needed_bytes``.

    Raises:
        DiskError: There is less.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        raise DiskError(
            f"{path}: {what} needs {human_bytes(needed_bytes)}, the disk has {human_bytes(free)} free",
            hint="free some space, or choose an output folder on another disk",
        )


def require_new(path: Path, hint: str = "choose another --out, or remove it first") -> None:
    """Check, before work starts, that ``path`` can be created.

    Raises:
        DiskError: It exists, or its parent is a file or not writable.
    """
    with disk_errors(path):
        if os.path.lexists(path):
            raise DiskError(f"{path}: already exists", hint=hint)
        parent = Path(path).absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# On Windows, these names open a device, in any folder and with any extension.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_LONGEST_NAME = 200  # bytes; the limit is 255, and temporary files add to the name


def require_safe_names(names: Iterable[object], where: str | Path) -> None:
    """Check names from a listing, an archive or an index before any of them becomes a path.

    A safe name stays below the folder that it is joined to, on every operating system. Its parts are separated by
    ``/``.

    Args:
        names: All files of one folder.
        where: What lists them, for the message.

    Raises:
        InputError: A name is not safe, or two of them are the same file on a disk that ignores case.
    """
    hint = "do not trust this source; get the model from another one"
    names_by_key: dict[str, object] = {}
    for name in names:
        if reason := _why_unsafe(name):
            raise InputError(
                f"{where}: the file name {_shorten(name)} {reason}, expected one such as 'model.safetensors'", hint
            )
        # macOS normalizes names, and most of its disks and Windows' ignore case.
        key = unicodedata.normalize("NFD", str(name)).casefold()
        if key in names_by_key:
            raise InputError(
                f"{where}: the file names {_shorten(names_by_key[key])} and {_shorten(name)} mean the same file on "
                "some systems, expected different ones",
                hint,
            )
        names_by_key[key] = name


def _why_unsafe(name: object) -> str | None:
    """What is unsafe about a name, or None if it is safe."""
    if not isinstance(name, str):
        return "is not text"
    if not name.isprintable():
        return "contains a control or invisible character"
    if name.startswith("/"):
        return "is an absolute path"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"has the part {part!r}"
        if any(character in '\\:*?"<>|' for character in part):
            return 'contains one of \\ : * ? " < > |'
        if part.endswith((".", " ")):
            return "has a part that ends with a dot or a space"
        if _DEVICE.fullmatch(part):
            return "is reserved for a device on Windows"
        if len(part.encode()) > _LONGEST_NAME:
            return f"has a part of more than {_LONGEST_NAME} bytes"
    return None


def _shorten(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:120]}…"


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path`` or of its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def cache_folder() -> Path:
    """Where tokenized rows and compiled kernels are stored: ``LIT_LORA_CACHE``, or the user's cache folder."""
    if folder := os.environ.get("LIT_LORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-lora"


def folder_bytes(folder: Path) -> int:
    """Total size of all files below ``folder``, in bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB`` (powers of 1000)."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and journals renames
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)  # the only way to read it is to set it
    os.umask(current)
    return current
