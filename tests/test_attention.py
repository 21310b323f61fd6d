"""Both attentions on every implementation: outputs and all gradients against the float64 oracle, case by case."""

import itertools

import pytest
import torch
from strategies import (
    Dims,
    assert_all_accurate,
    attend,
    check,
    check_selected,
    each_attention,
    each_impl,
    make_call,
    run,
)
from tiers import tiered

from hsa_tl import fusion_weights, retrieve_chunks
from hsa_tl.accuracy import expect
from hsa_tl.oracle import attention_oracle, retrieve_oracle
from hsa_tl.testing import Inputs, assert_attention

PLAIN = Dims()

# Dims that differ from the defaults, each for a reason. TileLang compiles for each G, D, S, K, short chunk or not, and
# heads of the weights.
DIMS = {
    "plain": PLAIN,
    "tail": Dims(T=41, T_kv=41),
    "one-key-in-last-chunk": Dims(T_kv=49),
    "shorter-than-a-chunk": Dims(T=7, T_kv=7),
    "one-token": Dims(B=16, T=1),
    "more-keys-than-queries": Dims(T=5, T_kv=90),
    "more-queries-than-keys": Dims(T=30, T_kv=17),
    "mha": Dims(HQ=2, H=2, D=32, K=2),
    "g16-one-slot": Dims(HQ=16, K=1),
    "two-kv-heads": Dims(HQ=6, H=2),
    "batch": Dims(B=2, T=20, T_kv=41, HQ=6, H=2),
    "weights-per-query-head": Dims(HQ=6, H=2, per_head=True),
    "more-slots-than-chunks": Dims(T=20, T_kv=16),
    "chunk-of-32": Dims(T_kv=80, S=32, K=2),
}
QUICK_DIMS = ("tail", "shorter-than-a-chunk", "one-token", "g16-one-slot", "batch", "more-slots-than-chunks")


def _per_slot(call: Inputs, indices: list[int]) -> Inputs:
    """The same indices for every token."""
    return call._replace(indices=torch.tensor(indices, dtype=torch.int32).expand_as(call.indices).contiguous())


@each_attention
@pytest.mark.parametrize("dims", tiered(DIMS, quick=QUICK_DIMS))
def test_dims(impl, of, dims):
    check(impl, of(make_call(dims)), chunk_size=dims.S)


SELECTIONS = {
    "all-empty": [-1, -1, -1],
    "empty-in-the-middle": [2, -1, 0],
    "empty-first": [-1, 1, 2],
    "duplicates": [1, 1, 1],
    "duplicates-around-empty": [2, -1, 2],
    "descending": [2, 1, 0],
}


@each_attention
@pytest.mark.parametrize("indices", SELECTIONS.values(), ids=SELECTIONS)
def test_selection(impl, of, indices):
    actual = check(impl, of(_per_slot(make_call(Dims(T_kv=41)), indices)))
    if max(indices) < 0:
        assert all((x == (-torch.inf if name == "lse" else 0)).all() for name, x in actual.items())


@each_attention
def test_gradient_of_a_chunk_nobody_selected_is_zero(impl, of):
    actual = check(impl, of(_per_slot(make_call(Dims(T_kv=60)), [0, -1, 2])))
    for name in ("dk", "dv"):
        unselected = torch.cat([actual[name][:, 16:32], actual[name][:, 48:]], 1)
        assert (unselected == 0).all()


@each_attention
@pytest.mark.parametrize("scale", (0.0, 1.5))
def test_scale(impl, of, scale):
    check(impl, of(make_call(Dims(T_kv=41))), scale=scale)


@each_attention
def test_scores_far_below_zero_beside_an_empty_slot(impl, of):
    """What stands in for an empty slot's scores must not be large beside them; no 0 * inf."""
    call = make_call(Dims(T_kv=41))
    call = call._replace(q=30 * call.q.abs(), k=-30 * call.k.abs())
    for indices in ([0, -1, 2], [1, 1, 2]):
        check(impl, of(_per_slot(call, indices)))


@each_attention
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_numbers_of_an_unselected_chunk_are_not_read(impl, of, value):
    """Empty slots must not read chunk 0 and multiply by 0."""
    call = of(make_call(Dims()))
    call = call._replace(indices=torch.where(call.indices == 0, -1, call.indices))
    bad = call._replace(k=call.k.clone(), v=call.v.clone())
    bad.k[:, :16], bad.v[:, :16] = value, value
    clean, actual = run(impl, call), run(impl, bad)
    assert all(torch.equal(actual[name], clean[name]) for name in clean)


@each_impl
@pytest.mark.parametrize("per_head", tiered((False, True), quick=(True,)))
def test_the_weight_of_an_empty_slot_is_not_read(impl, per_head):
    call = _per_slot(make_call(Dims(T=10, T_kv=41, HQ=6, H=2, per_head=per_head)), [2, -1, 0])
    bad = call._replace(weights=call.weights.clone())
    bad.weights[..., 1] = torch.nan
    clean, actual = run(impl, call), run(impl, bad)
    assert all(torch.equal(actual[name], clean[name]) for name in clean)


@each_attention
@pytest.mark.parametrize("dims", (Dims(T=0), Dims(B=0)), ids=("no-token", "no-batch"))
def test_nothing_to_do(impl, of, dims):
    actual = check(impl, of(make_call(dims)))
    assert all((x == 0).all() for x in actual.values())


