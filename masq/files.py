"""Files that are written whole or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masq.errors import BusyError, DataError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SCRATCH = "scratch-"
"""How the names of folders begin that hold nothing worth keeping once the process that made them is gone."""
_CHUNK_BYTES = 1 << 20


def atomic_write_bytes(path: Path | str, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader, or a crash, sees the old file or the new one and nothing between.

    The bytes go to a temporary file in the same folder, reach the disk, and are renamed; missing folders are made.

    Raises:
        OutputError: the folder or the file cannot be written.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            # mkstemp creates private files; results are meant to be shared under the user's usual mask.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}", value=error.strerror or error, remedy="check the path, its permissions and space"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path | str) -> Iterator[None]:
    """Hold the lock file ``path``, which the system gives back however the process ends.

    Raises:
        BusyError: another process holds it.
        OutputError: the file cannot be made.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {path}", value=error.strerror or error, remedy="check the path") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError("another process works on this run", value=Path(path).parent.name) from None
        yield
    finally:
        os.close(handle)


def is_held(path: Path | str) -> bool:
    """Whether a process holds the lock file ``path``."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def atomic_write_json(path: Path | str, content: Any) -> None:
    """Write ``content`` as indented UTF-8 JSON, atomically.

    Raises:
        OutputError: the folder or the file cannot be written.
        TypeError: the content is not JSON.
        ValueError: the content holds NaN or an infinity, which JSON has not.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: the file is missing, truncated or not JSON.
    """
    source = Path(path)
    try:
        return json.loads(source.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {source}", value=error.strerror or error, remedy="check the path") from error
    except ValueError as error:
        raise DataError(f"{source} is not complete JSON", value=error, remedy="write the file again") from error


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {path}", value=error.strerror or error, remedy="check the path") from error
    return digest.hexdigest()


def find_files(arguments: Iterable[str], name: str) -> list[Path]:
    """Files behind paths, folders and patterns, each once, in the order of the arguments.

    Args:
        arguments: files; folders, searched at any depth for files called ``name`` or, where there is none, flat for
            renamed ones of the same type; or patterns of either.
        name: file name to look for in folders.

    Raises:
        DataError: an argument leads to no file.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        matches = [file for path in _expand(Path(argument)) for file in _within(path, name)]
        if not matches:
            raise DataError(f"no {name} there", value=argument, remedy="name such files, or folders that hold them")
        found.update(dict.fromkeys(matches))
    return list(found)


def canonical_hash(content: Any) -> str:
    """Hexadecimal SHA-256 of JSON content, independent of the order of keys.

    Raises:
        ValueError: the content holds NaN or an infinity, which JSON has not.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def require_writable_folder(path: Path | str) -> Path:
    """Make ``path`` a folder that files can be written to, or fail before any work is lost.

    Raises:
        OutputError: it cannot be created, is a file, or refuses files.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"the output folder {folder} must be writable",
            value=error.strerror or error,
            remedy="choose another with output.root=FOLDER",
        ) from error
    return folder


def clear_scratch(folder: Path | str) -> None:
    """Remove the working folders in ``folder``, those of killed processes included."""
    for path in Path(folder).glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)


def _expand(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    anchor = Path(path.anchor or ".")
    return sorted(anchor.glob(str(path.relative_to(path.anchor))))


def _within(path: Path, name: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(path.rglob(name)) or sorted(path.glob(f"*{Path(name).suffix}"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot sync a folder are left to their own order."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
