"""The check of a converted model against its source: contexts hold what is asked for, and answers count as they are."""

import json
import sys

import pytest
import torch
from test_convert import source
from tiers import prove

from hsa_tl.bench import llm
from hsa_tl.model.data import ByteTokenizer


def test_contexts_hold_the_code_where_it_is_said():
    contexts = llm.make_contexts(ByteTokenizer(), 4096, 3)
    depths = []
    for tokens, digits in contexts:
        text = ByteTokenizer().decode(tokens)
        code = text[-digits:]
        assert len(tokens) == 4096 and digits == 5 and code.isdecimal() and text.count(f"is {code}") == 2
        assert text[:-digits].endswith("The secret code of the lantern is ")
        depths.append(text.index(f"is {code}. Remember it."))
    assert depths == sorted(depths) and depths[-1] < 4096 - llm.WINDOW and depths[0] < 1000


def test_right_is_every_digit():
    contexts = llm.make_contexts(ByteTokenizer(), 2048, 2)
    wrong = contexts[1].tokens[-3]

    def logits(x, keep):
        """Certain of the next token, but for one digit of the second context."""
        after = x[0, 1:].clone()
        if x[0].tolist() == contexts[1].tokens:
            after[-3] = (wrong + 1) % 257
        return torch.nn.functional.one_hot(torch.cat([after, after[-1:]]), 257)[-keep:] * 50.0

    certain = llm.ask(logits, contexts)
    assert certain.pop("seconds") >= 0 and certain.pop("losses") == pytest.approx([0, 0])
    assert certain == {"right": 1, "contexts": 2, "perplexity": pytest.approx(1.0)}
    uniform = llm.ask(lambda x, keep: torch.zeros(keep, 257), contexts)
    assert uniform["right"] == 0 and uniform["perplexity"] == pytest.approx(257, rel=1e-4)


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
