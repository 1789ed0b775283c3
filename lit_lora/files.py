"""Files that are complete or not there: atomic writes, hashes, free space. No torch here."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    """Give a temporary folder beside ``target``; rename it to ``target`` when the block ends without an error.

    Every file is fsynced before the rename, and the parent folder after it, so after a power cut the folder
    is complete or absent. On an error the temporary folder is removed and ``target`` is untouched; one that a killed
    process left behind goes when ``target`` is written the next time. A folder that is replaced trades places with the
    new one in one step, so that one of the two always has the name; where the system cannot do that, it is moved aside
    in between, and :func:`restore_replaced` puts it back.

    Args:
        target: The folder to create. Its parents are created.
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
        _remove_left(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    try:
        held = lock_folder(temporary)
    except OSError:  # no such locks here: then nobody takes it for left behind, either
        held = None
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
            shutil.rmtree(temporary, ignore_errors=True)  # what was replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def _put(temporary: Path, target: Path) -> None:
    """Give ``temporary`` the name of ``target``; what had it is then called ``temporary``, or gone."""
    try:
        if not (target.exists() and _exchange(temporary, target)):
            if target.exists():
                target.rename(_aside(target))
            temporary.rename(target)
        _fsync(target.parent)
    finally:
        restore_replaced(target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders trade names in one step; false, and nothing done, where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    # Paths from the root, so that the handles of folders to start from do not count; the 2 is RENAME_EXCHANGE.
    return bool(rename(0, os.fsencode(one.absolute()), 0, os.fsencode(other.absolute()), 2) == 0)


def restore_replaced(target: Path) -> None:
    """Put back the folder that a killed process had moved aside to replace it; or remove it, where the new one came.

    To be called by who writes ``target``, or keeps others from writing it: between its two renames a live process looks
    like a killed one.

    Raises:
        OSError: The disk refuses.
    """
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        remove_folder(aside)
    else:
        aside.rename(target)


def _aside(target: Path) -> Path:
    """The name of a folder while another takes its place."""
    return target.with_name(f".old-{target.name}")


def remove_folder(folder: Path) -> None:
    """Remove a folder, as far as the disk allows; if the process is killed meanwhile, no half folder has its name."""
    gone = folder.with_name(f".tmp-{folder.name}-old")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_left(target: Path) -> None:
    """Remove temporary folders of ``target`` that no process holds."""
    for left in target.parent.glob(f".tmp-{glob.escape(target.name)}-*"):
        with suppress(OSError):
            held = lock_folder(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)


def lock_folder(folder: Path) -> int:
    """Hold a folder until the handle that is returned is closed, or this process ends, also by SIGKILL.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: There are no such locks here: on Windows, on some network drives.
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


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8) under a temporary name, fsync it, then rename.

    Raises:
        DiskError: The disk is full or read-only, or ``path`` is a folder; an existing file keeps its old content.
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
    """Turn the operating system's disk errors inside the block into a :class:`DiskError` about ``path``.

    Raises:
        DiskError: No space, quota, read-only, permission or input/output error, or no name for a file.
    """
    reasons = {
        errno.ENOSPC: "no space left on the disk",
        errno.EDQUOT: "disk quota exceeded",
        errno.EROFS: "read-only file system",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EIO: "input/output error of the disk",
        errno.ENOTDIR: "a part of this path is a file, expected a folder",
        errno.EEXIST: "a part of this path is a file, expected a folder",
        errno.EISDIR: "is a folder, expected the name of a file",
        errno.ENAMETOOLONG: "the name is too long",
        errno.EFBIG: "file too large for the disk or its limits",
    }
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors says it in the text of its own error
            number = int(found[1])
        if number not in reasons:
            raise
        free = f", {human_bytes(free_bytes(path))} free" if number == errno.ENOSPC else ""
        hint = "free some space, or choose a place on another disk" if number in (errno.ENOSPC, errno.EDQUOT) else None
        if cache_folder() in Path(path).parents:
            hint = "LIT_LORA_CACHE=FOLDER puts what is kept between runs elsewhere"
        raise DiskError(f"{path}: {reasons[number]}{free}; what was there is kept", hint) from error


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Check that the volume of ``path`` has room for ``needed_bytes`` before work starts.

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
    """Check that ``path`` can be created, before work starts.

    Raises:
        DiskError: It exists, or what is to hold it is a file or cannot be written to.
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


# Windows opens a device under these names, in any folder and with any ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_LONGEST_NAME = 200  # bytes of 255, which leaves room for the endings of temporary files


def require_safe_names(names: Iterable[object], where: str | Path) -> None:
    """Check names from a listing, an archive or an index before any of them becomes a path.

    A safe name stays below the folder that it is joined to, on every operating system. Its parts are separated by
    ``/``.

    Args:
        names: All that go into one folder.
        where: What lists them, for the message.

    Raises:
        InputError: A name is not safe, or two of them are one file where upper and lower case are not told apart.
    """
    hint = "do not trust this source; get the model from another one"
    same: dict[str, object] = {}
    for name in names:
        if reason := _why_unsafe(name):
            raise InputError(
                f"{where}: the file name {_shown(name)} {reason}, expected one such as 'model.safetensors'", hint
            )
        key = unicodedata.normalize("NFD", str(name)).casefold()
        if key in same:
            raise InputError(
                f"{where}: the file names {_shown(same[key])} and {_shown(name)} mean one file on some systems, "
                "expected different ones",
                hint,
            )
        same[key] = name


def _why_unsafe(name: object) -> str | None:
    """Why ``name`` must not become a path; ``None`` if it may."""
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


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:120]}…"


def free_bytes(path: Path) -> int:
    """Free bytes on the volume that holds ``path`` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def cache_folder() -> Path:
    """Where tokenised rows and compiled kernels are kept: ``LIT_LORA_CACHE``, or the user's cache folder."""
    if given := os.environ.get("LIT_LORA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-lora"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB`` (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder; its rename is journalled
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
