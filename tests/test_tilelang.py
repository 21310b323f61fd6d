"""What only the TileLang programs promise: no recompilation, legal configs."""

import itertools
from dataclasses import replace

import pytest
import torch

from hsa_tl import cases, hsa_attention, ops
from hsa_tl.autotune import plan
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config import (
    PROGRAMS,
    config_of,
    default,
    problem_of,
    space,
    why_illegal,
)
from hsa_tl.kernels_tilelang.config_base import blocks_per_sm
from hsa_tl.kernels_tilelang.hsa_bwd_dkdv_chunk import BwdDkdvChunkConfig
from hsa_tl.kernels_tilelang.hsa_fwd_token import FwdTokenConfig
from hsa_tl.problem import Problem
from hsa_tl.testing import make_inputs, run_with_gradients

PAPER = cases.case("paper-d128").problem
SMALL = Problem(B=1, T=48, N=3, HQ=2, H=1, D=16, S=16, K=2, dtype=torch.float32, device_type="cpu")


def test_a_new_length_batch_or_head_count_does_not_recompile():
    run_with_gradients(hsa_attention, make_inputs(SMALL), chunk_size=16, impl="tilelang")
    before = set(compile._KERNELS)
    for changed in (replace(SMALL, T=80, N=5), replace(SMALL, B=3), replace(SMALL, HQ=4, H=2)):
        run_with_gradients(hsa_attention, make_inputs(changed), chunk_size=16, impl="tilelang")
    assert set(compile._KERNELS) == before
    assert {"hsa_fwd_token", "hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk"} <= {key[0] for key in before}


@pytest.mark.parametrize("threads", [32, 64, 128])
def test_any_config_gives_the_same_result(threads):
    """On the CPU a config changes no number: block_M only regroups the pairs of a tile."""
    inputs = make_inputs(SMALL)
    config = {"hsa_fwd_token": {"threads": threads}, "hsa_bwd_dkdv_chunk": {"block_M": threads}}
    a = run_with_gradients(hsa_attention, inputs, chunk_size=16, impl="tilelang", config=config)
    b = run_with_gradients(hsa_attention, inputs, chunk_size=16, impl="tilelang")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "program, changes, config, words",
    [
        ("hsa_fwd_token", {}, BwdDkdvChunkConfig(), "takes a FwdTokenConfig, got BwdDkdvChunkConfig"),
        ("hsa_fwd_token", {"D": 40}, FwdTokenConfig(), "D must be a multiple of 16, got 40"),
        ("hsa_fwd_token", {}, FwdTokenConfig(threads=100), "threads must be 32 to 384 in whole warps, got 100"),
        ("hsa_fwd_token", {"S": 16}, FwdTokenConfig(), "4 warps need S and D to be multiples of 64, got 16 and 128"),
        ("hsa_fwd_token", {}, FwdTokenConfig(num_stages=0), "num_stages must be at least 1, got 0"),
        ("hsa_fwd_token", {}, FwdTokenConfig(num_stages=8), "shared memory must be at most 232320 bytes"),
        ("hsa_bwd_dkdv_chunk", {"HQ": 128}, BwdDkdvChunkConfig(), "block_M must be at least G = 128"),
        ("hsa_bwd_dkdv_chunk", {}, BwdDkdvChunkConfig(block_M=32), "a multiple of 64, got 32"),
        (
            "hsa_bwd_dkdv_chunk",
            {"D": 48},
            BwdDkdvChunkConfig(threads=256),
            "8 warps need D to be a multiple of 32, got 48",
        ),
        (
            "hsa_bwd_dkdv_chunk",
            {"D": 80, "S": 16},
            BwdDkdvChunkConfig(),
            "4 warps cannot share out chunks of 16 by 80",
        ),
        ("hsa_bwd_dkdv_chunk", {"D": 256}, BwdDkdvChunkConfig(), "registers must be at most 255 a thread"),
    ],
)
def test_why_illegal_says_what_and_why(program, changes, config, words):
    assert words in why_illegal(program, replace(PAPER, **changes), config)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_space_is_legal_and_fits(case, program):
    problem = problem_of(program, case.problem)
    configs = space(program, problem)
    assert (configs or program.endswith("_sm90a")) and len(set(configs)) == len(configs)
    for c in configs:
        assert why_illegal(program, problem, c) is None and blocks_per_sm(c, problem) >= 1


