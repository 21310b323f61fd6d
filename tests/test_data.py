"""Token files: what is written is read back, and damage is named."""

import io
import json
import os
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from hsa_tl.cli import app
from hsa_tl.model import data, sources
from hsa_tl.model.data import ByteTokenizer, FileTokenizer, TokenFile, distinct, prepare
from hsa_tl.model.documents import LONG, cut, text_files
from hsa_tl.model.documents import documents as texts_of


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    for i in range(60):
        file = root / f"part{i % 7}" / f"file{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"file {i}: " + "naïve words and more of them. " * (5 + i))
    (root / "image.bin").write_bytes(b"\0\1\2" * 100)
    return root


@pytest.fixture
def file(folder, tmp_path):
    return prepare([folder], tmp_path / "data", held_out=0.3)["train"]


def documents(file: TokenFile) -> list[bytes]:
    """Split at the end tokens, by hand."""
    tokens = np.asarray(file.tokens)
    ends = np.flatnonzero(tokens == file.sidecar.end)
    return [bytes(tokens[a:b].tolist()) for a, b in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def test_every_text_file_is_whole_in_one_split(folder, tmp_path):
    files = prepare([folder], tmp_path / "data", held_out=0.3)
    texts = [documents(f) for f in files.values()]
    assert all(len(t) == f.sidecar.documents >= 5 for t, f in zip(texts, files.values(), strict=True))
    assert sorted(texts[0] + texts[1]) == sorted(f.read_bytes() for f in folder.rglob("*.txt"))
    assert not set(texts[0]) & set(texts[1])
    for f in files.values():
        f.verify()


def test_a_new_file_moves_no_other(folder, tmp_path):
    before = documents(prepare([folder], tmp_path / "a", held_out=0.3)["train"])
    (folder / "aaa.txt").write_text("new")
    after = documents(prepare([folder], tmp_path / "b", held_out=0.3)["train"])
    assert [d for d in after if d != b"new"] == before


def test_the_default_corpus_is_the_standard_library():
    names = [f.name for f in text_files(None, data.is_output)]
    assert {"json/decoder.py", "argparse.py"} < set(names) and names == sorted(names)
    assert not any("test" in n.split("/") or "site-packages" in n for n in names)
    share = sum(data.split_of(n, 0.1) == "held_out" for n in names) / len(names)
    assert 0.05 < share < 0.15


def test_damage_is_named(file):
    raw = file.path.read_bytes()
    file.path.write_bytes(raw[:-2])
    with pytest.raises(ValueError, match=f"must hold {len(raw)} bytes as its sidecar says, got {len(raw) - 2}"):
        TokenFile(file.path)
    file.path.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    with pytest.raises(ValueError, match="must have sha256"):
        TokenFile(file.path).verify()
    side = data.sidecar_path(file.path)
    fields = json.loads(side.read_text())
    for broken, match in ((fields | {"format": 9}, "must have format 1, got 9"), ({"tokens": 3}, "must describe")):
        side.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=match):
            TokenFile(file.path)
    side.unlink()
    with pytest.raises(OSError, match=r"train.bin must be a token file of hsa-tl prepare, got no train.bin.json"):
        TokenFile(file.path)


def test_a_failed_prepare_leaves_the_old_file(file, folder):
    class Broken(ByteTokenizer):
        def encode_all(self, texts):
            if texts[0].startswith(b"file 30"):
                raise RuntimeError("the disk is gone")
            return super().encode_all(texts)

    before = file.path.read_bytes()
    with pytest.raises(RuntimeError):
        prepare([folder], file.path.parent, Broken(), held_out=0.3)
    assert file.path.read_bytes() == before and len(list(file.path.parent.iterdir())) == 4


def test_a_failed_prepare_leaves_all_old_files(folder, tmp_path, monkeypatch):
    """Where only the second split fails: a new train.bin beside the old held_out.bin would train on held-out text."""
    out = tmp_path / "data"
    prepare([folder], out, held_out=0.5)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="held_out must have at least one document, got none of the 60 in"):
        prepare([folder], out, held_out=1e-9)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and len(before) == 4


@pytest.mark.parametrize("inside", (".", "out"))
def test_prepare_never_reads_what_it_wrote(folder, inside):
    first = prepare([folder], folder / inside, held_out=0.3)
    other = prepare([folder], folder / "another", held_out=0.3)
    again = prepare([folder], folder / inside, held_out=0.3)
    assert first["train"].sidecar == other["train"].sidecar == again["train"].sidecar


