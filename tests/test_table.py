"""The tuned tables: the order of lookup, what a miss does, the user's cache under poison and under other processes."""

import json
import multiprocessing
from dataclasses import asdict, replace

import pytest

from hsa_tl import cases
from hsa_tl.autotune import measure, strategy, table
from hsa_tl.kernels_tilelang.config import TUNED, from_dict, space, static_key, why_illegal
from hsa_tl.kernels_tilelang.config_forward import FwdTokenConfig, FwdUnionConfig

PAPER = cases.case("paper-d128").problem
FIRST = space("hsa_fwd_token", PAPER)[0]
AGREE = {block_M: 1 / (block_M // 16) for block_M in strategy.BLOCKS}
TOKEN = FwdTokenConfig(128, 2)


def make_row(T=PAPER.T, config=TOKEN, us=None, ns=4.0, problem=PAPER):
    name = {FwdTokenConfig: "hsa_fwd_token", FwdUnionConfig: "hsa_fwd_union"}[type(config)]
    made = {"program": name, **static_key(problem), "T": T, "config": asdict(config)}
    return made | {"source": "measured" if us else "static", "median_us": us, "ns_per_pair": ns, "candidates": 2}


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    """A fresh cache folder, the GPU's name, and the rows that the package would ship."""
    rows = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HSA_TL_TUNING", raising=False)
    monkeypatch.setattr(table, "device_name", lambda: "h200")
    monkeypatch.setattr(table.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(table, "shipped", lambda device: tuple(rows))
    return rows


def resolve(T=PAPER.T, config=None, preferred=None, name="hsa_fwd_token"):
    return table.resolve(name, cases.at_length(PAPER, T), config, preferred)


def test_lookup_order(h200):
    """Explicit config, then the exact row, then the nearest T of the same static key, then the heuristic."""
    assert resolve() == FIRST == FwdTokenConfig(128, 2)
    h200 += [make_row(1 << 20, FwdTokenConfig(64, 2)), make_row(config=FwdTokenConfig(64, 3))]
    h200 += [make_row(config=FwdTokenConfig(128, 4), problem=replace(PAPER, K=8))]
    table._rows.cache_clear(), table._find.cache_clear()
    assert resolve() == FwdTokenConfig(64, 3)
    assert resolve(1 << 13) == FwdTokenConfig(64, 3) and resolve(1 << 19) == FwdTokenConfig(64, 2)
    assert resolve(config={"hsa_fwd_token": {"num_stages": 2}}) == FwdTokenConfig(128, 2)
    assert resolve(name="hsa_bwd_dq_token") == space("hsa_bwd_dq_token", PAPER)[0]


def test_at_one_distance_measured_then_the_users_then_the_faster(h200):
    h200 += [make_row(config=FwdTokenConfig(64, 2), ns=1.0), make_row(1 << 16, FwdTokenConfig(64, 3), us=9.0)]
    table.merge(table.user_path("h200"), "h200", [make_row(config=FwdTokenConfig(128, 3))])
    assert resolve() == FwdTokenConfig(128, 3), "both static: the user's"
    table.merge(table.user_path("h200"), "h200", [make_row(1 << 16, FwdTokenConfig(128, 4))])
    assert resolve(1 << 16) == FwdTokenConfig(64, 3), "measured before the user's static"
    table.merge(table.user_path("h200"), "h200", [make_row(1 << 16, FwdTokenConfig(128, 3), us=99.0)])
    assert resolve(1 << 16) == FwdTokenConfig(128, 3), "both measured: the user's"


def test_the_rule_keeps_what_it_chose_from_the_overlap(h200):
    """The union tile's rows and twin come from the selection, the other fields from the table."""
    h200 += [make_row(config=FwdUnionConfig(192, 4), ns=0.7), make_row(config=FwdUnionConfig(64, 4), ns=1.2)]
    assert resolve(name="hsa_fwd_union") == FwdUnionConfig(192, 4)
    assert resolve(name="hsa_fwd_union", preferred=FwdUnionConfig(64, 2)) == FwdUnionConfig(64, 4)
    assert resolve(name="hsa_fwd_union", preferred=FwdUnionConfig(128, 2, 1)) == FwdUnionConfig(128, 2, 1)
    (chosen,) = strategy.programs("forward", PAPER, None, {"union_share": AGREE})
    (ruled,) = strategy.choose("forward", PAPER, AGREE, strategy.cost.DEVICES["h200"])
    assert chosen[0] == "hsa_fwd_union" and chosen[1].block_M == ruled[1].block_M


def test_settings(h200, monkeypatch):
    h200.append(make_row(config=FwdTokenConfig(64, 3)))
    monkeypatch.setenv("HSA_TL_TUNING", "heuristic")
    assert resolve() == FIRST and resolve(preferred=FwdTokenConfig(64, 2)) == FwdTokenConfig(64, 2)
    monkeypatch.setenv("HSA_TL_TUNING", "error")
    assert resolve(1 << 20) == FwdTokenConfig(64, 3)
    with pytest.raises(LookupError, match=r"the table of h200 must have a row of hsa_bwd_chunk .* got none"):
        resolve(name="hsa_bwd_chunk")
    assert table.resolve("hsa_combine", PAPER) == space("hsa_combine", PAPER)[0], "not a tuned program"
    monkeypatch.setenv("HSA_TL_TUNING", "guess")
    with pytest.raises(ValueError, match="HSA_TL_TUNING must be one of table, heuristic, tune, error, got 'guess'"):
        resolve()


def test_tune_measures_a_miss_once_and_keeps_it(h200, monkeypatch):
    """A static row is a miss; a measured one of nearly the same T is none. What tuning itself runs is not tuned."""
    h200.append(make_row())
    monkeypatch.setenv("HSA_TL_TUNING", "tune")
    calls = []

    def tune(program, problem, device):
        calls.append((program, problem.T, device))
        resolve(name="hsa_bwd_chunk")
        table.merge(table.user_path(device), device, [make_row(problem.T, FwdTokenConfig(64, 2), us=5.0)])

    monkeypatch.setattr(measure, "tune", tune)
    for T in (1 << 14, 1 << 14, 1 << 15, 1 << 17):
        assert resolve(T) == FwdTokenConfig(64, 2)
    assert calls == [("hsa_fwd_token", 1 << 14, "h200"), ("hsa_fwd_token", 1 << 17, "h200")]
    assert [r["T"] for r in table.read(table.user_path("h200"))] == [1 << 14, 1 << 17]
    monkeypatch.setattr(measure, "tune", lambda *args: None)
    with pytest.raises(RuntimeError, match="no candidate of hsa_fwd_union"):
        resolve(name="hsa_fwd_union")


@pytest.mark.parametrize("problem", [PAPER, cases.on_cpu(PAPER)])
def test_tune_without_a_gpu_says_so(monkeypatch, problem):
    monkeypatch.setenv("HSA_TL_TUNING", "tune")
    monkeypatch.setattr(table, "device_name", lambda: None)
    with pytest.raises(NotImplementedError, match="HSA_TL_TUNING=tune measures on one of h100, h200, h800"):
        table.resolve("hsa_fwd_token", problem)


@pytest.mark.parametrize(
    "poison",
    [
        b"",
        b"\x80\x00\xff",
        b'{"rows": [{"program"',
        b"[]",
        b'{"rows": [7]}',
        json.dumps({"rows": [make_row() | {"program": "rm"}]}).encode(),
        json.dumps({"rows": [make_row() | {"config": {"warps": 3}}]}).encode(),
        json.dumps({"rows": [make_row() | {"T": "many"}]}).encode(),
    ],
)
def test_a_poisoned_cache_is_set_aside(h200, poison):
    h200.append(make_row(config=FwdTokenConfig(64, 3)))
    path = table.user_path("h200")
    path.parent.mkdir(parents=True)
    path.write_bytes(poison)
    with pytest.warns(UserWarning, match="must be a tuned table, got .* set aside as h200.json.corrupt"):
        assert resolve() == FwdTokenConfig(64, 3)
    (aside,) = path.parent.glob("*.corrupt-*")
    assert aside.read_bytes() == poison and not path.exists()
    table.merge(path, "h200", [make_row(config=FwdTokenConfig(64, 2), us=1.0)])
    assert resolve() == FwdTokenConfig(64, 2)


def test_an_illegal_row_is_passed_over(h200):
    """A cache of another version may hold what today's arithmetic refuses."""
    h200.append(make_row(config=FwdTokenConfig(64, 3)))
    table.merge(table.user_path("h200"), "h200", [make_row(config=FwdTokenConfig(96, 2), us=1.0)])
    assert resolve() == FwdTokenConfig(64, 3)


def _merge_many(path, first):
    for i in range(12):
        table.merge(path, "h200", [make_row(first + i)])


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path, context = tmp_path / "h200.json", multiprocessing.get_context("spawn")
    writers = [context.Process(target=_merge_many, args=(path, 100 * n)) for n in (1, 2)]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        table.read(path)  # a reader never meets half a file
    assert [w.exitcode for w in writers] == [0, 0]
    assert {r["T"] for r in table.read(path)} == {100 * n + i for n in (1, 2) for i in range(12)}


def test_a_table_is_sorted_and_reads_back(tmp_path):
    rows = [make_row(10), make_row(9)]
    table.write(tmp_path / "x.json", "h200", rows)
    assert table.read(tmp_path / "x.json") == rows[::-1]
    assert table.read(tmp_path / "absent.json") == []


@pytest.mark.parametrize("device", table.DEVICES)
def test_shipped_rows_are_legal_and_cover_the_papers_configuration(device):
    rows = table.read(table.Path(table.__file__).parent / "tables" / f"{device}.json")
    for row in rows:
        names = {"D": row["D"], "S": row["S"], "K": row["K"], "masked": row["masked"]}
        problem = replace(cases.at_length(PAPER, row["T"]), HQ=row["G"], H=1, per_head=row["heads_w"] > 1, **names)
        assert static_key(problem) == {k: row[k] for k in static_key(problem)}
        assert why_illegal(row["program"], problem, from_dict(row["program"], row["config"])) is None
        assert row["source"] in ("static", "measured") and row["versions"] and row["candidates"]
    found = {
        (r["program"], r["D"], r["K"], r["T"]) for r in rows if (r["G"], r["S"], r["dtype"]) == (16, 64, "bfloat16")
    }
    lengths = (1 << n for n in range(12, 21, 2))
    assert found == {(p, D, K, T) for T in lengths for p in TUNED for D in (64, 128) for K in (8, 16, 32, 64)}
