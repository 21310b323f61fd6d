"""What `hsa-tl prepare` reads: text files, JSON lines and Parquet, in folders or alone, as documents.

A document is a row, or a file of text; a long file is several, cut at the ends of paragraphs or lines.
"""

import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

LONG = 1 << 20  # bytes of text in a document at most
NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
ROWS = (".jsonl", ".ndjson", ".parquet")  # files of many documents


class TextFile(NamedTuple):
    name: str  # relative to its folder
    path: Path


def text_files(sources: list[Path] | None, skip: Callable[[Path], bool]) -> list[TextFile]:
    """The files, and those in the folders in sorted order; by default the *.py files of Python's standard library.

    Links are followed; a file that is there by several names is taken once. skip: what is no text. ValueError: a source
    that is not there or that skip names.
    """
    if sources is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [TextFile(f.relative_to(root).as_posix(), f) for f in root.rglob("*.py")]
        return sorted(f for f in found if not NOT_CORPUS & set(f.name.split("/")))
    files: dict[str, TextFile] = {}
    for source in sources:
        if not source.is_file() and not source.is_dir():
            raise ValueError(f"a source of text must be a folder or a file, got {source}")
        if source.is_file() and skip(source):
            raise ValueError(f"a source of text must be text, got {source}, which hsa-tl prepare wrote")
        for file in [TextFile(source.name, source)] if source.is_file() else sorted(_walk(source)):
            if not skip(file.path):
                files.setdefault(os.path.realpath(file.path), file)
    return list(files.values())


def _walk(folder: Path) -> Iterator[TextFile]:
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (Path(root, name) for name in names):
            if path.is_file():
                yield TextFile(path.relative_to(folder).as_posix(), path)


def documents(file: TextFile, field: str) -> Iterator[tuple[str, bytes]]:
    """(name, text) of each document that is not empty; parts of a text file have its name. A binary file has none.

    field: of the rows. ValueError: a row without it, or not JSON. ImportError: no pyarrow.
    """
    suffix = file.path.suffix.lower()
    if suffix in ROWS:
        rows = _parquet(file.path, field) if suffix == ".parquet" else json_lines(file.path, field)
        for i, text in enumerate(rows):
            if text:
                yield f"{file.name}#{i}", text.encode()
        return
    with file.path.open("rb") as opened:
        if any(b"\0" in block for block in iter(lambda: opened.read(LONG), b"")):
            return
        opened.seek(0)
        for part in cut(opened, LONG):
            yield file.name, part


def cut(file: BinaryIO, size: int) -> Iterator[bytes]:
    """All of the file in parts of at most size bytes: to the end of a paragraph, a line, a word or a character."""
    rest = b""
    while block := file.read(size - len(rest)):
        rest += block
        if len(rest) == size:
            at = _end(rest)
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def _end(text: bytes) -> int:
    for mark in (b"\n\n", b"\n", b" "):
        if (at := text.rfind(mark, len(text) // 2)) >= 0:
            return at + len(mark)
    # Before the last character, of which the rest may be missing.
    return next((i for i in range(len(text) - 1, max(len(text) - 4, 0), -1) if text[i] >= 0xC0), len(text))


def json_lines(path: Path, field: str) -> Iterator[str]:
    """The text in that field of each line. ValueError: a line without it, or not JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, must be JSON, got {error}") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                unnamed = isinstance(row, dict) and field not in row
                got = ", ".join(row) if unnamed else type(text if isinstance(row, dict) else row).__name__
                raise ValueError(f"{path}, line {number}, must have text in the field {field!r}, got {got}")
            yield text.encode(errors="replace").decode()  # JSON may hold half of a character


def _parquet(path: Path, field: str) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs the package pyarrow: pip install 'hsa-tl[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in (names := file.schema_arrow.names):
                raise ValueError(f"{path} must have the column {field!r}, got {', '.join(names)}")
            for batch in file.iter_batches(columns=[field]):
                texts = batch.column(0).to_pylist()
                if wrong := [x for x in texts if x is not None and not isinstance(x, str)]:
                    raise ValueError(f"{path} must have text in the column {field!r}, got {type(wrong[0]).__name__}")
                yield from texts
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} must be a Parquet file, got {error}") from None
