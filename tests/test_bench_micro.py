"""Microbenchmarks: right in the emulator, made of the instructions that they are to time; what is fitted to them."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import emulator
import pytest
from tiers import prove

from hsa_tl import cases
from hsa_tl.autotune import calibrate, cost, static
from hsa_tl.bench import record, roofline
from hsa_tl.kernels_tilelang import compile

PROBLEM = replace(cases.case("paper-d128").problem, T=256, device_type="cpu")
CLAIMS = {
    "l2-tma": ("UTMALDG", "LDGSTS"),
    "l2-cp-async": ("LDGSTS", "UTMALDG"),
    "reduce-add": ("RED", "HGMMA"),
    "wgmma": ("HGMMA", "HMMA"),
    "mma-sync": ("HMMA", "HGMMA"),
}  # name: an instruction that must be there, one that must not


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(roofline.Micro, "ctas", 3)
    monkeypatch.setattr(roofline.Micro, "rounds", 8)
    with emulator.attached():
        yield roofline.Micro()


@prove
@pytest.mark.parametrize("name", CLAIMS)
def test_passes_its_gate(suite, name):
    assert suite.unavailable(name, PROBLEM, "rate") is None
    assert suite.gate(name, PROBLEM) == []


def test_a_wrong_result_is_refused(suite, monkeypatch):
    monkeypatch.setattr(roofline, "kernel_of", lambda *key: lambda *arguments: arguments[-1].fill_(1))
    assert all(suite.gate(name, PROBLEM) for name in CLAIMS)


def test_needs_a_gpu_or_the_emulator():
    assert roofline.Micro().unavailable("wgmma", PROBLEM, "rate") == "it measures a Hopper GPU"


@prove
@pytest.mark.static
@pytest.mark.parametrize("name", CLAIMS)
def test_is_made_of_what_it_claims(name, monkeypatch):
    if reason := static.missing_tools():
        pytest.skip(reason)
    monkeypatch.setattr(compile, "compile_ir", lambda ir, device: compile.lower_ir(ir).kernel_source)
    (made,) = static.assemble_all([roofline.kernel_of.__wrapped__(name, 128, "bfloat16", 64)])
    sass, (there, absent) = cost.parse_sass(made.sass), CLAIMS[name]
    assert cost.count(sass, there) and not cost.count(sass, absent) and not made.spill_bytes


def test_measured_constants_are_no_longer_free():
    def row(provider, metric, value, kernel="roofline"):
        note = ("", "random", "H200", "versions", "commit", "")
        return record.Row(kernel, provider, "rate", metric, "", "T", 64, value, value, value, *note)

    old = cost.DEVICES["h200"]
    rows = [
        row("l2-tma", "bandwidth", 8000.0), row("l2-tma", "bandwidth", 5000.0), row("mma-sync", "throughput", 50.0),
        row("wgmma", "throughput", 100.0), row("l2-tma", "bandwidth", 9999.0, "hsa_attention"),
        row("reduce-add", "bandwidth", None),
    ]  # fmt: skip
    new = calibrate.measured(rows, old)
    assert (new.l2, new.mma_sync, new.reduce) == (8e12, 0.5, old.reduce)
    assert set(old.free) - set(new.free) == {"l2", "mma_sync"}
    adds = [row("reduce-add", "bandwidth", rate) for rate in (3000.0, 1000.0, 2000.0)]  # of small and of large sums
    assert calibrate.measured(adds, old).reduce == 1e12
    file = cost.make_device(**json.loads(calibrate.text(old, new)))
    assert file.l2 == 8e12 and "l2" not in file.free and "reduce" in file.free


def test_agreement_is_a_rank_correlation(monkeypatch):
    def agreement(predicted, measured):
        monkeypatch.setattr(calibrate, "predictions", lambda samples, device: predicted)
        return calibrate.agreement([SimpleNamespace(ns_per_pair=ns) for ns in measured], None)

    assert agreement([1, 2, 3, 9], [10, 20, 30, 31]) == pytest.approx(1)
    assert agreement([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert agreement([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # ties share their mean rank
    assert math.isnan(agreement([1, 1], [1, 2]))
