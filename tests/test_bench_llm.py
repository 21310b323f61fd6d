"""The check of a converted model against its source: contexts hold what is asked for, and answers count as they are."""

import json
import sys

import pytest
import torch
from test_convert import source
from tiers import prove

from hsa_tl.bench import llm
from hsa_tl.model import load
from hsa_tl.model.convert import convert
from hsa_tl.model.data import ByteTokenizer


def test_contexts_hold_the_code_where_it_is_said():
    contexts = llm.make_contexts(ByteTokenizer(), 4096, 4, 2)
    depths, said = [], "The secret code of the lantern is "
    for tokens, asked, digits in contexts:
        text = ByteTokenizer().decode(tokens)
        code = text[-digits:]
        assert len(tokens) == 4096 and digits == 5 and code.isdecimal() and text.count(f"is {code}") == 2
        assert text[-asked:] == f"\n\n{said}{code}"
        depths.append(text.index(f"is {code}. Remember it."))
    assert depths[1] < depths[3] < depths[0] < depths[2] < 4096 - llm.OPTIONS["window"] and depths[1] < 1000
    longer = llm.make_contexts(ByteTokenizer(), 8192, 4, 2)
    ends = [[x.tokens[-llm.JUDGED - x.asked : -x.asked] for x in found] for found in (contexts, longer)]
    assert ends[0] == ends[1] and ends[0][0] == ends[0][1] != ends[0][2] == ends[0][3]


@pytest.mark.parametrize("length", [800, llm.LONGEST + 1])
def test_contexts_of_no_such_length_are_refused(length):
    with pytest.raises(ValueError, match=f"length must lie in .*got {length}"):
        llm.make_contexts(ByteTokenizer(), length, 1, 1)
    for number, haystacks in ((2, 0), (2, 3), (0, 0)):
        with pytest.raises(ValueError, match=rf"haystacks must lie in \[1, {number}\], got {haystacks}"):
            llm.make_contexts(ByteTokenizer(), 2048, number, haystacks)


def test_a_reader_reads_what_differs():
    contexts, held, counts = llm.make_contexts(ByteTokenizer(), 4096, 4, 2), [], []

    def forward(ids, cache, keep):
        held.extend(ids[0].tolist())
        return torch.zeros(keep, 257)

    def take_back(cache, n):
        del held[-n:]

    reader = llm.Reader(forward, None, take_back)
    for tokens, asked, _ in contexts:
        assert reader.read(tokens, asked).shape == (asked, 257) and held == tokens
        counts.append(reader.count)
    assert counts[0] == 4096 and counts[1] - counts[0] < 4096 and counts[2] - counts[1] > 4000
    assert reader.read(contexts[-1].tokens, 7).shape == (7, 257) and reader.count == counts[-1] + 7  # the same again


def test_right_is_every_digit():
    contexts = llm.make_contexts(ByteTokenizer(), 2048, 2, 2)
    wrong, held = contexts[1].tokens[-3], []

    def forward(ids, cache, keep):
        """Certain of the next token, but for one digit of the second context."""
        held.extend(ids[0].tolist())
        context = next(x for x in contexts if x.tokens == held)
        after = torch.tensor([*held[1:], held[-1]])
        if context is contexts[1]:
            after[-4] = (wrong + 1) % 257
        return torch.nn.functional.one_hot(after, 257)[-keep:] * 50.0

    def take_back(cache, n):
        del held[-n:]

    first, certain = llm.ask(llm.Reader(forward, None, take_back), contexts)
    held.clear()
    (resumed,) = llm.ask(llm.Reader(forward, None, take_back), contexts, first)
    assert first["contexts"] == 1 and {**resumed, "tokens": 0, "seconds": 0} == {**certain, "tokens": 0, "seconds": 0}
    assert certain.pop("seconds") >= 0 and certain.pop("losses") == pytest.approx([0, 0])
    assert certain.pop("perplexity") == pytest.approx(1.0) and 2048 < certain.pop("tokens") <= 4096
    assert certain == {"right": 1, "contexts": 2, "found": [True, False]}
    chance = llm.Reader(lambda ids, cache, keep: torch.zeros(keep, 257), None, lambda cache, n: 0)
    *_, uniform = llm.ask(chance, contexts)
    assert uniform["right"] == 0 and uniform["perplexity"] == pytest.approx(257, rel=1e-4)


def test_readers_give_what_whole_models_give(tmp_path, monkeypatch):
    theirs = source(tmp_path / "source", "llama 3")
    convert(tmp_path / "source", tmp_path / "run", window=32, chunk_size=16, topk="all")
    ours = load(tmp_path / "run")
    monkeypatch.setattr(llm, "SEGMENT", 48)
    rng = torch.Generator().manual_seed(0)
    first = torch.randint(0, 90, (150,), generator=rng).tolist()
    second = first[:60] + torch.randint(0, 90, (80,), generator=rng).tolist()
    for reader, model in ((llm.reader_of_source(theirs), theirs), (llm.reader_of_run(ours, 150), ours)):
        for tokens in (first, second, first):
            assert not reader.tokens or llm.token_time(reader, 3) > 0  # and leaves the cache as it was
            with torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0, -5:]
                torch.testing.assert_close(reader.read(tokens, 5), expected, rtol=1e-4, atol=1e-4)
    assert reader.count == 150 + 80 + 90


def test_rows_of_another_machine_or_version_are_none(tmp_path):
    about = {"source": "x", "contexts": 1, "device": "a", "versions": "1", "commit": "abc"}
    path = tmp_path / "llm.json"
    path.write_text(json.dumps(about | {"rows": [1]}))
    assert llm.read_found(path, about)["rows"] == [1]
    for change in ({"device": "b"}, {"versions": "2"}, {"commit": "unknown"}):
        path.write_text(json.dumps(about | change | {"rows": [1]}))
        assert llm.read_found(path, about | ({} if "commit" not in change else change)) == {"rows": []}


@prove
def test_the_whole_check_on_a_random_model(tmp_path, monkeypatch, capsys):
    source(tmp_path / "source", "llama 3")
    arguments = ("--length", "1024", "--contexts", "1", "--threads", "1", "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["llm", *map(str, (tmp_path / "source", *arguments))])
    threads = torch.get_num_threads()
    llm.main()
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "out/llm-1024.json").read_text())
    assert [row["method"] for row in found["rows"]] == list(llm.METHODS) and found["difference"] <= llm.ATOL
    assert {row["contexts"] for row in found["rows"]} == {1} and found["commit"] and "transformers" in found["versions"]
    perplexity = {row["method"]: row["perplexity"] for row in found["rows"]}
    assert len(set(perplexity.values())) >= 3  # a window alone, and every chunk (7 are there, so that 16 are all)
    assert perplexity["all"] == pytest.approx(perplexity["mass"]) and perplexity["all"] != perplexity["window"]
    monkeypatch.setattr(llm, "ask", None)
    llm.main()  # asks nothing again
    assert json.loads((tmp_path / "out/llm-1024.json").read_text())["rows"] == found["rows"]
    monkeypatch.setattr(llm, "ATOL", 0.0)
    with pytest.raises(SystemExit):
        llm.main()
    torch.set_num_threads(threads)
