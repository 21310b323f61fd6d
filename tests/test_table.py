"""Measured tables: the order of choice, what a miss does, the user's cache under poison and under other processes."""

import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hsa_tl import cases
from hsa_tl.autotune import cost, measure, plan, table
from hsa_tl.kernels_tilelang.config import why_illegal
from hsa_tl.kernels_tilelang.hsa_fwd_chunk import FwdChunkConfig
from hsa_tl.kernels_tilelang.hsa_fwd_token import FwdTokenConfig
from hsa_tl.kernels_tilelang.hsa_fwd_union import FwdUnionConfig
from hsa_tl.problem import Problem

PAPER = cases.case("paper-d128").problem
TOKEN = FwdTokenConfig(64, 3)
NAMES = {FwdTokenConfig: "hsa_fwd_token", FwdUnionConfig: "hsa_fwd_union", FwdChunkConfig: "hsa_fwd_chunk"}


def make_row(T=PAPER.T, config=TOKEN, ns=4.0, problem=PAPER, overlap=(0.9, 1.0)):
    made = {"direction": "forward", **problem.static_key(), "T": [T // 2 + 1, T], "overlap": list(overlap)}
    made |= {"deterministic": not config.reduce_add}
    made |= {"programs": {NAMES[type(config)]: asdict(config)}, "median_us": 9.0, "ns_per_pair": ns}
    return made | {"candidates": 2, "versions": {}}


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    """A fresh cache folder, the GPU's name, and the rows that the package would ship."""
    rows = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HSA_TL_TUNING", raising=False)
    monkeypatch.setattr(cost, "device_name", lambda index=None: "h200")
    monkeypatch.setattr(plan.torch.cuda, "is_current_stream_capturing", lambda: False)
    plan.clear()
    monkeypatch.setattr(table, "shipped", lambda device: tuple(rows))
    monkeypatch.setattr(plan, "clear", lambda: (plan._choose.cache_clear(), table.users.cache_clear()))
    yield rows
    plan.clear()


def keep(*rows):
    """In the user's table."""
    table.merge(table.user_path("h200"), "h200", list(rows))


def choose(T=PAPER.T, config=None, deterministic=False, direction="forward"):
    plan.clear()
    made = plan.choose(direction, cases.at_length(PAPER, T), json.dumps(config or {}), deterministic)
    return made.origin, made.programs[0][1]


def test_order(h200):
    """What the caller names, then the user's rows, then the shipped, then the prediction."""
    assert choose()[0] == "predicted"
    h200.append(make_row())
    assert choose() == ("shipped", TOKEN)
    keep(make_row(config=FwdTokenConfig(128, 3), ns=9.0))
    assert choose() == ("user", FwdTokenConfig(128, 3)), "slower, but measured here"
    assert choose(config={"hsa_fwd_token": {"num_stages": 2}}) == ("caller", FwdTokenConfig(128, 2))
    assert choose(config={"hsa_fwd_chunk": {}})[0] == "caller"


def test_a_row_serves_its_lengths_overlaps_and_static_key(h200):
    h200 += [make_row(), make_row(1 << 20, FwdTokenConfig(64, 2)), make_row(config=FwdTokenConfig(64, 4), ns=5.0)]
    h200.append(make_row(config=FwdUnionConfig(), overlap=(0.0, 0.4)))
    assert choose() == ("shipped", TOKEN), "the faster of two"
    assert choose(PAPER.T // 2 + 64) == ("shipped", TOKEN) and choose(PAPER.T // 2)[0] == "predicted"
    assert choose(1 << 20) == ("shipped", FwdTokenConfig(64, 2))
    assert (
        choose(config={"overlap": 0.33}) == ("shipped", FwdUnionConfig())
        and choose(config={"overlap": 0.5})[0] == "predicted"
    )
    assert choose(direction="backward")[0] == "predicted"
    other = replace(PAPER, K=8)
    assert plan.choose("forward", other).origin == "predicted"


def test_deterministic_passes_over_a_row_that_adds_atomically(h200):
    h200.append(make_row(config=FwdChunkConfig(reduce_add=1)))
    assert choose()[1].reduce_add == 1
    assert choose(deterministic=True)[0] == "predicted"


def test_a_row_that_adds_atomically_leaves_with_a_new_one_that_was_faster(h200):
    """Or its older time would win for ever; the ordered row of an older run stays beside a new one that adds."""
    adds = FwdChunkConfig(reduce_add=1)
    keep(make_row(config=adds, ns=1.0), make_row(ns=4.0))
    keep(make_row(ns=2.0))
    assert choose() == ("user", TOKEN)
    keep(make_row(config=adds, ns=1.5))
    assert choose() == ("user", adds) and choose(deterministic=True) == ("user", TOKEN)


def test_settings(h200, monkeypatch):
    h200.append(make_row())
    monkeypatch.setenv("HSA_TL_TUNING", "heuristic")
    assert choose()[0] == "predicted"
    monkeypatch.setenv("HSA_TL_TUNING", "error")
    assert choose() == ("shipped", TOKEN)
    with pytest.raises(LookupError, match=r"the table of h200 must have a row of the backward .* got none"):
        choose(direction="backward")
    monkeypatch.setenv("HSA_TL_TUNING", "guess")
    with pytest.raises(ValueError, match="HSA_TL_TUNING must be one of table, heuristic, tune, error, got 'guess'"):
        choose()


def test_tune_measures_a_miss_once_and_keeps_it(monkeypatch):
    monkeypatch.setenv("HSA_TL_TUNING", "tune")
    calls = []

    def tune(direction, problem, device):
        calls.append((direction, problem.T, device))
        rows = [make_row(problem.T, FwdTokenConfig(64, 2))]
        table.merge(table.user_path(device), device, rows)
        return rows

    monkeypatch.setattr(measure, "tune", tune)
    plan.clear()
    for T in (16320, 16384, 16384, 1 << 17):
        made = plan.choose("forward", cases.at_length(PAPER, T))
        assert made.origin == "user" and made.programs == (("hsa_fwd_token", FwdTokenConfig(64, 2)),)
    assert calls == [("forward", 1 << 14, "h200"), ("forward", 1 << 17, "h200")]
    assert choose() == ("user", FwdTokenConfig(64, 2)) and len(calls) == 2, "another process reads it"
    monkeypatch.setattr(measure, "tune", lambda *args: [])
    with pytest.raises(RuntimeError, match="no candidate for the backward"):
        choose(direction="backward")
    monkeypatch.setattr(plan.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must see each problem before a CUDA graph is captured"):
        choose(direction="backward")


def test_tune_without_such_a_gpu_says_so(monkeypatch):
    monkeypatch.setenv("HSA_TL_TUNING", "tune")
    monkeypatch.setattr(cost, "device_name", lambda index=None: None)
    with pytest.raises(NotImplementedError, match="HSA_TL_TUNING=tune measures on one of h100, h200, h800"):
        choose()


def test_tune_does_not_measure_for_a_device_by_name(monkeypatch):
    """What the GPU here takes is no row of another one's table, and `hsa-tl autotune --device` runs without a GPU."""
    monkeypatch.setenv("HSA_TL_TUNING", "tune")
    monkeypatch.setattr(measure, "tune", lambda *args: pytest.fail("measured"))
    plan.clear()
    assert plan.choose("forward", PAPER, device="h100").origin == "predicted"


@pytest.mark.parametrize(
    "poison",
    [
        b"",
        b"\x80\x00\xff",
        b'{"rows": [{"program"',
        b"[]",
        b'{"rows": [7]}',
        json.dumps({"rows": [make_row() | {"programs": {"rm": {}}}]}).encode(),
        json.dumps({"rows": [make_row() | {"programs": {"hsa_fwd_token": {"warps": 3}}}]}).encode(),
        json.dumps({"rows": [make_row() | {"T": ["few", "many"]}]}).encode(),
    ],
)
def test_a_poisoned_cache_is_set_aside(h200, poison):
    h200.append(make_row())
    path = table.user_path("h200")
    path.parent.mkdir(parents=True)
    path.write_bytes(poison)
    with pytest.warns(UserWarning, match="must be a tuned table, got .* set aside as h200.json.corrupt"):
        assert choose() == ("shipped", TOKEN)
    (aside,) = path.parent.glob("*.corrupt-*")
    assert aside.read_bytes() == poison and not path.exists()
    keep(make_row(config=FwdTokenConfig(64, 2)))
    assert choose() == ("user", FwdTokenConfig(64, 2))


def test_an_illegal_row_is_passed_over(h200):
    """A cache of another version may hold what today's arithmetic refuses."""
    h200.append(make_row())
    keep(make_row(config=FwdTokenConfig(96, 2), ns=1.0))
    assert choose() == ("shipped", TOKEN)


def _merge_many(path, first):
    for i in range(12):
        table.merge(path, "h200", [make_row(first + i)])


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path, context = tmp_path / "h200.json", multiprocessing.get_context("fork")  # which imports nothing again
    writers = [context.Process(target=_merge_many, args=(path, 100 * n)) for n in (1, 2)]
    for w in writers:
        w.start()
    while not path.exists() and any(w.is_alive() for w in writers):
        time.sleep(0.01)  # they start
    while any(w.is_alive() for w in writers):
        table.read(path)  # a reader never meets half a file
    assert [w.exitcode for w in writers] == [0, 0]
    assert {r["T"][1] for r in table.read(path)} == {100 * n + i for n in (1, 2) for i in range(12)}


def test_a_table_is_sorted_and_reads_back(tmp_path):
    rows = [make_row(10), make_row(9)]
    table.write(tmp_path / "x.json", "h200", rows)
    assert table.read(tmp_path / "x.json") == rows[::-1]
    assert table.read(tmp_path / "absent.json") == []


@pytest.mark.parametrize("device", cost.DEVICES)
def test_shipped_rows_are_legal_and_measured(device):
    """None yet: what only repeats the prediction is not shipped."""
    for row in table.read(Path(table.__file__).parent / "tables" / f"{device}.json"):
        names = {k: row[k] for k in ("D", "S", "K", "masked")}
        T, per_head = row["T"][1], row["heads_w"] > 1
        problem = Problem(B=1, T=T, N=-(-T // row["S"]), HQ=row["G"], H=1, per_head=per_head, **names)
        assert row["median_us"] > 0 and row["versions"] and row["candidates"]
        assert all(why_illegal(name, problem, c) is None for name, c in table.programs(row))
