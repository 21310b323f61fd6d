"""Files that are whole or absent."""

import os
from pathlib import Path


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes beside path, then renames: a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
