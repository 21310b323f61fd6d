"""The known faults of public implementations (OPERATOR.md, section 6), one regression test each.

Strided inputs, K and G that are not powers of two: test_attention.py. Top-k memory: test_retrieval.py.
"""

import itertools
import math

import pytest
import torch
from strategies import (
    Dims,
    attend,
    check,
    each_impl,
    largest_allocation,
    make_call,
    make_exact_call,
    peak_allocation,
    run,
)
from tiers import tiered

from hsa_tl import fusion_weights, retrieve_chunks
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.testing import assert_attention

S = 16


def _rows(indices: list[int]) -> torch.Tensor:
    """The same selection for each of 40 tokens."""
    return torch.tensor(indices, dtype=torch.int32).expand(1, 40, 1, len(indices))


def test_landmark_0_keeps_its_gradient():
    """Empty slots, clamped to chunk 0 and written rather than added, would wipe it."""
    q_slc, landmarks = torch.randn(1, 70, 1, 16), torch.randn(1, 5, 1, 16, requires_grad=True)
    scores, indices = retrieve_chunks(q_slc, landmarks, 4, chunk_size=S)
    assert (indices[:, 16:] == -1).any()  # rows that chose chunk 0 beside empty slots
    (gradient,) = torch.autograd.grad(scores.masked_fill(indices < 0, 0.0).sum(), landmarks)
    for i in range(5):
        times = (indices == i).sum(-1, keepdim=True)
        wanted = expect(lambda q, times=times: (q * times).sum(1) / 4, q_slc)
        assert_accurate(f"landmark {i}", gradient[:, i], wanted)


@each_impl
def test_empty_slot_inside_a_row_drops_no_later_slot(impl):
    call = make_exact_call(Dims(), seed=0)
    compact, spread = ([0, 2, -1], [0, -1, 2])
    actual = [
        run(impl, call._replace(weights=call.weights[..., order], indices=_rows(indices)), scale=0.25)
        for order, indices in (([0, 1, 2], compact), ([0, 2, 1], spread))
    ]
    assert (actual[1]["dweights"][..., 1] == 0).all()
    actual[1]["dweights"] = actual[1]["dweights"][..., [0, 2, 1]]
    assert all(torch.equal(actual[0][name], actual[1][name]) for name in actual[0])


@each_impl
def test_duplicates_add_up(impl):
    call = make_exact_call(Dims(), seed=0)
    twice = call._replace(indices=_rows([1, 0, 1]))
    once = twice._replace(
        weights=torch.stack(
            [call.weights[..., 0] + call.weights[..., 2], call.weights[..., 1], call.weights[..., 2]], -1
        ),
        indices=_rows([1, 0, -1]),
    )
    a, b = run(impl, twice, scale=0.25), run(impl, once, scale=0.25)
    b["dweights"][..., 2] = b["dweights"][..., 0]  # each of the two slots has the whole gradient
    assert all(torch.equal(a[name], b[name]) for name in a)


@each_impl
@pytest.mark.parametrize("low", (-100, -1000, -30000))
def test_scores_below_minus_88_give_no_nan(impl, low):
    """Every scaled score of chunk 1 is near `low`: exp(low) is 0 in float32, yet the chunk's softmax is ordinary."""
    call = make_call(Dims(HQ=2, H=2, D=32, K=2))
    q, k = (x.sign() * (x.abs() > 0.5) for x in (call.q, call.k))
    q[..., 0] = 1
    k[:, 16:32, :, 0] = low
    # Scores are whole numbers of bits: exact whether or not log2(e) is folded into the scale.
    actual = check(impl, call._replace(q=q, k=k), scale=math.log(2))
    assert all(torch.isfinite(x).all() for x in actual.values())


@each_impl
@pytest.mark.parametrize("bits", (200, -200))
def test_scores_whose_power_of_two_is_out_of_range(impl, bits):
    """2^200 and 2^-200 are no float32; the norms of q and k bound the scores as tightly as they can."""
    call = make_call(Dims(HQ=2, H=2, D=32, K=2))
    q, k = torch.zeros_like(call.q), call.k.round()
    q[..., 0] = 1
    k[..., 0] += bits
    actual = check(impl, call._replace(q=q, k=k), scale=math.log(2))
    assert all(torch.isfinite(x).all() for x in actual.values())


