"""The accuracy rule: it passes every correct implementation and catches small faults; the oracle's own gradients."""

import functools
import inspect
import itertools
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import TYPES, Dims, attend, hard_calls, make_call, seeds
from tiers import prove

from hsa_tl import hsa_attention, retrieve_chunks, selected_attention
from hsa_tl.accuracy import assert_accurate, complaints, expect
from hsa_tl.oracle import (
    attention_oracle,
    expect_attention,
    expect_scores,
    expect_selected,
    retrieve_oracle,
    selected_oracle,
)
from hsa_tl.testing import (
    Inputs,
    assert_attention,
    check_attention,
    check_retrieval,
    make_selection,
    run_with_gradients,
)

each_type = pytest.mark.parametrize("dtype", TYPES, ids=[str(t).removeprefix("torch.") for t in TYPES])
# Each of one and of several heads, and of the paper's.
QUICK = ((1, 1), (4, 4), (16, 2))
SHAPES = [
    pytest.param(G, K, id=f"G{G}-K{K}", marks=() if (G, K) in QUICK else prove)
    for G in (1, 4, 16)
    for K in (1, 2, 3, 4)
]
each_shape = pytest.mark.parametrize("G, K", SHAPES)
S = 16


def causal_call(dtype, G=1, K=1, T=128, H=1, D=32, seed=0) -> Inputs:
    """Causal random selections and softmax weights, as a layer has them."""
    call = make_call(Dims(T=T, T_kv=T, HQ=G * H, H=H, D=D, S=S, K=K), seed)
    indices = make_selection(1, T, H, K, S, seed=seed)
    weights = call.weights.masked_fill(indices < 0, -1e9).softmax(-1).masked_fill(indices < 0, 0.0)
    q, k, v, do = (x.to(dtype) for x in (call.q, call.k, call.v, call.do))
    return Inputs(q, k, v, weights, indices, do)


