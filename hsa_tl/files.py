"""Files that are whole or absent, and the user's cache folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where this user's caches stand: $XDG_CACHE_HOME/hsa-tl, by default ~/.cache/hsa-tl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hsa-tl"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside path, renamed at the end: a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: str | bytes) -> None:
    """All of data, as `atomic_file` writes it."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
