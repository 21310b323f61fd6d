"""Files that are whole or absent, folders that one process holds at a time, and the user's cache folder."""

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".writing-"


class InUse(ValueError):
    """Another process holds what this one needs for itself."""


@functools.cache
def _process_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hsa-tl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def writable(folder: Path, variable: str) -> Path:
    """The folder, or where it cannot be written one that goes with this process; a warning then names the variable."""
    try:
        if folder.parts[:1] == ("~",):  # expanduser knows no home of this user
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be written ({error.strerror}), so what is compiled or tuned is kept for this process "
            f"only; set {variable} to a folder that can",
            stacklevel=3,
        )
    return _process_folder() / folder.name


def cache_folder() -> Path:
    """Where this user's caches stand: $XDG_CACHE_HOME/hsa-tl, by default ~/.cache/hsa-tl, see `writable`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return writable(Path(base) / "hsa-tl", "XDG_CACHE_HOME")


def _beside(path: Path) -> Path:
    """A name in the same folder that no thread, process or container has."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")


def _replace_all(news: list[Path], targets: list[Path]) -> None:
    """Old files leave from the last to the first before new ones come: a kill leaves gaps, never old beside new."""
    moved: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        if len(targets) > 1:
            for target in reversed(targets):
                if target.exists():
                    moved.append((_beside(target), target))
                    os.rename(target, moved[-1][0])
        for new, target in zip(news, targets, strict=True):
            os.replace(new, target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink()
        for old, target in reversed(moved):
            with contextlib.suppress(FileNotFoundError):  # it is the one that could not leave
                os.rename(old, target)
        raise
    for old, _ in moved:
        old.unlink()


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write beside their paths: at the end all of them take their places, where anything fails none does.

    A file that vouches for others, such as a sidecar, comes last. Folders are made, a link's target is replaced and
    not the link, and a file that was there keeps its permissions.
    """
    targets = [Path(os.path.realpath(p)) for p in paths]
    news = [_beside(t) for t in targets]
    try:
        with contextlib.ExitStack() as stack:
            files = []
            for new, target in zip(news, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
                files.append(stack.enter_context(new.open("xb")))
                if target.exists():
                    new.chmod(stat.S_IMODE(target.stat().st_mode))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        _replace_all(news, targets)
    finally:
        for new in news:
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside path, renamed at the end: a reader finds the old file or the new one, never a part."""
    with atomic_files(path) as (file,):
        yield file


def write_together(files: dict[Path, str | bytes]) -> None:
    """Each file's data, as `atomic_files` writes them: all change or none."""
    with atomic_files(*files) as opened:
        for file, data in zip(opened, files.values(), strict=True):
            file.write(data.encode() if isinstance(data, str) else data)


def write_atomic(path: Path, data: str | bytes) -> None:
    """All of data, as `atomic_file` writes it."""
    write_together({path: data})


def sha256_of(path: Path) -> str:
    """The checksum of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """One process, and one thread of it, at a time; the lock is on path, a folder or a file, which stays.

    wait: for whoever holds it. InUse: somebody does, and wait is False. Where the file system has no locks, it warns.
    """
    import fcntl

    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    handle = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise InUse(f"{path} must be free, got one that another process holds") from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error.strerror}): use it from one process at a time", stacklevel=3)
    try:
        yield
    finally:
        os.close(handle)
