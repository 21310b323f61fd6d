"""Calls of `hsa_attention` that the tests share: dims, generators, hypothesis strategies, and the comparison."""

import functools
import itertools
import math
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tiers import prove, tiered

from hsa_tl import hsa_attention, selected_attention, selected_decode
from hsa_tl.accuracy import Expected, assert_accurate
from hsa_tl.impl.tilelang import emulating
from hsa_tl.kernels_tilelang.config import PROGRAMS
from hsa_tl.testing import Inputs, SelectedInputs, assert_attention, run_with_gradients

# Other strategies of an implementation, by the config that names them: those that the CPU target can run.
STRATEGIES = {
    name.replace("hsa_fwd_", "tilelang-"): {x: {} for x in (name, name.replace("_fwd_", "_bwd_")) if x in PROGRAMS}
    for name in PROGRAMS
    if name.startswith("hsa_fwd_") and not name.endswith(("_token", "_sm90a"))
}
# TileLang's C target and Triton's interpreter take seconds where the reference takes milliseconds.
EXAMPLES = {"reference": 25, "tilelang": 10, **dict.fromkeys(STRATEGIES, 10), "triton": 3}
# An identity of a result that equals the oracle can hardly fail: the quick tests ask it of the fast ones.
QUICK_EXAMPLES = {"reference": 10, "tilelang": 4}
IMPLS = (*EXAMPLES, "auto")
# Each strategy compiles two more programs for each static key, so the quick tests only hold them to the oracle.
QUICK_IMPLS = ("reference", "tilelang", "triton")
each_impl = pytest.mark.parametrize("impl", tiered(IMPLS, quick=QUICK_IMPLS))
# Of the operator with one softmax over all chosen chunks.
SELECTED_STRATEGIES = {"tilelang-selected-union": {"selected_fwd_union": {}}}
SELECTED_IMPLS = ("reference", "tilelang", *SELECTED_STRATEGIES, "triton", "auto")