def kernel(
    call: Inputs, kept: torch.dtype, *, chunk_size: int = S, fold: bool = True, sums: torch.dtype = torch.float32,
    mask_key: int | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a GPU's kernel does, in PyTorch: float32 but for what it keeps in a type of fewer bits.

    fold: whether the weight goes into P before it is rounded. sums: the type that running sums are kept in, and
    mask_key: a key of the second chunk that is left out, both to be wrong.
    """
    q, k, v, weights, indices, do = (x.float() if x.is_floating_point() else x for x in call)
    (_, _, HQ, D), H, GW = q.shape, k.shape[2], weights.shape[2] // k.shape[2]
    G, scale = HQ // H, D**-0.5
    keep = lambda x: x.to(kept).float()  # noqa: E731
    add = lambda total, x: (total + x).to(sums).float()  # noqa: E731
    out, dq, dk, dv, dweights = (torch.zeros_like(x) for x in (q, q, k, v, weights))
    for b in range(len(q)):
        for h in range(H):
            heads, own = slice(h * G, (h + 1) * G), slice(h * GW, (h + 1) * GW)
            for c in range(-(-k.shape[1] // chunk_size)):
                keys = slice(c * chunk_size, (c + 1) * chunk_size)
                k_c, v_c = k[b, keys, h], v[b, keys, h]
                for slot in range(indices.shape[3]):
                    (t,) = (indices[b, :, h, slot] == c).nonzero(as_tuple=True)
                    w = weights[b, t, own, slot][..., None]
                    q_t, do_t = q[b, t, heads], do[b, t, heads]
                    s = q_t @ k_c.T * scale
                    if mask_key is not None and c == 1:
                        s[..., mask_key] = -torch.inf
                    p = s.softmax(-1)
                    wp = keep(w * p) if fold else w * keep(p)
                    dp = do_t @ v_c.T
                    delta = (p * dp).sum(-1, keepdim=True)
                    ds = keep(w * p * (dp - delta) * scale)
                    out[b, t, heads] = add(out[b, t, heads], keep(wp @ v_c))
                    dq[b, t, heads] = add(dq[b, t, heads], keep(ds @ k_c))
                    dweights[b, t, own, slot] = delta[..., 0] if GW == G else delta.sum(1)
                    if sums == torch.float32:
                        dv[b, keys, h] += torch.einsum("tgs,tgd->sd", wp, do_t)
                        dk[b, keys, h] += torch.einsum("tgs,tgd->sd", ds, q_t)
                    else:  # a token at a time
                        for i in range(len(t)):
                            dv[b, keys, h] = add(dv[b, keys, h], wp[i].T @ do_t[i])
                            dk[b, keys, h] = add(dk[b, keys, h], ds[i].T @ q_t[i])
    named = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {name: x.to(call.q.dtype) for name, x in named.items()} | {"dweights": dweights}


# --- No correct implementation fails ---------------------------------------------------------------------------------


@prove
@hypothesis.settings(max_examples=1000)
@hypothesis.given(hard_calls(), st.booleans())
def test_a_correct_kernel_passes(drawn, fold):
    """In every type, with the weight folded into P and not: 1,000 hard calls, a minute."""
    call, chunk_size = drawn
    kept = call.q.dtype
    assert_attention(kernel(call, kept, chunk_size=chunk_size, fold=fold), call, chunk_size=chunk_size)


EXAMPLES = {"reference": 700, "tilelang": 100, "tilelang-union": 100, "tilelang-chunk": 100, "triton": 40}


@prove
@pytest.mark.parametrize("impl", EXAMPLES)
def test_every_implementation_passes(impl):
    """With the thousand above, 2,000 hard calls; the interpreted and the compiled ones in float32."""
    static = None if impl == "reference" else {"HQ": 3, "D": 16, "K": 3}
    dtypes = TYPES if impl == "reference" else (torch.float32,)

    @hypothesis.settings(max_examples=EXAMPLES[impl])
    @hypothesis.given(hard_calls(dtypes, static))
    def holds(drawn):
        call, chunk_size = drawn
        assert_attention(run_with_gradients(attend(impl), call, chunk_size=chunk_size), call, chunk_size=chunk_size)

    holds()


@hypothesis.given(hard_calls())
def test_the_reference_passes(drawn):
    call, chunk_size = drawn
    assert_attention(run_with_gradients(hsa_attention, call, chunk_size=chunk_size), call, chunk_size=chunk_size)


ON_ANOTHER_CPU = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from test_accuracy import TYPES, causal_call, S
from hsa_tl import hsa_attention
from hsa_tl.testing import check_attention, run_with_gradients
for dtype in TYPES:
    for seed in range(4):
        call = causal_call(dtype, 4, 3, 150, 2, 48, seed)
        if found := check_attention(run_with_gradients(hsa_attention, call, chunk_size=S), call, chunk_size=S):
            sys.exit(str(found))
"""


WIDTHS = ("default", "avx2", "avx512")


@prove
@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize("capability", WIDTHS)
def test_no_vector_width_and_no_number_of_threads_fails(capability, threads, monkeypatch):
    """Nine processes of 5 s; PyTorch would run instructions that the CPU lacks, and be killed for them."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    if widest in WIDTHS and WIDTHS.index(capability) > WIDTHS.index(widest):
        pytest.skip(f"this CPU has {widest} at most")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    run = subprocess.run([sys.executable, "-c", ON_ANOTHER_CPU, str(threads)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@hypothesis.settings(max_examples=20)
@hypothesis.given(T=st.integers(1, 40), T_kv=st.integers(1, 50), per_head=st.booleans(), seed=seeds)
def test_the_expected_gradients_are_autograd_s(T, T_kv, per_head, seed):
    """Two derivations of one thing: the formulas with units, and autograd through the plain equations."""
    call = make_call(Dims(T=T, T_kv=T_kv, HQ=6, H=2, per_head=per_head), seed)
    call = Inputs(*(x.double() if x.is_floating_point() else x for x in call))
    wanted = run_with_gradients(attention_oracle, call, chunk_size=S, scale=0.3)
    for name, found in expect_attention(*call, chunk_size=S, scale=0.3).items():
        torch.testing.assert_close(found.value, wanted[name])
        assert ((found.unit > 0) | (wanted[name] == 0)).all()


def test_the_expected_gradients_of_packed_sequences():
    call = make_call(Dims(T=40, T_kv=40))
    call = Inputs(*(x.double() if x.is_floating_point() else x for x in call))._replace(
        indices=call.indices.clamp(max=0)
    )
    ends = [0, 17, 17, 40]

    def each_sequence(*tensors):
        parts = itertools.pairwise(ends)
        return torch.cat([attention_oracle(*(x[:, a:b] for x in tensors), chunk_size=S) for a, b in parts], 1)

    wanted, cu_seqlens = run_with_gradients(each_sequence, call), torch.tensor(ends, dtype=torch.int32)
    for name, found in expect_attention(*call, chunk_size=S, cu_seqlens=cu_seqlens).items():
        torch.testing.assert_close(found.value, wanted[name])


# --- Faults are caught -----------------------------------------------------------------------------------------------


def _one_in_a_hundred(call: Inputs) -> torch.Tensor:
    """Places [n, 4] of slots that hold a chunk."""
    slots = (call.indices >= 0).nonzero()
    return slots[torch.randperm(len(slots))[: max(1, len(slots) // 100)]]


def _all_scaled(call, right, name):
    factor = 1.0001 if call.q.dtype == torch.float32 else 1.01
    return {name: (right[name].double() * factor).to(right[name].dtype)}


def _a_weight_off(call, right):
    weights = call.weights.clone()
    weights[tuple(_one_in_a_hundred(call).T)] *= 1.05
    return kernel(call._replace(weights=weights), call.q.dtype)


def _an_index_off(call, right):
    at = tuple(_one_in_a_hundred(call).T)
    indices = call.indices.clone()
    indices[at] = torch.where(indices[at] > 0, indices[at] - 1, indices[at] + 1)
    return kernel(call._replace(indices=indices), call.q.dtype)


def _dweights_without_a_head(call, right):
    one = call._replace(q=call.q[:, :, :1], do=call.do[:, :, :1])
    return {"dweights": right["dweights"] - kernel(one, call.q.dtype)["dweights"]}


def _sums_of_16_bits(call, right):
    return kernel(call, call.q.dtype, sums=torch.bfloat16 if call.q.dtype == torch.float32 else call.q.dtype)


FAULTS = {
    **{f"all of {n} scaled": functools.partial(_all_scaled, name=n) for n in ("out", "dq", "dk", "dv", "dweights")},
    "one weight in a hundred off by 5 %": _a_weight_off,
    "one index in a hundred off by one": _an_index_off,
    "one key of a chunk masked": lambda call, right: kernel(call, call.q.dtype, mask_key=5),
    "dweights without one head": _dweights_without_a_head,
    "dk without the scale": lambda call, right: {"dk": right["dk"] * call.q.shape[-1] ** 0.5},
    "sums kept in 16 bits": _sums_of_16_bits,
}


@each_type
@each_shape
def test_faults_are_caught(dtype, G, K):
    """Each fault alone, beside right results that pass."""
    call = causal_call(dtype, G, K)
    right = kernel(call, dtype)
    assert check_attention(right, call, chunk_size=S) == []
    expected = expect_attention(*call, chunk_size=S)
    for name, fault in FAULTS.items():
        if G > 1 or fault is not _dweights_without_a_head:
            wrong = fault(call, right)
            assert any(complaints(n, x, expected[n]) for n, x in wrong.items()), name


def test_the_check_takes_the_operators_chunk_size():
    """Where neither is told."""
    call = make_call(Dims(T=20, T_kv=200, S=64))
    assert check_attention({"out": hsa_attention(*call[:5])}, call) == []
    assert check_attention({"out": hsa_attention(*call[:5])}, call, chunk_size=128) != []


def test_the_oracles_have_the_operators_defaults():
    oracles = {
        hsa_attention: (attention_oracle, expect_attention, check_attention),
        selected_attention: (selected_oracle, expect_selected),
        retrieve_chunks: (retrieve_oracle, expect_scores),
    }
    for operator, its in oracles.items():
        wanted = inspect.signature(operator).parameters
        for oracle in its:
            for name, p in inspect.signature(oracle).parameters.items():
                assert name not in wanted or p.default in (p.empty, wanted[name].default), (oracle, name)


def test_what_is_not_a_number_is_told():
    call = causal_call(torch.bfloat16)
    right = kernel(call, torch.bfloat16)
    for value, word in ((torch.nan, "nan"), (torch.inf, "inf")):
        wrong = right["out"].clone()
        wrong[0, 50, 0, 3] = value
        assert check_attention({"out": wrong}, call, chunk_size=S) == [
            f"out: {word} at [0, 50, 0, 3] differs from the oracle"
        ]
    (line,) = check_attention({"out": right["out"][:, :-1]}, call, chunk_size=S)
    assert line.startswith("out: shape [1, 127")
    wrong = right["out"].clone()
    wrong[0, 3] = 1e-30  # before the first whole chunk
    (line,) = check_attention({"out": wrong}, call, chunk_size=S)
    assert "where 0 is exact" in line
    with pytest.raises(ValueError, match="results must be among out, dq, dk, dv, dweights, got"):
        check_attention({"dp": wrong}, call, chunk_size=S)
    with pytest.raises(AssertionError, match="where 0 is exact"):
        assert_attention({"out": wrong}, call, chunk_size=S)


def test_beyond_the_range_of_float16_is_inf():
    call = causal_call(torch.float16)
    call = call._replace(v=(call.v.sign() * 6e4).half(), weights=call.weights * 4)
    out = hsa_attention(*call[:5], chunk_size=S)
    assert out.isinf().any()
    assert check_attention({"out": out}, call, chunk_size=S) == []
    assert check_attention({"out": out.nan_to_num(posinf=1.0, neginf=1.0)}, call, chunk_size=S)


@hypothesis.given(rows=st.integers(1, 40), inner=st.integers(1, 300), seed=seeds)
def test_other_results_are_counted_by_what_moved_operations_give(rows, inner, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, inner, generator=g), torch.randn(inner, 7, generator=g)
    f = lambda a, b: {"product": a @ b, "softmax": (a @ b).softmax(-1), "sum": a.exp().sum(-1)}  # noqa: E731
    wanted, actual = expect(f, a, b), f(a, b)
    for name, x in actual.items():
        assert_accurate(name, x, wanted[name])
        assert complaints(name, x * 1.0002, wanted[name]), name
    zero = {"product": torch.zeros(rows, 7)}
    assert complaints("product", zero["product"], wanted["product"])


# --- Retrieval -------------------------------------------------------------------------------------------------------


def test_a_wrong_selection_is_told():
    torch.manual_seed(1)
    q_slc, landmarks = torch.randn(1, 200, 2, 8), torch.randn(1, 13, 2, 8)
    scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S)

    def told(scores, indices, **options):
        return "; ".join(check_retrieval(scores, indices, q_slc, landmarks, chunk_size=S, **options))

    assert told(scores, indices) == ""
    assert "scores: " in told(scores * 1.0001, indices)
    assert "slots do not ascend" in told(scores.flip(-1), indices.flip(-1))
    assert told(scores.flip(-1), indices.flip(-1), ties=False) == ""
    wrong = indices.clone()
    wrong[0, 190, 0] = torch.tensor([i for i in range(11) if i not in indices[0, 190, 0]][:3])
    assert "token 190 of batch 0, head 0, chose chunk" in told(scores, wrong)
    wrong[0, 190, 0] = torch.tensor([10, 11, 12])
    assert "may not see" in told(scores, wrong)
    wrong[0, 190, 0] = torch.tensor([3, 3, 4])
    assert "twice" in told(scores, wrong)
    wrong[0, 190, 0] = torch.tensor([3, 4, -1])
    assert "not as many" in told(scores, wrong)


def test_ties_are_exact():
    q_slc, landmarks = torch.ones(1, 100, 1, 4), torch.ones(1, 7, 1, 4)
    scores, indices = retrieve_chunks(q_slc, landmarks, 2, chunk_size=S)
    assert check_retrieval(scores, indices, q_slc, landmarks, chunk_size=S) == []
    later = torch.where(
        (indices == 1).any(-1, keepdim=True) & (torch.arange(100) >= 48)[:, None, None], indices + 1, indices
    )
    assert "a tie is not won by the lower chunk" in check_retrieval(scores, later, q_slc, landmarks, chunk_size=S)[0]


def test_scores_times_zero_have_the_units_of_zero_scores():
    """Of values so small that what float16 cannot hold is all of the unit."""
    call = causal_call(torch.float16)
    call = call._replace(v=call.v * 1e-6, do=call.do * 1e-6)
    times_zero = expect_attention(*call, chunk_size=S, scale=0.0)
    zero = expect_attention(*call._replace(q=torch.zeros_like(call.q)), chunk_size=S, scale=1.0)
    for name in ("out", "dv", "dweights"):
        torch.testing.assert_close(times_zero[name].unit, zero[name].unit)
    assert all(x.unit.isfinite().all() for found in (times_zero, zero) for x in found.values())


def test_gradients_whose_squares_vanish_in_float64():
    """Of keys of probability exp(-400)."""
    call = make_call(Dims(T=1, T_kv=S, HQ=1, H=1, D=16, S=S, K=1), 0)
    call = call.to(torch.float64)._replace(indices=torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    call = call._replace(q=torch.ones_like(call.q), k=torch.zeros_like(call.k), weights=torch.ones_like(call.weights))
    call.k[:, 1::2] = -100.0
    results = run_with_gradients(hsa_attention, call, chunk_size=S)
    assert 0 < results["dv"][:, 1::2].abs().max() < 1e-170 and check_attention(results, call, chunk_size=S) == []
    results["dv"] *= 1.01
    assert check_attention(results, call, chunk_size=S)


def test_a_subnormal_result_is_rounded_to_its_types_step():
    """One product in float16: right to half a step, wrong by three of them; an exact 0 allows nothing."""
    a, b = (torch.tensor([[3e-4], [0.7], [0.0]], dtype=torch.float16), torch.tensor([[7.1e-3], [0.3], [1.0]]))
    wanted, step = expect(lambda x, y: x * y, a, b, out=torch.float16), 2.0**-24
    exact = (a.double() * b.double()).half()
    assert 0 < exact[0] < torch.finfo(torch.float16).smallest_normal and complaints("x", exact, wanted) == []
    for at, error in ((0, 3 * step), (2, step)):
        wrong = exact.clone()
        wrong[at] += error
        assert complaints("x", wrong, wanted)
