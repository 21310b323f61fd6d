"""The file of a chunk memory: safetensors, streamed both ways, whole or absent, checked before anything is built."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hsa_tl.files import atomic_file

FORMAT = "hsa_tl.memory.1"
NAMES = ("chunks", "page_table", "k", "v", "landmarks")
TYPES = {
    torch.int32: "I32", torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
BLOCK_BYTES = 64 << 20  # copied at once


def _blocks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, BLOCK_BYTES // max(1, x[:1].nbytes))
    for i in range(0, len(x), rows):
        yield x[i : i + rows]


def write(path: Path, spec: str, tensors: dict[str, list[torch.Tensor]]) -> None:
    """A tensor is a list of parts, one behind the other. Memory: one block of rows at a time."""
    header, end = {"__metadata__": {"format": FORMAT, "spec": spec}}, 0
    for name, parts in tensors.items():
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        begin, end = end, end + sum(x.nbytes for x in parts)
        header[name] = {"dtype": TYPES[parts[0].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parts in tensors.values():
            for block in (b for part in parts for b in _blocks(part)):
                file.write(memoryview(block.cpu().contiguous().flatten().view(torch.uint8).numpy()))


class Reader:
    """Tensors of an open file; every method raises ValueError where the file is not what it must be."""

    def __init__(self, path: Path, file):
        self.path, self.file = path, file
        self.metadata = file.metadata() or {}
        if self.metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} must be a chunk memory ({FORMAT}), got {self.metadata.get('format', 'no format')}"
            )
        if set(file.keys()) != set(NAMES):
            raise ValueError(f"{path} must hold {', '.join(NAMES)}, got {', '.join(sorted(file.keys()))}")

    def spec(self, parse: Callable[[str], object]) -> object:
        try:
            return parse(self.metadata["spec"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} must say the dims of its memory: {error}") from None

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        found = self.file.get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() != TYPES[dtype]:
            rule = f"hold {name} of shape {list(shape)} and type {TYPES[dtype]}"
            raise ValueError(f"{self.path} must {rule}, got {list(found.get_shape())} {found.get_dtype()}")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.expect(name, shape, dtype)
        return self.file.get_tensor(name).clone()

    def into(self, name: str, out: torch.Tensor) -> None:
        """The tensor's rows into the first of out's."""
        rows = self.file.get_slice(name)
        n = rows.get_shape()[0]
        start = 0
        for block in _blocks(out[:n]):
            block.copy_(rows[start : start + len(block)])
            start += len(block)


@contextlib.contextmanager
def read(path: Path) -> Iterator[Reader]:
    """ValueError: not a safetensors file, or a truncated one. OSError: it cannot be opened."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # a missing file is an OSError that names it
        pass
    try:
        with safe_open(path, framework="pt") as file:
            yield Reader(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None