class Dims(NamedTuple):
    """Dims of one call; legend in hsa_tl.api."""

    B: int = 1
    T: int = 40
    T_kv: int = 48
    HQ: int = 3
    H: int = 1
    D: int = 16
    S: int = 16
    K: int = 3
    per_head: bool = False

    @property
    def N(self) -> int:
        return -(-self.T_kv // self.S)


# G, D, S and K at the ends of what is promised, with short last chunks.
ENDS = {
    "g32-d128-s128": Dims(T=5, T_kv=251, HQ=32, D=128, S=128, K=5),
    "g1-d64-s16-k512": Dims(T=2, T_kv=9000, HQ=1, D=64, S=16, K=512),
    "g2-d64-s32": Dims(T=7, T_kv=90, HQ=2, D=64, S=32, K=3),
    "g8-d128-s64": Dims(T=7, T_kv=150, HQ=8, D=128, S=64, K=6),
}
each_end = pytest.mark.parametrize("dims", ENDS.values(), ids=ENDS)

# Of a sweep in a test: one repetition, and one thread, since two would spin beside whatever else runs.
SWEEP = {"device": "cpu", "min_repeats": 1, "seconds": 0.0, "threads": 1}


def emulable(d: Dims) -> Dims:
    """The dims for a GPU, with fewer tokens where it is emulated."""
    return d._replace(T=-(-d.T // 5)) if emulating() else d


# Few static keys, since TileLang compiles a program for each: MHA, and G and K that are no powers of two.
STATIC = (
    {"HQ": 2, "H": 2, "D": 16, "K": 3},
    {"HQ": 3, "H": 1, "D": 16, "K": 3},
    {"HQ": 3, "H": 1, "D": 16, "K": 3, "per_head": True},
)


@st.composite
def dims(draw, static=STATIC) -> Dims:
    T = draw(st.just(1) | st.integers(8, 18))
    return Dims(
        B=8 if T == 1 else draw(st.integers(1, 2)),
        T=T,
        T_kv=draw(st.sampled_from((32, 48)) | st.integers(2, 50)),
        **draw(st.sampled_from(static)),
    )


def make_call(d: Dims, seed: int | None = None, low: int = -1) -> Inputs:
    """Normal q, k, v, do, weights of both signs; indices uniform in [low, N): empty slots and duplicates anywhere."""
    g = torch.Generator().manual_seed(torch.initial_seed() % 2**31 if seed is None else seed)
    randn = functools.partial(torch.randn, generator=g)
    return Inputs(
        q=randn(d.B, d.T, d.HQ, d.D),
        k=randn(d.B, d.T_kv, d.H, d.D),
        v=randn(d.B, d.T_kv, d.H, d.D),
        weights=randn(d.B, d.T, d.HQ if d.per_head else d.H, d.K),
        indices=torch.randint(low, d.N, (d.B, d.T, d.H, d.K), generator=g, dtype=torch.int32),
        do=randn(d.B, d.T, d.HQ, d.D),
    )


def make_exact_call(d: Dims, seed: int) -> Inputs:
    """A call whose sums are exact in any order, at scale 1/4: q = 0, whole chunks, small integers elsewhere."""
    g = torch.Generator().manual_seed(seed)
    call = make_call(d._replace(T_kv=d.N * d.S), seed)
    k, v, weights, do = (torch.randint(-2, 3, x.shape, generator=g).float() for x in (*call[1:4], call.do))
    return call._replace(q=torch.zeros_like(call.q), k=k, v=v, weights=weights, do=do)


without_weights = SelectedInputs.of
# Each implementation of each operator, and what makes of a call one of that operator.
each_attention = pytest.mark.parametrize(
    "impl, of",
    [
        *(pytest.param(*x.values, lambda call: call, marks=x.marks) for x in tiered(IMPLS, quick=QUICK_IMPLS)),
        *(
            pytest.param(*x.values, without_weights, marks=x.marks, id=f"selected-{x.values[0]}")
            for x in tiered(SELECTED_IMPLS, quick=(*QUICK_IMPLS, "auto"))
        ),
    ],
)

seeds = st.integers(0, 2**31 - 1)
calls = st.builds(make_call, dims(), seeds)
exact_calls = st.builds(make_exact_call, dims(), seeds)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def hard_calls(draw, dtypes=TYPES, static=None):
    """A call and its chunk size: scores from 1e-3 to 1e3, one-hot and equal probabilities, weights from 1e-12 to 1."""
    dtype = draw(st.sampled_from(dtypes))
    dims = static or {
        "HQ": draw(st.sampled_from((1, 2, 3, 16))), "D": draw(st.sampled_from((16, 32, 64))),
        "K": draw(st.integers(1, 5)), "S": draw(st.sampled_from((16, 32))),
    }  # fmt: skip
    T = draw(st.sampled_from((1, 7, 40)))
    call = make_call(Dims(T=T, T_kv=draw(st.integers(1, 70)), **dims), draw(seeds))
    root = math.sqrt(10 ** draw(st.floats(-3, 3)))
    q, k, v, do = call.q * root, call.k * root, call.v, call.do
    match draw(st.sampled_from(("normal", "one-hot", "constant", "one sign", "keys are values"))):
        case "one-hot":
            q, k = q.abs(), torch.zeros_like(k)
            k[:, :: call.k.shape[1] // 2 + 1] = 3 * root
        case "constant":
            v = torch.ones_like(v) * draw(st.floats(0.5, 2))
        case "one sign":
            v, do = v.abs(), do.abs()
        case "keys are values":
            v = k / root
    match draw(st.sampled_from(("normal", "softmax", "small", "wide", "equal"))):
        case "softmax":
            weights = call.weights.softmax(-1)
        case "small":
            weights = 1e-12 * call.weights.softmax(-1)
        case "wide":
            weights = 10 ** (-12 * torch.rand_like(call.weights))
        case "equal":
            weights = torch.full_like(call.weights, draw(st.sampled_from((1.0, 1 / 3, 0.3))))
        case _:
            weights = call.weights
    return Inputs(*(x.to(dtype) for x in (q, k, v)), weights, call.indices, do.to(dtype)), dims.get("S", 16)


def property_of_each_impl(number=EXAMPLES, quick=QUICK_EXAMPLES, /, **strategies):
    """A property `check(impl, **drawn)` of every implementation, each with as many examples as its speed allows."""

    def decorate(check):
        more = [pytest.param(impl, n, marks=prove) for impl, n in number.items()]

        @pytest.mark.parametrize("impl, examples", [*quick.items(), *more])
        def test(impl, examples):
            @hypothesis.settings(max_examples=examples)
            @hypothesis.given(**strategies)
            def holds(**drawn):
                check(impl, **drawn)

            holds()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def assert_all_accurate(actual: dict, expected: dict[str, Expected]) -> None:
    """Each of two dicts' results, by name."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_accurate(name, x, expected[name])


def attend(impl: str, attention=hsa_attention):
    """attention with the options that impl, among IMPLS or SELECTED_IMPLS, stands for."""
    named = STRATEGIES | SELECTED_STRATEGIES
    options = {"config": named[impl]} if impl in named else {}
    return functools.partial(attention, impl=impl.split("-")[0], **options)


def run(impl: str, call: Inputs | SelectedInputs, **options) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the attention that call is of; chunk_size is 16 unless told."""
    attention = selected_attention if isinstance(call, SelectedInputs) else hsa_attention
    return run_with_gradients(attend(impl, attention), call, **({"chunk_size": 16} | options))


def check(impl: str, call: Inputs | SelectedInputs, **options) -> dict[str, torch.Tensor]:
    """Outputs and all gradients of an implementation against the oracle, and their types; returns them."""
    options = {"chunk_size": 16} | options
    actual = run(impl, call, **options)
    for name, x in actual.items():
        like = call.q if name == "out" else getattr(call, "dlse" if name == "lse" else name.removeprefix("d"))
        assert x.dtype == like.dtype and x.shape == like.shape
    assert_attention(actual, call, **options)
    return actual


def check_selected(impl: str, d: Dims, dtype: torch.dtype = torch.float32) -> None:
    """`selected_attention` with all gradients, and `selected_decode` of one token, whose slots are split."""

    def make(d):
        call = without_weights(make_call(d))
        return call._replace(**{name: getattr(call, name).to(dtype) for name in ("q", "k", "v", "do")})

    check(impl, make(d), chunk_size=d.S)
    d = d._replace(T=1, T_kv=d.N * d.S)
    call, table = make(d), torch.arange(d.N, dtype=torch.int32)[None]
    pages = (x.unflatten(1, (d.N, d.S)).flatten(0, 1) for x in (call.k, call.v))
    out, lse = selected_decode(call.q, *pages, call.indices, table, impl=impl.split("-")[0])
    assert_attention({"out": out, "lse": lse}, call, chunk_size=d.S)


def _allocations(function, *args, **kwargs) -> list[int]:
    """Bytes taken and, negative, given back on the CPU while function(*args, **kwargs) runs, in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees this thread only
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            function(*args, **kwargs)
    finally:
        torch.set_num_threads(threads)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def largest_allocation(function, *args, **kwargs) -> int:
    """Bytes of the largest single allocation on the CPU while function(*args, **kwargs) runs."""
    return max(_allocations(function, *args, **kwargs))


def peak_allocation(function, *args, **kwargs) -> int:
    """Most bytes on the CPU at one time beyond those before function(*args, **kwargs)."""
    return max(itertools.accumulate(_allocations(function, *args, **kwargs)))
