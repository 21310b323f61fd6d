"""Two and four gloo processes read one context, choose and write what one process does."""

import json
from dataclasses import replace

import pytest
import ranks
import torch
from test_distributed import launch
from tiers import prove, tiered
from typer.testing import CliRunner

from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.cli import app
from hsa_tl.model import Model, PagedMemory, preset
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.sharing import SharedCache

QUICK = (2, ("groups@70", "groups@391"))


def filled(model, tokens):
    cache = model.new_cache(1)
    model(tokens[None], cache=cache, logits_to_keep=0)
    return cache


def exact_logits(case: str, new: torch.Tensor) -> torch.Tensor:
    """Of whole forwards in float64, what `ranks.read` finds."""
    model, (first, second) = ranks.contexts(case)
    after = torch.cat([first, new[1:-1], first[:20]])  # the last new token is not read
    asked = (first, 12), (second, 12), (after, 20)
    return torch.cat([model.double()(x[None], logits_to_keep=keep).logits[0] for x, keep in asked])


@pytest.mark.parametrize(
    "count, cases",
    tiered((QUICK, (4, ("groups@20", *(f"{x}@391" for x in ranks.SHARED), "hsa@20000"))), quick=(QUICK,), rows=True),
)
def test_ranks_read_what_one_process_reads(count, cases, tmp_path):
    """At 20 tokens some ranks have no chunk, at 70 the upper decoder begins before the last one's."""
    run = launch(count, "reading", tmp_path / "found", *cases)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [torch.load(tmp_path / f"found.{rank}", weights_only=False) for rank in range(count)]
    alone = ranks.read(cases, PagedMemory, LongReader, filled)
    for case in cases:
        wanted = expect(lambda case=case: exact_logits(case, alone[f"{case} tokens"]))
        for mine in found:
            assert_accurate(case, mine[f"{case} logits"], wanted)
            for name in (f"{case} tokens", f"{case} choices"):
                assert torch.equal(mine[name], alone[name]), name
    for mine in found:
        assert len(mine["answers"]) == 4 and all(mine["answers"])
        # Of a token: itself, K scores and K chunk numbers, A * D outputs.
        assert mine["sent"] == [8, 4 * 8, 4 * 8, 4 * 4 * 32]
        assert mine["differs"] == "input_ids must be the same on every rank, got others than rank 0's"
    assert [mine["held"] for mine in found] == {2: [9, 9], 4: [4, 5, 4, 5]}[count]  # of 300 // 16


@pytest.mark.parametrize(
    "changes", ({"attention": "full"}, {"attention": "nsa"}, {"linear": True}, {"fusion": "one_softmax"}), ids=str
)
def test_what_ranks_cannot_share_is_named(changes):
    model = Model(replace(preset("tiny"), **changes))
    for make in (LongReader, lambda model, group: SharedCache(model, torch.zeros(9).long(), group)):
        with pytest.raises(NotImplementedError, match=f"ranks share a context .* got .*{next(iter(changes.values()))}"):
            make(model, group=object())


def test_a_budget_is_not_shared():
    model, tokens = Model(preset("tiny")), torch.zeros(9).long()
    for make in (
        lambda: LongReader(model, group=object(), budget=0.5),
        lambda: SharedCache(model, tokens, object(), budget=3),
    ):
        with pytest.raises(
            NotImplementedError, match=r"ranks share a context .* without a budget, got .* budget [0.53]"
        ):
            make()


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 320\)"):
        SharedCache(Model(preset("tiny")), torch.tensor([3, 320]), object())


@prove  # each rank imports torch anew
def test_the_evaluation_runs_on_two_ranks(tmp_path):
    """It prints once, and keeps one process's rows; what ranks cannot share is refused."""
    asked = ["eval", "ruler", "--run", "needle-tiny", "--lengths", "1k", "--samples", "1", "--depth-steps", "2"]
    asked += ["--out", str(tmp_path), "--tasks", "mq-niah"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    run = launch(2, "command", *asked)
    assert run.returncode == 0 and run.stdout.count("wrote ") == 1, run.stderr[-3000:]
    rows = json.loads((tmp_path / "ruler.json").read_text())
    assert [row["model"] for row in rows] == ["needle-tiny-hsa"] * 2 + ["needle-tiny-hsa, 2 ranks"] * 2
    assert all(row["accuracy"] == 1 for row in rows)
    run = launch(2, "command", "eval", "selections", "--run", "needle-tiny")
    assert run.returncode != 0 and "selections must be measured by one process, got 2" in run.stderr