def test_cases_are_what_they_say():
    """Each has a tag, whole groups of heads, and whole chunks but where a short last chunk is the reason for it."""
    tagged = {c for tag in ("ci", "tune", "bench") for c in cases.find(tag)}
    assert tagged == set(cases.CASES)
    for c in tagged:
        p = c.problem
        assert p.HQ % p.H == 0 and p.masked == bool(p.T % p.S) == ("short last chunk" in c.why), c.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_cpu_target_has_a_small_tile(program):
    """It computes a tile's padding too, and short sequences are mostly that."""
    c = default(program, problem_of(program, cases.on_cpu(PAPER)))
    assert max(getattr(c, "block_M", 1), getattr(c, "block_N", 1)) <= 64


@pytest.mark.parametrize("B, splits", [(1, 64), (131, 4), (132, 2), (263, 2), (264, 1)])
def test_decode_splits_until_each_sm_has_two_ctas(B, splits):
    """132 SMs; B CTAs without a split, and 64 slots to share out."""
    assert space("hsa_decode_split", replace(PAPER, B=B, T=1))[0].num_splits == splits


def test_a_thread_of_the_combine_has_vectors_in_powers_of_two():
    """Of any rows, one for each token of its CTA; and the widest rows find a config, with few of them in flight."""
    for threads, vectors in itertools.product(range(32, 257, 32), range(1, 257)):
        c = config_of("hsa_combine")(threads)
        share, rest = divmod(c.tile(vectors) * c.lanes(vectors), threads)
        assert rest == 0 and share.bit_count() == 1 and vectors <= c.lanes(vectors) < 2 * vectors
    assert space("hsa_combine", replace(PAPER, HQ=128, D=256))


def test_a_shape_is_taken_where_there_is_a_plan_and_else_refused(monkeypatch):
    """128 query heads a key/value head suit chunk stationary programs alone."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    tilelang = ops.implementation("tilelang")
    for D, S, G, lacks in ((128, 64, 128, None), (128, 64, 16, None), (192, 128, 16, "hsa_bwd_dkdv_chunk")):
        problem = replace(PAPER, D=D, S=S, HQ=G, H=1)
        reason = tilelang.unavailable(problem)
        if lacks is None:
            assert reason is None and all(plan.choose(x, problem, device="h200") for x in ("forward", "backward"))
        else:
            assert reason.startswith(f"no config of {lacks} suits it: ")
    assert not space("hsa_bwd_dq_token", replace(PAPER, D=128, S=64, HQ=128, H=1))


def test_every_shape_of_the_contract_has_a_config_or_is_listed_here():
    """Without a plan impl="auto" takes Triton, and impl="tilelang" says why not."""
    lacking = set()
    for program in ("hsa_fwd_token", "hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk"):
        for D, S, G in itertools.product((16, 32, 64, 96, 128, 192, 256), (16, 32, 64, 128), (1, 3, 5, 16, 32)):
            if not space(program, replace(PAPER, D=D, S=S, HQ=G, H=1)):
                lacking.add((program, D, S, G))
    # Two [S, D] accumulators exceed the registers of 256 threads; 32 rows exceed those of the one warp that S or D = 16
    # leaves.
    expected = {("hsa_bwd_dkdv_chunk", D, 128, G) for D in (192, 256) for G in (1, 3, 5, 16, 32)}
    expected |= {(program, D, 16, 32) for D in (192, 256) for program in ("hsa_fwd_token", "hsa_bwd_dq_token")}
    assert lacking == expected | {("hsa_bwd_dq_token", 16, 128, 32)}
