"""The accuracy rule of `selected_attention`: it passes correct programs of two kinds and catches small faults."""

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import Dims, hard_calls, make_call, seeds, without_weights
from test_accuracy import causal_call, each_shape, each_type

from hsa_tl.accuracy import complaints
from hsa_tl.oracle import expect_attention, expect_selected, selected_oracle
from hsa_tl.testing import SelectedInputs, assert_attention, check_attention, run_with_gradients

S = 16


def kernel(
    call: SelectedInputs, kept: torch.dtype, *, chunk_size: int = S, partial: bool = False,
    sums: torch.dtype = torch.float32, mask_key: int | None = None, twice: bool = False, dlse_sign: float = 1.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a GPU's kernel does, in PyTorch: float32 but for what it keeps in a type of fewer bits.

    partial: whether each chunk gives a row of its own, kept and merged by its log-sum-exp, or the sums go on from chunk
    to chunk beside a running maximum. The others are to be wrong: sums is the type of running sums, mask_key a key of
    the second chunk that is left out, twice counts a chunk as often as it was chosen.
    """
    q, k, v, indices, do, dlse = (x.float() if x.is_floating_point() else x for x in call)
    (B, T, HQ, D), H, L = q.shape, k.shape[2], chunk_size
    G, scale = HQ // H, D**-0.5
    keep = lambda x: x.to(kept).float()  # noqa: E731
    add = lambda total, x: (total + x).to(sums).float()  # noqa: E731
    out, dq, dk, dv, lse = (torch.zeros_like(x) for x in (q, q, k, v, dlse))
    for b in range(B):
        for h in range(H):
            heads, chosen = slice(h * G, (h + 1) * G), indices[b, :, h]
            # The tokens and keys of each chunk, and the scores [tokens, G, keys].
            chunks = []
            for c in range(-(-k.shape[1] // L)):
                count = (chosen == c).sum(-1)
                t, keys = count.nonzero().squeeze(-1), slice(c * L, (c + 1) * L)
                s = q[b, t, heads] @ k[b, keys, h].T * scale
                if mask_key is not None and c == 1:
                    s[..., mask_key] = -torch.inf
                if twice:
                    s = s + count[t].log()[:, None, None]
                chunks.append((t, keys, s))
            top = torch.full((T, G, 1), -torch.inf)
            total, acc = torch.zeros(T, G, 1), torch.zeros(T, G, D)
            for t, keys, s in chunks:
                own = s.amax(-1, keepdim=True)
                new = torch.maximum(top[t], own)
                p = torch.exp(s - (own if partial else new))
                row = p.sum(-1, keepdim=True)
                o = keep(keep(p) @ v[b, keys, h] / row) * row * torch.exp(own - new) if partial else None
                row = row * torch.exp(own - new) if partial else row
                acc[t] = add(acc[t] * torch.exp(top[t] - new), keep(p) @ v[b, keys, h] if o is None else o)
                total[t] = add(total[t] * torch.exp(top[t] - new), row)
                top[t] = new
            out[b, :, heads] = keep(torch.where(total > 0, acc / total, 0.0))
            lse[b, :, heads] = (top + total.log())[..., 0]
            delta = (do[b, :, heads] * out[b, :, heads]).sum(-1) - dlse_sign * dlse[b, :, heads]
            for t, keys, s in chunks:
                q_t, do_t, v_c = q[b, t, heads], do[b, t, heads], v[b, keys, h]
                p = torch.exp(s - lse[b, t, heads, None])
                ds = keep(p * (do_t @ v_c.T - delta[t, :, None]) * scale)
                dq[b, t, heads] = add(dq[b, t, heads], keep(ds @ k[b, keys, h]) if partial else ds @ k[b, keys, h])
                for i in (slice(None),) if sums == torch.float32 else range(len(t)):
                    pairs = "tgs,tgd->sd" if isinstance(i, slice) else "gs,gd->sd"
                    dv[b, keys, h] = add(dv[b, keys, h], torch.einsum(pairs, keep(p)[i], do_t[i]))
                    dk[b, keys, h] = add(dk[b, keys, h], torch.einsum(pairs, ds[i], q_t[i]))
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {name: x if name == "lse" else x.to(call.q.dtype) for name, x in results.items()}


@hypothesis.settings(max_examples=500)
@hypothesis.given(hard_calls(), st.booleans())
def test_a_correct_kernel_passes(drawn, partial):
    """In every type and of both kinds: 500 hard calls, three seconds."""
    call, chunk_size = drawn
    call = without_weights(call)
    assert_attention(kernel(call, call.q.dtype, chunk_size=chunk_size, partial=partial), call, chunk_size=chunk_size)


def doubled(call: SelectedInputs) -> SelectedInputs:
    return SelectedInputs(*(x.double() if x.is_floating_point() else x for x in call))


@hypothesis.settings(max_examples=20)
@hypothesis.given(T=st.integers(1, 40), T_kv=st.integers(1, 50), seed=seeds)
def test_the_expected_gradients_are_autograd_s(T, T_kv, seed):
    """Two derivations of one thing: the formulas with units, and autograd through the plain equations."""
    call = doubled(without_weights(make_call(Dims(T=T, T_kv=T_kv, HQ=6, H=2), seed)))
    wanted = run_with_gradients(selected_oracle, call, chunk_size=S, scale=0.3)
    for name, found in expect_selected(*call, chunk_size=S, scale=0.3).items():
        torch.testing.assert_close(found.value, wanted[name])
        assert ((found.unit > 0) | (wanted[name] == 0) | wanted[name].isinf()).all()


def test_the_expected_gradients_of_packed_sequences():
    call = doubled(without_weights(make_call(Dims(T=40, T_kv=40))))
    call = call._replace(indices=call.indices.clamp(max=0))
    whole = expect_selected(*call, chunk_size=S, cu_seqlens=torch.tensor([0, 17, 17, 40], dtype=torch.int32))
    for part in (slice(0, 17), slice(17, 40)):
        wanted = run_with_gradients(selected_oracle, SelectedInputs(*(x[:, part] for x in call)), chunk_size=S)
        for name, found in whole.items():
            torch.testing.assert_close(found[:, part].value, wanted[name])


@pytest.mark.parametrize("expected, of", ((expect_attention, lambda call: call), (expect_selected, without_weights)))
def test_a_small_result_has_a_small_unit(expected, of):
    """What is allowed next to 0 is the type's least number, and no more: units scale with v, do and dlse."""
    call, least = of(make_call(Dims(T_kv=40))), 2.0**-40
    factors = {"v": least, "do": least, "dlse": least**2}
    small = call._replace(**{name: getattr(call, name) * x for name, x in factors.items() if name in call._fields})
    powers, whole = {"out": 1, "dv": 1, "lse": 0}, expected(*call, chunk_size=S)
    for name, found in expected(*small, chunk_size=S).items():
        torch.testing.assert_close(found.unit, whole[name].unit * least ** powers.get(name, 2), rtol=1e-6, atol=0)
    # Probabilities of 0, and results below the least normal number.
    for hard in (call._replace(q=call.q * 1e4), call._replace(v=call.v * 2.0**-130, do=call.do * 2.0**-130)):
        assert not any(x.unit.isnan().any() for x in expected(*hard, chunk_size=S).values())


def _scaled(call, right, name):
    factor = 1.0001 if call.q.dtype == torch.float32 or name == "lse" else 1.01
    return {name: (right[name].double() * factor).to(right[name].dtype)}


def _an_index_off(call, right):
    slots = (call.indices >= 0).nonzero()
    at = tuple(slots[torch.randperm(len(slots))[: max(1, len(slots) // 100)]].T)
    indices = call.indices.clone()
    indices[at] = torch.where(indices[at] > 0, indices[at] - 1, indices[at] + 1)
    return kernel(call._replace(indices=indices), call.q.dtype)


def _a_chunk_counted_twice(call, right):
    indices = call.indices.clone()
    indices[..., 0] = torch.where(indices[..., 0] < 0, indices[..., 0], indices.amax(-1))
    call = call._replace(indices=indices)
    wrong, right = (kernel(call, call.q.dtype, twice=twice) for twice in (True, False))
    assert check_attention(right, call, chunk_size=S) == []
    return wrong if check_attention(wrong, call, chunk_size=S) else {}


def _sums_of_16_bits(call, right):
    return kernel(call, call.q.dtype, sums=torch.bfloat16 if call.q.dtype == torch.float32 else call.q.dtype)


FAULTS = {
    **{f"all of {n} scaled": functools.partial(_scaled, name=n) for n in SelectedInputs.RESULTS},
    "one index in a hundred off by one": _an_index_off,
    "one key of a chunk masked": lambda call, right: kernel(call, call.q.dtype, mask_key=5),
    "the gradient of lse left out": lambda call, right: kernel(call, call.q.dtype, dlse_sign=0.0),
    "the gradient of lse of the wrong sign": lambda call, right: kernel(call, call.q.dtype, dlse_sign=-1.0),
    "dk without the scale": lambda call, right: {"dk": right["dk"] * call.q.shape[-1] ** 0.5},
    "lse in base 2": lambda call, right: {"lse": right["lse"] * torch.tensor(torch.e).log2()},
    "lse kept in 16 bits": lambda call, right: {"lse": right["lse"].half().float()},
    "sums kept in 16 bits": _sums_of_16_bits,
}


@each_type
@each_shape
def test_faults_are_caught(dtype, G, K):
    """Each fault alone, beside right results that pass."""
    call = without_weights(causal_call(dtype, G, K))
    right = kernel(call, dtype)
    assert check_attention(right, call, chunk_size=S) == []
    expected = expect_selected(*call, chunk_size=S)
    for name, fault in FAULTS.items():
        wrong = fault(call, right)
        assert any(complaints(n, x, expected[n]) for n, x in wrong.items()), name
    if K > 1:
        assert _a_chunk_counted_twice(call, right)


def test_rows_without_keys_are_exact():
    call = without_weights(causal_call(torch.bfloat16))
    right = kernel(call, torch.bfloat16)
    assert (right["lse"][:, :S] == -torch.inf).all() and (right["out"][:, :S] == 0).all()
    for name, value, words in (("lse", 0.0, "inf at"), ("lse", torch.nan, "nan at"), ("out", 1e-30, "0 is exact")):
        wrong = right[name].clone()
        wrong[0, 3] = value
        (line,) = check_attention({name: wrong}, call, chunk_size=S)
        assert line.startswith(name) and words in line


@pytest.mark.parametrize("selected", (False, True))
def test_what_rounding_makes_of_delta_is_the_same_for_all_keys(selected):
    """Of equal keys dq is 0 but for that: of a sum of 64, six eps of it are right, 120 wrong."""
    call = make_call(Dims(T=8, T_kv=64, HQ=2, H=1, D=64, S=64, K=1), 0)._replace(
        k=torch.randn(1, 1, 1, 64).expand(1, 64, 1, 64), v=torch.randn(1, 1, 1, 64).expand(1, 64, 1, 64),
        weights=torch.ones(1, 8, 1, 1), indices=torch.zeros(1, 8, 1, 1, dtype=torch.int32),
    )  # fmt: skip
    delta = (call.do.double() * call.v[:, :1].double()).sum(-1, keepdim=True)
    error = 6 * torch.finfo(torch.float32).eps * delta * call.k[:, :1].double() / 8  # scale = 1 / 8
    if selected:
        wanted = expect_selected(*call[:3], call.indices, call.do, torch.zeros(1, 8, 2), chunk_size=64)["dq"]
    else:
        wanted = expect_attention(*call, chunk_size=64)["dq"]
    assert complaints("dq", wanted.value - error, wanted) == []
    assert complaints("dq", wanted.value - 20 * error, wanted)
