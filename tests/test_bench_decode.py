"""The decode benchmark: rows of the one schema, a gate that refuses, what is missing says so."""

import dataclasses
import sys
import types

import pytest
import torch
from strategies import SWEEP
from tiers import prove
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.bench import baselines, compare, decode, record
from hsa_tl.bench.sweep import Sweep
from hsa_tl.cli import app

CASE = dataclasses.replace(
    cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 128, HQ=4, H=2, D=16, S=16, K=2)
)


def bench(folder=None, names=None, lengths=(64, 128)):
    return Sweep(decode.Decode(), CASE, lengths, None, names, out_dir=folder, **SWEEP).run()


@prove
def test_rows(tmp_path):
    rows = bench(tmp_path)
    assert sorted(rows, key=lambda r: r.key) == record.read_rows(tmp_path / "bench.csv")
    times = {(r.provider, r.mode, r.x) for r in rows if r.metric == "time" and r.p50 > 0}
    modes = decode.Decode.modes
    hsa = {(n, mode, T) for n in ("hsa-auto", "hsa-auto-two-level") for mode in modes for T in (64, 128)}
    hsa -= {("hsa-auto-two-level", "attend", T) for T in (64, 128)}
    assert times == hsa | {(n, "decode", T) for n in ("dense", "dense-grouped") for T in (64, 128)}
    assert set(compare.fastest_baseline(rows)) == {("decode", 64), ("decode", 128)}


@pytest.mark.parametrize("name", ("dense", "hsa-auto"))
def test_a_wrong_provider_is_refused(name, monkeypatch):
    right = decode.Decode.call
    monkeypatch.setattr(
        decode.Decode, "call", lambda *x: lambda: right(*x)() * 1.01 if x[-1] == "decode" else right(*x)()
    )
    rows = bench(names=(name,), lengths=(64,))
    assert rows and all(r.p50 is None and r.note.startswith("refused by the gate: out") for r in rows)


def test_unavailable_and_unknown():
    (row,) = bench(names=("dense-fa3",), lengths=(64,))
    assert row.note.startswith("unavailable: needs CUDA")
    with pytest.raises(ValueError, match=r"provider must be one of dense, .*got 'x'"):
        bench(names=("x",))
    with pytest.raises(ValueError, match="lengths must be multiples of the chunk size 16, got 40"):
        bench(lengths=(40,))


@pytest.mark.parametrize("name", decode.HSA)
def test_each_part_is_of_the_implementation_that_is_named(name, monkeypatch):
    """And attention after a retrieval in two levels is no row: it is hsa-auto's."""
    asked, suite, problem = [], decode.Decode(), cases.on_cpu(CASE.problem)
    for part in ("retrieve_decode", "hsa_decode"):
        call = getattr(decode, part)
        monkeypatch.setattr(
            decode, part, lambda *x, call=call, impl, **y: asked.append((call.__name__, impl)) or call(*x, **y)
        )
    step, impl = suite.inputs(problem, "random"), name.split("-")[1]
    assert suite.does(name, "attend", "random") == (name != "hsa-auto-two-level")
    for mode, parts in (("retrieve", ["retrieve_decode"]), ("decode", ["retrieve_decode", "hsa_decode"])):
        asked.clear()
        suite.call(name, problem, step, mode)()
        assert asked == [(part, impl) for part in parts]


def test_what_cannot_retrieve_says_why():
    wide = dataclasses.replace(cases.on_cpu(CASE.problem), K=4096)
    assert "topk must be at most" in decode.Decode().unavailable("hsa-triton", wide, "decode")


@pytest.mark.parametrize("splits", (False, True))
def test_one_querys_keys_are_split_where_flash_attention_can(splits, monkeypatch):
    got = []

    def old(q, k, v, causal=False):
        got.append({})

    def new(q, k, v, causal=False, num_splits=1):
        got.append({"num_splits": num_splits})

    module = types.SimpleNamespace(flash_attn_func=new if splits else old)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    suite, problem = decode.Decode(), cases.on_cpu(CASE.problem)
    suite.call("dense-fa3", problem, suite.inputs(problem, "random"), "decode")()
    x = torch.zeros(1, 2, 4, 16)
    baselines.flash3(x, x, x, chunk_size=16)
    assert got == ([{"num_splits": 0}, {"num_splits": 1}] if splits else [{}, {}])
    note = suite.work("dense-fa3", problem, "decode").note
    assert note == ("" if splits else "its keys are not split over the SMs")


def test_the_command(tmp_path):
    run = CliRunner().invoke(app, f"bench decode --device cpu --threads 1 --lengths 256 --seconds 0 --out {tmp_path}")
    assert run.exit_code == 0 and (tmp_path / "bench.csv").exists() and "dense-grouped" in run.output
    run = CliRunner().invoke(app, ["bench", "x"])
    assert run.exit_code == 2 and "must be one of attention, retrieve, decode," in run.output and "'x'" in run.output
    run = CliRunner().invoke(app, ["bench", "forward", "--mode", "train"])
    assert run.exit_code == 2 and "mode must be left out of bench forward, got train" in run.output
