"""The decode benchmark: rows of the one schema, a gate that refuses, what is missing says so."""

import dataclasses

import pytest
from strategies import SWEEP
from tiers import prove
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.bench import compare, decode, record
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


def test_the_command(tmp_path):
    run = CliRunner().invoke(app, f"bench decode --device cpu --threads 1 --lengths 256 --seconds 0 --out {tmp_path}")
    assert run.exit_code == 0 and (tmp_path / "bench.csv").exists() and "dense-grouped" in run.output
    run = CliRunner().invoke(app, ["bench", "x"])
    assert run.exit_code == 2 and "must be one of attention, retrieve, decode," in run.output and "'x'" in run.output