def _call_at(T: int):
    call = make_call(Dims(T=T, T_kv=T, HQ=1, D=32, K=2))
    return [x.requires_grad_() for x in call[:4]], call.indices, call.do


@pytest.mark.parametrize("impl", ("reference", "tilelang"))  # the interpreter of triton copies every buffer
def test_memory_is_linear_in_tokens(impl):
    """Neither direction builds a (T, N) mask, of bytes even: no allocation is larger than its half."""
    T = 16384
    leaves, indices, do = _call_at(T)

    def step():
        out = attend(impl)(*leaves, indices, chunk_size=S)
        torch.autograd.grad(out, leaves, do)

    assert largest_allocation(step) <= T * (T // S) // 2


@pytest.mark.parametrize(
    "impl", tiered(("reference", "tilelang", "tilelang-union", "tilelang-chunk"), quick=("reference",))
)
def test_peak_memory_is_linear_in_tokens(impl):
    """Forward and backward at 8K, 16K and 32K tokens: beside blocks of a fixed size each doubling doubles the peak."""
    peaks = []
    for T in (64, 8192, 16384, 32768):  # 64: to compile
        leaves, indices, do = _call_at(T)

        def step(leaves=leaves, indices=indices, do=do):
            out = attend(impl)(*leaves, indices, chunk_size=S)
            torch.autograd.grad(out, leaves, do)

        peaks.append(peak_allocation(step))
    more = [b - a for a, b in itertools.pairwise(peaks[1:])]
    assert more[1] / more[0] == pytest.approx(2, rel=0.05), peaks
    assert peaks[1] - more[0] <= 8 * 2**20, peaks


@each_impl
def test_autograd_keeps_only_the_inputs_and_the_pairs(impl):
    T = 96
    leaves, indices, do = _call_at(T)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attend(impl)(*leaves, indices, chunk_size=S)
    inputs = {x.untyped_storage().data_ptr() for x in (*leaves, indices)}
    extra = [x for x in saved if x.untyped_storage().data_ptr() not in inputs]
    # The inverted index: a number for each slot and an offset for each chunk.
    assert sum(x.numel() for x in extra) <= indices.numel() + T // S + 1
    torch.autograd.grad(out, leaves, do)


@each_impl
def test_chunked_prefill_equals_one_shot(impl):
    T, K = 70, 3
    call = make_call(Dims(T=T, T_kv=T))
    q_slc, landmarks = torch.randn(1, T, 1, 16), torch.randn(1, 5, 1, 16)
    scores, indices = retrieve_chunks(q_slc, landmarks, K, chunk_size=S)
    whole = attend(impl)(*call[:3], fusion_weights(scores), indices, chunk_size=S)
    parts = []
    for start, stop in ((0, 7), (7, 48), (48, 49), (49, T)):
        part = slice(start, stop)
        s, i = retrieve_chunks(q_slc[:, part], landmarks, K, chunk_size=S, q_start=start)
        assert torch.equal(i, indices[:, part])
        parts.append(attend(impl)(call.q[:, part], *call[1:3], fusion_weights(s), i, chunk_size=S))
    exact = call._replace(weights=fusion_weights(scores), indices=indices)
    for out in (whole, torch.cat(parts, 1)):
        assert_attention({"out": out}, exact, chunk_size=S)


def test_sequences_of_different_lengths_keep_their_landmarks():
    """A packed batch: every landmark of every sequence that a later token can see is chosen, and has a gradient."""
    lengths = [40, 17, 0, 33]
    chunks = [-(-n // S) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q_slc, landmarks = torch.randn(1, 90, 1, 16), torch.randn(1, sum(chunks), 1, 16, requires_grad=True)
    scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, cu_seqlens=cu_seqlens)
    (gradient,) = torch.autograd.grad(scores.masked_fill(indices < 0, 0.0).sum(), landmarks)
    visible = [i < (n - 1) // S for n, c in zip(lengths, chunks, strict=True) for i in range(c)]
    assert (gradient != 0).any(-1)[0, :, 0].tolist() == visible
