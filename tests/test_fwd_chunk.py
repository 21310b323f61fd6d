"""hsa_fwd_chunk alone, on the CPU target: the pairs' outputs, how they are stored, and how they sum to the oracle's."""

from dataclasses import replace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import Dims, attend, make_call, seeds
from tiers import prove

from hsa_tl import cases
from hsa_tl.autotune import static
from hsa_tl.impl import tilelang
from hsa_tl.impl.tilelang import Call
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config import why_illegal
from hsa_tl.kernels_tilelang.config_base import WARPGROUP, blocks_per_sm, launch_registers, registers_left
from hsa_tl.kernels_tilelang.hsa_fwd_chunk import FwdChunkConfig
from hsa_tl.kernels_tilelang.hsa_fwd_chunk_sm90a import FwdChunkSm90aConfig
from hsa_tl.pairs import Pairs, partial_window, sort_pairs
from hsa_tl.testing import Inputs, assert_attention

STATIC = (
    {"HQ": 4, "H": 2, "D": 32, "K": 2},
    {"HQ": 3, "H": 1, "D": 16, "K": 3, "per_head": True},
)
PAPER = cases.case("paper-d128").problem


@st.composite
def calls(draw) -> tuple[Dims, Inputs]:
    T = draw(st.integers(8, 40))
    static = draw(st.sampled_from(STATIC))
    # The second key's program masks: its last chunk is short. The first one's chunks are whole.
    T_kv = draw(st.integers(33, 47)) if static["K"] == 3 else 16 * draw(st.integers(1, 3))
    d = Dims(B=draw(st.integers(1, 2)), T=T, T_kv=T_kv, **static)
    return d, make_call(d, draw(seeds))


def poisoned(d: Dims, call: Inputs) -> Inputs:
    """NaN in the keys and values of every chunk that nobody chose."""
    c = torch.arange(d.T_kv) // d.S
    chosen = (call.indices[..., None] == torch.arange(d.N)).any(1).any(2)  # [B, H, N]
    unused = ~chosen.transpose(1, 2)[:, c, :, None]  # [B, T_kv, H, 1]
    return call._replace(k=call.k.masked_fill(unused, torch.nan), v=call.v.masked_fill(unused, torch.nan))


def partials(
    d: Dims, call: Inputs, windows: list[tuple[int, int]], reduce_add: int, block_M: int, splits: int = 1
) -> list[torch.Tensor]:
    """What the program leaves in `partial` for each window of tokens; buffers begin as NaN, or as 0 with reduce_add."""
    masked, G = d.T_kv % d.S > 0, d.HQ // d.H
    k, v = (F.pad(x, (0, 0, 0, 0, 0, d.N * d.S - d.T_kv)).unflatten(1, (d.N, d.S)) for x in (call.k, call.v))
    chunk_len = (d.T_kv - d.S * torch.arange(d.N)).clamp(max=d.S).int() if masked else None
    pair, offsets = sort_pairs(call.indices, d.N)
    c = Call.of(call.q, k, v, call.weights, call.indices, Pairs(pair, offsets), chunk_len, d.D**-0.5)
    config = FwdChunkConfig(block_M=block_M, threads=128, reduce_add=reduce_add)
    kernel = compile.kernel("hsa_fwd_chunk", c.problem, config)
    partial, results = torch.zeros(c.q.shape), []
    segment = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    token = pair[: len(segment)] // d.K
    for start, stop in windows:
        before, inside = (
            torch.bincount(segment[x], minlength=len(offsets) - 1)
            for x in (token < start, (token >= start) & (token < stop))
        )
        begin = offsets[:-1] + before
        if not reduce_add:
            partial = torch.full((d.B, d.H, (stop - start) * d.K, G, d.D), torch.nan)
        kernel(c.q, c.k, c.v, c.weights, pair, begin, begin + inside, splits, start, c.chunk_len, c.scale, partial)
        results.append(partial)
    return results


def summed(d: Dims, call: Inputs, parts: list[torch.Tensor]) -> torch.Tensor:
    """out [B, T, HQ, D] from the partials of consecutive windows; each real pair is stored, nothing else is."""
    partial = torch.cat(parts, 2).unflatten(2, (d.T, d.K)).permute(0, 2, 1, 3, 4, 5)  # [B, T, H, K, G, D]
    real = (call.indices >= 0)[..., None, None].expand_as(partial)
    assert torch.equal(partial.isnan(), ~real)
    return torch.where(real, partial, 0.0).double().sum(3).float().flatten(2, 3)


@hypothesis.settings(max_examples=12)
@hypothesis.given(drawn=calls(), reduce_add=st.integers(0, 1), split=st.floats(0, 1), splits=st.integers(1, 4))
def test_sums_to_the_oracle(drawn, reduce_add, split, splits):
    d, call = drawn
    middle = round(split * d.T)
    windows = [(0, middle), (middle, d.T)] if 0 < middle < d.T else [(0, d.T)]
    parts = partials(d, poisoned(d, call), windows, reduce_add, block_M=16, splits=splits)
    out = parts[-1].flatten(2, 3) if reduce_add else summed(d, call, parts)
    assert_attention({"out": out}, call, chunk_size=d.S)


