"""The file of a chunk memory: safetensors, streamed both ways, whole or absent, checked before anything is built."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hsa_tl.files import atomic_file
from hsa_tl.model.pages import PageCounts, pieces
from hsa_tl.validation import require, shape_of

FORMAT = "hsa_tl.memory.1"
NAMES = ("chunks", "page_table", "k", "v", "landmarks")
TYPES = {
    torch.int32: "I32", torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
BLOCK_BYTES = 64 << 20  # copied at once


@dataclass(frozen=True)
class MemorySpec:
    """Dims and dtype of a memory's entries.

    Args:
        batch (int): B, sequences.
        heads (int): H, key/value heads.
        head_dim (int): D.
        retrieval_heads (int): R.
        retrieval_dim (int): D_r.
        chunk_size (int): S. Default: 64.
        dtype (torch.dtype): of keys, values and landmarks. Default: torch.float32.
    """

    batch: int
    heads: int
    head_dim: int
    retrieval_heads: int
    retrieval_dim: int
    chunk_size: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(name == "dtype" or (type(value) is int and value >= 1), name, "be a positive int", repr(value))

    @property
    def page(self) -> tuple[int, int, int]:
        return self.chunk_size, self.heads, self.head_dim

    @property
    def landmark(self) -> tuple[int, int]:
        return self.retrieval_heads, self.retrieval_dim

    @classmethod
    def of(cls, config, batch: int, dtype: torch.dtype) -> "MemorySpec":
        """The spec of a ModelConfig."""
        c = config
        return cls(batch, c.kv_heads, c.head_dim, c.retrieval_heads, c.retrieval_dim, c.chunk_size, dtype)

    def check(self, k: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> None:
        """ValueError: what `PagedMemory.append` is given has another shape or dtype."""
        (S, H, D), C = self.page, len(landmarks)
        of_keys = [(C, S, H, D), (C * S, H, D)]
        marks = [(C, *self.landmark)]
        for name, x, shapes in (("landmarks", landmarks, marks), ("k", k, of_keys), ("v", v, of_keys)):
            require(tuple(x.shape) in shapes, name, f"have shape {list(shapes[0])}", shape_of(x))
            require(x.dtype == self.dtype, name, f"have dtype {self.dtype}", x.dtype)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")})

    @classmethod
    def from_json(cls, text: str) -> "MemorySpec":
        values = json.loads(text)
        return cls(**(values | {"dtype": getattr(torch, values["dtype"])}))


def _blocks(x: torch.Tensor) -> Sequence[torch.Tensor]:
    return x.split(max(1, BLOCK_BYTES // x[:1].nbytes)) if x.numel() else ()


def write(path: Path, tensors: dict[str, list[torch.Tensor]], format: str = FORMAT, **metadata: str) -> None:
    """A tensor is a list of parts, one behind the other. Memory: one block of rows at a time."""
    header, end = {"__metadata__": {"format": format} | metadata}, 0
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

    def __init__(self, path: Path, file, format: str, names: tuple[str, ...]):
        self.path, self.file, self.tensor = path, file, file.get_tensor
        self.metadata, self.names = file.metadata() or {}, set(file.keys())
        if (found := self.metadata.get("format", "no format")) != format:
            kind = "chunk memory" if format == FORMAT else "cache"
            raise ValueError(f"{path} must be a {kind} ({format}), got {found}")
        require(set(names) <= self.names, str(path), f"hold {', '.join(names)}", ", ".join(sorted(self.names)))

    def parse(self, name: str, parse: Callable[[str], object]) -> object:
        try:
            return parse(self.metadata[name])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} must say the dims of its memory: {error}") from None

    def spec(self, wanted: MemorySpec | None = None) -> MemorySpec:
        spec = self.parse("spec", MemorySpec.from_json)
        require(wanted in (None, spec), str(self.path), f"hold a memory of {wanted}", spec)
        return spec

    def shape(self, name: str) -> list[int]:
        return self.file.get_slice(name).get_shape()

    def _expect(self, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            found, kind = self.shape(name), self.file.get_slice(name).get_dtype()
            rule = f"hold {name} of shape {list(shape)} and type {TYPES[dtype]}"
            require(tuple(found) == shape and kind == TYPES[dtype], str(self.path), rule, f"{found} {kind}")

    def pages(self, spec: MemorySpec) -> list[torch.Tensor]:
        """The pages of each sequence of a PagedMemory of this spec."""
        self._expect(torch.int32, chunks=(spec.batch,))
        held, pages = self.tensor("chunks").tolist(), self.shape("k")[0]
        self._expect(torch.int32, page_table=(spec.batch, max(held)))
        rows = [row[:n].clone() for row, n in zip(self.tensor("page_table"), held, strict=True)]
        filled = [row[row != -1] for row in rows]  # the others were evicted
        whole = all(len(row.unique()) == len(row) and bool(((row >= 0) & (row < pages)).all()) for row in filled)
        if min(held) < 0 or not whole:
            raise ValueError(f"{self.path} must give each page to one chunk of a sequence, its page_table does not")
        page, landmarks = (pages, *spec.page), (max(held), spec.batch, *spec.landmark)
        self._expect(spec.dtype, k=page, v=page, landmarks=landmarks)
        if "mass" in self.names:
            self._expect(torch.float64, mass=(spec.batch, max(held)))
        return rows

    def fill(self, memory, rows: list[torch.Tensor]):
        """An empty PagedMemory with what the file holds; rows: what `pages` returned."""
        pages = torch.cat(rows)
        memory.counts = PageCounts(torch.bincount(pages[pages >= 0], minlength=self.shape("k")[0]).tolist())
        memory.reserve(len(memory.counts.references), max(map(len, rows)))
        landmarks = [memory.marks.transpose(0, 1)]
        for name, slabs in (("k", memory.k_slabs), ("v", memory.v_slabs), ("landmarks", landmarks)):
            source, start = self.file.get_slice(name), 0
            for block in (b for piece in pieces(slabs, 0, self.shape(name)[0]) for b in _blocks(piece)):
                block.copy_(source[start : start + len(block)])
                start += len(block)
        if memory.budget is not None and "mass" in self.names:
            mass = self.tensor("mass")
            memory.mass[:, : mass.shape[1]] = mass
        for sequence, row in enumerate(rows):
            memory.hold(sequence, 0, row)
            memory.bound(sequence, 0)
        return memory


@contextlib.contextmanager
def read(path: Path, format: str = FORMAT, names: tuple[str, ...] = NAMES) -> Iterator[Reader]:
    """ValueError: not a safetensors file, or a truncated one. OSError: it cannot be opened."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # a missing file is an OSError that names it
        pass
    try:
        with safe_open(path, framework="pt") as file:
            yield Reader(path, file, format, names)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def contents(memory) -> dict[str, list[torch.Tensor]]:
    """The tensors of a PagedMemory."""
    pages, longest = len(memory.counts.references), memory.longest
    mass = {} if memory.budget is None else {"mass": [memory.mass[:, :longest]]}
    return mass | {
        "chunks": [torch.tensor(memory.held, dtype=torch.int32)],
        "page_table": [memory.host_table[:, :longest]],
        "k": pieces(memory.k_slabs, 0, pages),
        "v": pieces(memory.v_slabs, 0, pages),
        "landmarks": [memory.marks[:, :longest].transpose(0, 1)],
    }