@pytest.mark.parametrize("held_out", (0.1, 0.5, 0.9))
def test_of_one_file_the_end_is_held_out(tmp_path, held_out):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i} of it, naïve\n" for i in range(400)))
    files = prepare([book], tmp_path / "data", held_out=held_out)
    texts = [b"".join(documents(f)) for f in files.values()]
    assert b"".join(texts) == book.read_bytes() and texts[1].startswith(b"line")
    assert len(texts[1]) / len(book.read_bytes()) == pytest.approx(held_out, abs=0.1)
    with pytest.raises(ValueError, match=r"must be text, got .*train.bin, which hsa-tl prepare wrote"):
        prepare([tmp_path / "data/train.bin"], tmp_path / "other")


@pytest.mark.parametrize(
    "text", ("a b\n\nc d\ne " * 9, "naïve" * 30, "ïï" * 50, "€" * 40, "aa" + "€" * 40, "a" * 99), ids=len
)
def test_long_text_is_cut_between_characters(text):
    parts = list(cut(io.BytesIO(text.encode()), 16))
    assert b"".join(parts) == text.encode() and max(map(len, parts)) <= 16 and len(parts) > 5
    assert [p.decode() for p in parts]
    assert "\n" not in text or all(p.endswith(b"\n") for p in parts[:-1])


def test_a_file_of_a_few_bytes_is_split(tmp_path):
    """Into parts of a byte, where a character may have several."""
    (tmp_path / "x.txt").write_text("ïï€")
    files = prepare([tmp_path / "x.txt"], tmp_path / "data")
    assert b"".join(x for f in files.values() for x in documents(f)) == "ïï€".encode()


def test_a_long_binary_file_is_left_out_whole(tmp_path):
    """Wherever its first byte of 0 is."""
    (tmp_path / "x.bin").write_bytes(b"header " * (LONG // 6) + b"\0")
    (tmp_path / "x.txt").write_bytes(b"words " * (LONG // 5))
    found = [x for file in text_files([tmp_path], data.is_output) for x in texts_of(file, "text")]
    assert {name for name, _ in found} == {"x.txt"} and len(b"".join(text for _, text in found)) == 6 * (LONG // 5)


def test_a_part_is_held_out_by_its_middle(tmp_path):
    """The second of three equal ones has it at a half."""
    book = tmp_path / "book.txt"
    book.write_text(("a" * 99 + "\n") * 3)
    for held_out, sizes in ((0.47, [200, 100]), (0.53, [100, 200])):
        files = prepare([book], tmp_path / str(held_out), held_out=held_out)
        assert [len(b"".join(documents(f))) for f in files.values()] == sizes


def rows_of(tmp_path, kind):
    texts = [f"document {i}, naïve" for i in range(40)]
    if kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"id": i, "body": t}) for i, t in enumerate(texts)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"body": texts}), tmp_path / "rows.parquet")
    return tmp_path / f"rows.{kind}", [t.encode() for t in texts]


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
@pytest.mark.parametrize("alone", (True, False))
def test_rows_are_documents(tmp_path, kind, alone):
    file, texts = rows_of(tmp_path, kind)
    files = prepare([file if alone else tmp_path], tmp_path / "out", held_out=0.3, field="body")
    found = [documents(f) for f in files.values()]
    assert sorted(found[0] + found[1]) == sorted(texts) and min(map(len, found)) > 3
    with pytest.raises(ValueError, match=r"rows.*must have (text in the field|the column) 'text', got (id, )?body"):
        prepare([file], tmp_path / "out")