def test_one_of_everything():
    d = Dims(T=1, T_kv=1, HQ=1, D=1, K=1)
    check("reference", make_call(d, low=0))
    check_selected("reference", d)


def _strided(call: Inputs) -> Inputs:
    """The same values as views: heads before tokens, k and v in one buffer, every other column, weights transposed."""
    kv = torch.cat([call.k, call.v], -1)
    D = call.k.shape[-1]
    wide = torch.randn(*call.do.shape[:3], 2 * D)
    wide[..., ::2] = call.do
    strided = Inputs(
        q=call.q.transpose(1, 2).contiguous().transpose(1, 2),
        k=kv[..., :D],
        v=kv[..., D:],
        weights=call.weights.mT.contiguous().mT,
        indices=call.indices.transpose(1, 3).contiguous().transpose(1, 3),
        do=wide[..., ::2],
    )
    assert all(torch.equal(a, b) and not a.is_contiguous() for a, b in zip(strided, call, strict=True))
    return strided


@each_attention
@pytest.mark.parametrize("T_kv", (48, 41))
def test_strided_inputs(impl, of, T_kv):
    check(impl, of(_strided(make_call(Dims(B=2, T=20, T_kv=T_kv, HQ=6, H=2)))))


@each_attention
def test_broadcast_incoming_gradient(impl, of):
    call = of(make_call(Dims()))
    check(impl, call._replace(do=torch.ones(()).expand_as(call.do)))


@each_attention
def test_chunk_of_one_key(impl, of):
    """P is 1 whatever the score, so dq and dk vanish but for dlse's part, up to the rounding of what cancels."""
    check(impl, of(make_call(Dims(B=16, T=1, T_kv=1))))


PACKED = {
    "lengths": [20, 33, 16],
    "empty-sequence": [20, 0, 21],
    "empty-first-and-last": [0, 20, 0],
    "shorter-than-a-chunk": [7, 17, 1],
    "one-sequence": [25],
}


def make_packed(lengths: list[int], dims: Dims = PLAIN) -> tuple[Inputs, torch.Tensor]:
    T = sum(lengths)
    call = make_call(dims._replace(T=T, T_kv=T))
    limit = torch.cat([torch.full((n,), -(-n // dims.S)) for n in lengths])[:, None, None]
    indices = torch.randint(0, 1 << 20, call.indices.shape) % (limit + 1) - 1
    return call._replace(indices=indices.int()), torch.tensor([0, *lengths]).cumsum(0).int()


@each_attention
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed(impl, of, lengths):
    call, cu_seqlens = make_packed(lengths)
    check(impl, of(call), cu_seqlens=cu_seqlens)


@each_attention
def test_packed_equals_separate_calls(impl, of):
    call, cu_seqlens = make_packed([20, 0, 7, 18], Dims(per_head=True))
    call, ends = of(call), cu_seqlens.tolist()
    parts = [run(impl, type(call)(*(x[:, a:b] for x in call))) for a, b in itertools.pairwise(ends) if b > a]
    separate = {name: torch.cat([p[name] for p in parts], 1) for name in parts[0]}
    for results in (run(impl, call, cu_seqlens=cu_seqlens), separate):
        assert_attention(results, call, cu_seqlens=cu_seqlens, chunk_size=16)


@each_impl
def test_retrieval_to_output(impl):
    """The whole block, gradients to retrieval included: rows with few visible chunks or none."""
    B, T, H, D, K = 1, 60, 2, 16, 3
    call = make_call(Dims(B=B, T=T, T_kv=T, HQ=6, H=H, D=D, K=K))
    q_slc, landmarks = torch.randn(B, T, H, D), torch.randn(B, -(-T // 16), H, D)

    def block(retrieve, attention, q_slc, landmarks, call, **options):
        leaves = [x.detach().requires_grad_() for x in (q_slc, landmarks, *call[:3])]
        scores, indices = retrieve(*leaves[:2], K, chunk_size=16)
        out = attention(*leaves[2:], fusion_weights(scores), indices, chunk_size=16, **options)
        gradients = torch.autograd.grad(out, leaves, call.do)
        return dict(zip(("out", "dq_slc", "dlandmarks", "dq", "dk", "dv"), (out, *gradients), strict=True))

    actual = block(retrieve_chunks, attend(impl), q_slc, landmarks, call)
    wanted = expect(
        lambda *x: block(retrieve_oracle, attention_oracle, *x[:2], Inputs(*x[2:])), q_slc, landmarks, *call
    )
    assert (actual["out"][:, :16] == 0).all()
    assert (actual["dlandmarks"][:, 0] != 0).any()
    assert_all_accurate(actual, wanted)


@each_attention
def test_unchecked_an_index_out_of_range_is_an_empty_slot(impl, of):
    """validate=False holds on a CPU too."""
    good = of(make_call(PLAIN))
    values = torch.tensor([PLAIN.N, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wild = values[torch.arange(good.indices.numel()).view_as(good.indices) % 4]
    outside = torch.rand(good.indices.shape) < 0.3
    empty, bad = (good._replace(indices=torch.where(outside, x, good.indices)) for x in (torch.tensor(-1).int(), wild))
    a, b = (run(impl, x, validate=False) for x in (empty, bad))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, 3\)"):
        run(impl, bad)
