"""hsa_combine: the sum of a token's partial rows, against float64; on the CPU, and as 16-byte loads for sm_90a."""

from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import seeds
from tiers import prove

from hsa_tl import cases
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.autotune import cost, static
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.problem import Problem

UNTOUCHED = 7.0


class Call(NamedTuple):
    """A window of tokens [start, start + window), of which the last may reach past the tokens there are."""

    problem: Problem
    start: int
    window: int
    seed: int


@st.composite
def calls(draw):
    G, D, K = draw(st.sampled_from(((2, 32, 2), (3, 16, 3))))
    B, T, H = draw(st.integers(1, 2)), draw(st.integers(1, 30)), draw(st.integers(1, 2))
    problem = Problem(B, T, 3, G * H, H, D, 16, K, dtype=torch.float32, device_type="cpu")
    return Call(problem, draw(st.integers(0, T - 1)), draw(st.integers(1, 12)), draw(seeds))


def combine(call: Call, settings) -> None:
    p, start, window, seed = call
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-2, p.N + 2, (p.B, p.T, p.H, p.K), generator=g, dtype=torch.int32)
    stop = min(p.T, start + window)
    indices[:, start : start + 1] = -1
    valid = ((indices >= 0) & (indices < p.N)).transpose(1, 2)[:, :, start:stop]
    partial = torch.randn(p.B, p.H, window, p.K, p.G, p.D, generator=g).to(p.dtype)
    # The rows of empty slots, and of tokens that are not there, were never written.
    partial[:, :, stop - start :] = torch.nan
    partial[:, :, : stop - start][~valid] = torch.nan
    out = torch.full((p.B, p.T, p.H, p.G, p.D), UNTOUCHED, dtype=p.dtype)

    kernel = compile.kernel("hsa_combine", p, settings)
    partial_there, indices_there, out_there = (x.to(p.device_type) for x in (partial.flatten(2, 3), indices, out))
    kernel(partial_there, indices_there, start, p.N, out_there)
    out = out_there.cpu()

    rows = torch.where(valid[..., None, None], partial[:, :, : stop - start], 0).transpose(1, 2)
    wanted = expect(lambda x: x.sum(3), rows.float(), out=p.dtype)
    assert_accurate("out", out[:, start:stop], wanted)
    assert (out[:, start:stop][~valid.any(-1).transpose(1, 2)] == 0).all()
    assert (out[:, :start] == UNTOUCHED).all() and (out[:, stop:] == UNTOUCHED).all()


@hypothesis.settings(max_examples=25)
@hypothesis.given(calls())
def test_sums_the_valid_rows_of_a_window(call):
    combine(call, config.default("hsa_combine", call.problem))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("G, D, K", [(16, 128, 64), (1, 128, 16), (3, 16, 7), (16, 64, 5)])
def test_sums_the_valid_rows_of_a_window_on_a_gpu(G, D, K, dtype):
    problem = Problem(2, 200, 3, 2 * G, 2, D, 64, K, dtype=dtype)
    for settings in config.space("hsa_combine", problem):
        combine(Call(problem, 70, 160, seed=0), settings)


@prove
@pytest.mark.static
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_rows_are_read_by_16_bytes(case):
    """num_stages rows in flight: as many loads stand in the loop's body, predicated, with no branch between them."""
    if reason := static.missing_tools():
        pytest.skip(reason)
    settings = config.space("hsa_combine", case.problem)[0]
    (made,) = static.assemble_all([compile.lower("hsa_combine", case.problem, settings).kernel_source])
    sass = cost.parse_sass(made.sass)
    wide = [i for i, (_, op, _) in enumerate(sass) if op.startswith("LDG.E.128")]
    assert len(wide) == cost.count(sass, "LDG") - 1 >= settings.num_stages  # the other reads indices
    between = {op.split(".")[0] for _, op, _ in sass[wide[0] : wide[settings.num_stages - 1]]}
    assert not between & {"BRA", "BSSY", "BSYNC", "FADD"}
    if settings.tile(case.problem.G * case.problem.D // 8) == 1:
        assert cost.count(sass, "STG") == cost.count(sass, "STG.E.128")