def test_wrong_rows_are_named(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    for text, words in (('{"text": "a"}\n{', "line 2, must be JSON"), ("3", "line 1, must have text"),
                        ('{"text": 3}', "line 1, must have text in the field 'text', got int")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            prepare([file], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"a.parquet needs the package pyarrow: pip install 'hsa-tl\[parquet\]'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_links_are_followed_once(folder, tmp_path, monkeypatch):
    """Into folders too, and no folder twice; what has two names is in one split."""
    walk = os.walk

    def counted(*args, **options):
        for i, step in enumerate(walk(*args, **options)):
            assert i < 20, "a link that leads back is followed again"
            yield step

    monkeypatch.setattr(os, "walk", counted)
    (tmp_path / "linked").symlink_to(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "more").symlink_to(folder)
    (folder / "part0/back").symlink_to(other)
    for i in range(60):
        (other / f"again{i}.txt").symlink_to(folder / f"part{i % 7}" / f"file{i}.txt")
    for given in ([tmp_path / "linked"], [other], [folder, folder]):
        found = [documents(f) for f in prepare(given, tmp_path / "out", held_out=0.3).values()]
        assert sorted(found[0] + found[1]) == sorted(f.read_bytes() for f in folder.glob("*/*.txt"))
    target = tmp_path / "disk"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    prepare([folder], tmp_path / "link", held_out=0.3)
    assert (tmp_path / "link").is_symlink() and len(list(target.iterdir())) == 4


@pytest.mark.parametrize("held_out", (0.0, 1.0))
def test_no_split_is_a_clear_error(folder, tmp_path, held_out):
    with pytest.raises(ValueError, match="held_out must lie in"):
        prepare([folder], tmp_path / "x", held_out=held_out)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"must have at least one document, got none of the 1 in [^:]*$"):
        prepare([tmp_path / "one"], tmp_path / "x", held_out=0.5)


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["naïve words and more of them. The code of it is 1234."], trainer)
    inner.enable_truncation(8)
    inner.enable_padding(length=16)  # some files have these, of the batches they were trained with
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file(folder, tmp_path, tokenizer_file):
    tokenizer = FileTokenizer(tokenizer_file)
    file = prepare([folder], tmp_path / "data", tokenizer, held_out=0.3)["train"]
    assert tokenizer.special("<|endoftext|>") == tokenizer.end and tokenizer.special("more") is None
    assert len(tokenizer.encode("of")) < 8 < len(tokenizer.encode("of " * 9))
    first = np.asarray(file.tokens[: np.flatnonzero(file.tokens == tokenizer.end)[0]])
    text = tokenizer.decode(first).strip()
    assert text in {f.read_text().strip() for f in folder.rglob("*.txt")} and len(first) < len(text.encode())
    with pytest.raises(ValueError, match=r"must be of the tokenizer bytes, got tokenizer\.json"):
        sources.TextSource(32, 0, path=file.path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a Hugging Face tokenizer.json, got .*bad.json"):
        FileTokenizer(tmp_path / "bad.json")


def test_a_tokenizer_whose_ids_have_gaps(tmp_path):
    """The vocabulary reaches to the last id, as some of OpenAI's do."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1 << 16}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 9)
    file = prepare([tmp_path / "a.jsonl"], tmp_path / "data", tokenizer, held_out=0.5)["train"]
    assert file.tokens[:2].tolist() == [0, 1 << 16] and file.sidecar.vocab_size == tokenizer.vocab_size == (1 << 16) + 1


def test_short_documents_are_left_out(folder, tmp_path):
    every = {s: documents(f) for s, f in prepare([folder], tmp_path / "all").items()}
    long = {s: documents(f) for s, f in prepare([folder], tmp_path / "long", least=1000).items()}
    assert long == {s: [x for x in found if len(x) >= 1000] for s, found in every.items()}
    assert all(0 < len(long[s]) < len(every[s]) for s in long)
    result = CliRunner().invoke(app, ["prepare", str(folder), "--out", str(tmp_path / "x"), "--least", "8k"])
    assert result.exit_code == 2 and "none of the 0 of 8192 tokens or more in" in " ".join(result.output.split())


@pytest.mark.parametrize("below, n", ((10, 10), (96, 24), (1 << 17, 1 << 15), (1 << 62, 5000), (1 << 20, 1 << 18)))
def test_distinct(below, n):
    found = distinct(np.random.default_rng(0), below, n)
    assert len(np.unique(found)) == len(found) == n and found.min() >= 0 and found.max() < below


def test_prepare_command(folder, tmp_path):
    result = CliRunner().invoke(app, ["prepare", str(folder), "--out", str(tmp_path / "d"), "--held-out", "0.3"])
    assert result.exit_code == 0 and "held_out" in result.output, result.output
    TokenFile(tmp_path / "d/held_out.bin").verify()
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "none"), "--out", str(tmp_path / "d")])
    assert result.exit_code == 2 and "must be a folder or a file" in result.output


def test_bytes_are_ints():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == tokenizer.encode(b"a\xc3\xa9") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 256]) == "aé" and tokenizer.decode([]) == ""
    assert all(type(i) is int for i in tokenizer.encode("a"))
