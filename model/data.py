"""Token files: memory-mapped tokens beside a sidecar that proves them, tokenizers, and where text comes from.

    files = prepare(None, Path("out/data"))          # Python's standard library, one token a byte
    files["train"].tokens[:10]                       # numpy.memmap, uint16

An end-of-document token follows each document.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hsa_tl.files import TEMPORARY, atomic_files, locked, sha256_of, write_atomic
from hsa_tl.model import documents
from hsa_tl.model.documents import TextFile
from hsa_tl.validation import require

FORMAT = 1
SPLITS = ("train", "held_out")
KEPT, CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTE_END = 256  # end of document of the byte-level tokenizer


class Tokenizer:
    """Text to token ids and back. `end` is the id that ends a document, None without one; `begin` begins a prompt."""

    name: str
    vocab_size: int
    end: int | None
    begin: tuple[int, ...] = ()

    def encode_all(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        raise NotImplementedError

    def encode(self, text: str | bytes) -> list[int]:
        return self.encode_all([text])[0].tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        raise NotImplementedError

    def special(self, text: str) -> int | None:
        """The id of the special token of that name, which `decode` leaves out; None: there is none."""
        return None

    def fast(self):
        """The same ids as a tokenizers.Tokenizer, which transformers reads. ImportError: no `tokenizers`."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8, ids 0 to 255; 256 ends a document."""

    name, vocab_size, end = "bytes", 257, BYTE_END

    def encode_all(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        data = (t.encode() if isinstance(t, str) else t for t in texts)
        return [np.frombuffer(x, np.uint8).astype(np.uint16) for x in data]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def fast(self):
        from tokenizers import Tokenizer, decoders, models

        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
        made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        made.add_special_tokens(["<|endoftext|>"])
        return made


def _special_tokens(config: Path) -> dict[str, str]:
    """bos_token and eos_token of a tokenizer_config.json; none where there is no such file."""
    values = json.loads(config.read_text()) if config.is_file() else {}
    named = {name: values.get(name) for name in ("bos_token", "eos_token")}
    return {name: x["content"] if isinstance(x, dict) else x for name, x in named.items() if x is not None}


class FileTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, read by the `tokenizers` library; without special tokens around a text.

    end: the id of the eos_token of the tokenizer_config.json beside it, without that of the first of <|endoftext|>,
    </s>, <eos> that it has. begin: of its bos_token there, if that is put before every text. ImportError: no
    `tokenizers`. ValueError: not such a file, or no end token.
    """

    def __init__(self, path: Path | str):
        try:
            from tokenizers import Tokenizer as HFTokenizer
        except ImportError:
            raise ImportError("a tokenizer file needs the tokenizers library: pip install 'hsa-tl[train]'") from None
        self.path = Path(path)
        data = self.path.read_bytes()
        try:
            self.inner = HFTokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer must be a Hugging Face tokenizer.json, got {path}: {error}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.name = f"{self.path.name} {hashlib.sha256(data).hexdigest()}"
        self.vocab_size = max(self.inner.get_vocab().values(), default=-1) + 1  # some files leave ids out
        special = _special_tokens(self.path.with_name(CONFIG))
        names = (special.get("eos_token"), "<|endoftext|>", "</s>", "<eos>")
        ends = (self.inner.token_to_id(t) for t in names if t is not None)
        self.end = next((i for i in ends if i is not None), None)
        require(self.end is not None, "tokenizer", "have <|endoftext|>, </s> or <eos>", path)
        around = self.inner.encode("").ids
        if "bos_token" in special and around[:1] == [self.inner.token_to_id(special["bos_token"])]:
            self.begin = tuple(around[:1])
        self.dtype = token_dtype(self.vocab_size)

    def encode_all(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        texts = [t.decode(errors="replace") if isinstance(t, bytes) else t for t in texts]
        return [np.array(e.ids, self.dtype) for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.inner.decode(np.asarray(tokens).tolist())

    def special(self, text: str) -> int | None:
        return self.inner.token_to_id(text)

    def fast(self):
        return self.inner

    def keep(self, folder: Path) -> None:
        """Copies its files into a folder, where FileTokenizer(folder / KEPT) is then the same."""
        for name, file in ((CONFIG, self.path.with_name(CONFIG)), (KEPT, self.path)):
            if file.is_file():
                write_atomic(folder / name, file.read_bytes())
            else:
                (folder / name).unlink(missing_ok=True)


def make_tokenizer(path: Path | str | None = None) -> Tokenizer:
    """The tokenizer file at path, by default one token a byte."""
    return ByteTokenizer() if path is None else FileTokenizer(path)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, uint32 elsewhere."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Sidecar:
    """What a token file must be; written beside it as JSON."""

    tokens: int
    documents: int
    dtype: str
    vocab_size: int
    tokenizer: str
    end: int
    sha256: str
    format: int = FORMAT


class TokenFile:
    """A file of tokens, memory-mapped read-only: `tokens` [n] uint16 or uint32, little-endian.

    Opening checks the length against the sidecar, `verify` also the checksum. OSError: it cannot be read. ValueError:
    no readable sidecar, a truncated or a longer file, another checksum.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.sidecar = read_sidecar(self.path)
        require(self.sidecar.format == FORMAT, path, f"have format {FORMAT}", self.sidecar.format)
        size, want = self.path.stat().st_size, self.sidecar.tokens * np.dtype(self.sidecar.dtype).itemsize
        require(size == want, path, f"hold {want} bytes as its sidecar says", f"{size}: prepare it again")
        self.tokens = np.memmap(self.path, np.dtype(self.sidecar.dtype).newbyteorder("<"), "r")

    def __len__(self) -> int:
        return self.sidecar.tokens

    def verify(self) -> None:
        """Reads the whole file. ValueError if its checksum is not the sidecar's."""
        if (got := sha256_of(self.path)) != self.sidecar.sha256:
            raise ValueError(f"{self.path} must have sha256 {self.sidecar.sha256}, got {got}: prepare it again")


def tokens_of(path: Path | str, tokenizer: Tokenizer) -> TokenFile:
    """The token file at path. ValueError: its tokens are another tokenizer's."""
    file, name = TokenFile(path), tokenizer.name
    # By the checksum at the end: a run keeps its tokenizer's file under another name.
    same = file.sidecar.tokenizer.split()[-1] == name.split()[-1]
    require(same, path, f"be of the tokenizer {name}", file.sidecar.tokenizer)
    return file


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar:
    """What must be in the token file. ValueError: not a sidecar. OSError: it cannot be read."""
    try:
        return Sidecar(**json.loads(sidecar_path(path).read_text()))
    except FileNotFoundError:
        rule = "be a token file of hsa-tl prepare"
        raise FileNotFoundError(f"{path} must {rule}, got no {sidecar_path(path).name} beside it") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{sidecar_path(path)} must describe a token file, got {error}") from None


class _Writer:
    """Tokens of documents into a file, and what its sidecar says of them."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, least: int):
        self.least, self.file, self.tokenizer, self.dtype = least, file, tokenizer, token_dtype(tokenizer.vocab_size)
        self.end = np.array([tokenizer.end], self.dtype)
        self.digest, self.tokens, self.documents = hashlib.sha256(), 0, 0

    def add(self, document: str | bytes) -> None:
        data = np.concatenate([self.tokenizer.encode_all([document])[0].astype(self.dtype), self.end])
        if len(data) <= self.least:
            return
        raw = data.astype(self.dtype.newbyteorder("<")).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens, self.documents = self.tokens + len(data), self.documents + 1

    def sidecar(self, name: str, of: str) -> bytes:
        """Its text. ValueError: there was no document; of: what there were."""
        require(self.documents > 0, name, "have at least one document", f"none{of}")
        t, digest = self.tokenizer, self.digest.hexdigest()
        sidecar = Sidecar(self.tokens, self.documents, self.dtype.name, t.vocab_size, t.name, t.end, digest)
        return (json.dumps(asdict(sidecar), indent=1) + "\n").encode()


def is_output(path: Path) -> bool:
    """Whether `prepare` wrote the file, or is writing it."""
    tokens = path.with_suffix("") if path.suffix == ".json" else path
    try:
        return path.name.startswith(TEMPORARY) or (tokens.is_file() and bool(read_sidecar(tokens)))
    except (OSError, ValueError):
        return False


def split_of(name: str, held_out: float) -> str:
    """Which split a file belongs to: by a checksum of its name, so that other files coming or going change nothing."""
    return SPLITS[zlib.crc32(name.encode()) % 10000 < held_out * 10000]


def _one_file(file: TextFile, held_out: float) -> Iterator[tuple[str, bytes]]:
    """(split, text): the end of a file of text is held out."""
    size = file.path.stat().st_size
    long = max(1, min(documents.LONG, int(size * min(held_out, 1 - held_out))))
    done = 0
    with file.path.open("rb") as opened:
        for part in documents.cut(opened, long):
            require(b"\0" not in part, "a source of text", "be text", f"{file.path}, which has a byte of 0")
            middle, done = done + len(part) / 2, done + len(part)
            yield SPLITS[middle > size * (1 - held_out) or done == size], part


def prepare(
    sources: list[Path] | None, out: Path, tokenizer: Tokenizer | None = None, *, held_out: float = 0.1,
    field: str = "text", least: int = 1, progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TokenFile]:  # fmt: skip
    """Writes out/train.bin and out/held_out.bin with their sidecars: no document is in both.

    What is split how says `hsa-tl prepare`; binary files are left out. The four files change together, or none does.
    sources: folders and files, by default Python's standard library. held_out: share of the files in (0, 1). field: of
    the rows. least: tokens of a document; shorter ones are left out. progress: called with files read and their total.
    ValueError: no text, or none for one of the splits; a row without the field. ImportError: Parquet without pyarrow.
    """
    require(0 < held_out < 1, "held_out", "lie in (0, 1)", held_out)
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    files = documents.text_files(sources, is_output)
    alone = sources is not None and len(files) == len(sources) == 1 and sources[0].is_file()
    paths = [out / f"{split}.bin" for split in SPLITS]
    out.mkdir(parents=True, exist_ok=True)
    # Two calls at once would each replace what the other has just moved.
    with locked(out), atomic_files(*paths, *map(sidecar_path, paths)) as opened:
        writers = {split: _Writer(file, tokenizer, least) for split, file in zip(SPLITS, opened[:2], strict=True)}
        for done, file in enumerate(files, 1):
            if alone and file.path.suffix.lower() not in documents.ROWS:
                found = _one_file(file, held_out)
            else:
                found = ((split_of(name, held_out), text) for name, text in documents.documents(file, field))
            for split, text in found:
                writers[split].add(text)
                progress(done, len(files))
        where = ", ".join(map(str, sources)) if sources else "the standard library"
        total = sum(w.documents for w in writers.values())
        of = f" of the {total}" + (f" of {least} tokens or more" if least > 1 else "") + f" in {where}"
        of += ": take another held_out" if total > 1 else ""
        for (split, writer), sidecar in zip(writers.items(), opened[2:], strict=True):
            sidecar.write(writer.sidecar(split, of))
    return {split: TokenFile(path) for split, path in zip(SPLITS, paths, strict=True)}


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens [T] and the spans of the answers in them [A, 2]: an answer's first token and the one after its last.

    The answer's first token is to be predicted from the token before it, and so on. needles: the spans [A, 2] that the
    answers are read from, where a task knows them.
    """

    tokens: np.ndarray
    answers: np.ndarray
    needles: np.ndarray | None = None

    def unfinished(self, chunk_size: int) -> np.ndarray:
        """[A] bool: whether an answer's needle ends in a chunk that is not whole yet where the answer is asked for, so
        that HSA cannot retrieve it. ValueError: the task knows no needles."""
        require(self.needles is not None, "needles", "be known", "a sample of another task")
        return self.needles[:, 1] > (self.answers[:, 0] - 1) // chunk_size * chunk_size

    def targets(self) -> np.ndarray:
        """Positions [P] of all tokens of all answers, ascending."""
        return np.concatenate([np.arange(a, b) for a, b in self.answers])


def distinct(rng: np.random.Generator, below: int, n: int) -> np.ndarray:
    """n distinct integers of [0, below) in random order."""
    if below < 4 * n or below <= 1 << 16:
        return rng.permutation(below)[:n]
    found = np.unique(rng.integers(0, below, n + n // 2 + 64))
    return rng.permutation(found)[:n]