SMALL = {"block_M": 16, "threads": 128}


def test_the_operator_adds_rows_up_or_keeps_them_in_windows(monkeypatch):
    """Windows that fit 2 GiB, or what HSA_TL_PARTIAL_BYTES says: here 8 of the 40 tokens."""
    d, limits = Dims(**STATIC[0]), []
    call = make_call(d, 0)
    monkeypatch.setattr(tilelang, "partial_window", lambda p, limit: limits.append(limit) or partial_window(p, limit))
    monkeypatch.delenv("HSA_TL_PARTIAL_BYTES", raising=False)
    for changes, limit in (({"reduce_add": 1}, None), ({}, None), ({}, 8 * d.HQ * d.D * d.K * 4)):
        if limit:
            monkeypatch.setenv("HSA_TL_PARTIAL_BYTES", str(limit))
        out = attend("tilelang")(*call[:5], chunk_size=16, config={"hsa_fwd_chunk": SMALL | changes})
        assert_attention({"out": out}, call, chunk_size=16)
    assert limits == [2 * 1024**3, limit]
    monkeypatch.setenv("HSA_TL_PARTIAL_BYTES", "2g")
    with pytest.raises(ValueError, match="HSA_TL_PARTIAL_BYTES must be a number of bytes, got '2g'"):
        attend("tilelang")(*call[:5], chunk_size=16, config={"hsa_fwd_chunk": SMALL})


def test_many_tiles_and_a_long_segment():
    """One chunk takes most pairs, another none, and block_M = 64 leaves the last tile nearly empty."""
    d = Dims(B=1, T=70, T_kv=48, **STATIC[0])
    call = make_call(d, 0)
    call = call._replace(indices=torch.where(call.indices == 1, 0, call.indices))
    call.indices[0, :, 1] = 0  # every slot twice the same chunk
    whole, halves = (partials(d, poisoned(d, call), w, 0, 64) for w in ([(0, 70)], [(0, 33), (33, 70)]))
    assert torch.equal(torch.cat(halves, 2).nan_to_num(), whole[0].nan_to_num())
    assert_attention({"out": summed(d, call, whole)}, call, chunk_size=d.S)


def test_nobody_chose_anything():
    d = Dims(B=1, T=8, T_kv=32, **STATIC[0])
    call = make_call(d, 0)
    call.indices.fill_(-1)
    assert partials(d, call, [(0, 8)], 0, 16)[0].isnan().all()


@pytest.mark.parametrize(
    "changes, config, words",
    [
        ({"HQ": 4}, FwdChunkSm90aConfig(), "it needs G % 8 == 0, D 64 or 128, 16 bits, got 4, 128"),
        ({"D": 96}, FwdChunkSm90aConfig(), "got 16, 96, bfloat16"),
        ({"dtype": torch.float32}, FwdChunkSm90aConfig(), "got 16, 128, float32"),
        ({}, FwdChunkSm90aConfig(block_M=64), "needs block_M 128 >= G, threads 256, got 64, 256"),
        ({}, FwdChunkSm90aConfig(num_stages=0), "num_stages must be at least 1, got 0"),
        ({"HQ": 256}, FwdChunkSm90aConfig(), "needs block_M 128 >= G, threads 256, got 128, 256"),
        ({}, FwdChunkConfig(block_M=32), "a multiple of 64, got 32"),
    ],
)
def test_why_illegal_says_what_and_why(changes, config, words):
    program = "hsa_fwd_chunk" if type(config) is FwdChunkConfig else "hsa_fwd_chunk_sm90a"
    assert words in why_illegal(program, replace(PAPER, **changes), config)


@pytest.mark.parametrize("D, blocks", [(128, 1), (64, 2)])
def test_registers_that_the_producer_gives_back_are_the_consumers_gain(D, blocks):
    """setmaxnreg waits for ever if a CTA's warpgroups ask for more than it was launched with."""
    problem, config = replace(PAPER, D=D), FwdChunkSm90aConfig()
    assert blocks_per_sm(config, problem) == blocks
    launched = launch_registers(config, blocks)
    kept = config.threads * registers_left(config, blocks) + WARPGROUP * config.producer_registers
    assert kept <= launched * config.total_threads() and config.producer_registers < launched


@prove
@pytest.mark.static
@pytest.mark.parametrize("changes", [{"masked": True, "per_head": True}, {"HQ": 24, "D": 64, "S": 128, "masked": True}])
@pytest.mark.parametrize("reduce_add", [0, 1])
def test_the_specialised_program_assembles_off_the_papers_shape(changes, reduce_add):
    """The cases tagged ci reach it with whole chunks and a weight for each key/value head only."""
    problem, config = replace(PAPER, **changes), FwdChunkSm90aConfig(reduce_add=reduce_add)
    if static.missing_tools():
        assert not static.barrier_in_elected_branch(compile.lower("hsa_fwd_chunk_sm90a", problem, config).kernel_source)
    else:
        (found,) = static.analyse("hsa_fwd_chunk_sm90a", problem, [config])
        assert static.faults(static.row("", "hsa_fwd_chunk_sm90a", problem, config, found)) == []
