"""Bad input: an error that names the argument, the rule and the value, before anything is launched."""

import pytest
import torch
from tiers import tiered

from hsa_tl import (
    build_pairs,
    chunk_means,
    fusion_weights,
    hsa_attention,
    merge_attention,
    ops,
    retrieve_chunks,
    selected_attention,
)
from hsa_tl.problem import Problem

B, T, HQ, H, D, K, N = 2, 40, 4, 2, 16, 3, 3


def attention(**changes):
    arguments = {
        "q": torch.zeros(B, T, HQ, D),
        "k": torch.zeros(B, T, H, D),
        "v": torch.zeros(B, T, H, D),
        "weights": torch.zeros(B, T, H, K),
        "indices": torch.zeros(B, T, H, K, dtype=torch.int32),
        "chunk_size": 16,
    }
    return hsa_attention(**(arguments | changes))


def selected(**changes):
    x = (torch.zeros(B, T, n, D) for n in (HQ, H, H))
    arguments = dict(zip("qkv", x, strict=True)) | {"indices": index(0), "chunk_size": 16}
    return selected_attention(**(arguments | changes))


def merge(**changes):
    arguments = {"out": torch.zeros(B, T, HQ, D), "lse": torch.zeros(B, T, HQ)}
    other = arguments | changes
    return merge_attention(tuple(arguments.values()), (other["out"], other["lse"]))


def means(**changes):
    return chunk_means(**({"k": torch.zeros(B, T, H, D), "chunk_size": 16} | changes))


def packed(cu_seqlens, **changes):
    arguments = {
        "q": torch.zeros(1, T, HQ, D),
        "k": torch.zeros(1, T, H, D),
        "v": torch.zeros(1, T, H, D),
        "weights": torch.zeros(1, T, H, K),
        "indices": torch.zeros(1, T, H, K, dtype=torch.int32),
    }
    return attention(**(arguments | {"cu_seqlens": cu_seqlens} | changes))


def retrieve(**changes):
    arguments = {
        "q_slc": torch.zeros(B, T, H, D),
        "landmarks": torch.zeros(B, N, H, D),
        "topk": 2,
        "chunk_size": 16,
    }
    return retrieve_chunks(**(arguments | changes))


def weights(scores=None, **changes):
    return fusion_weights(torch.zeros(B, T, H, K) if scores is None else scores, **changes)


def pairs(indices=None, num_chunks=N):
    return build_pairs(torch.zeros(B, T, H, K, dtype=torch.int32) if indices is None else indices, num_chunks)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def index(value):
    indices = torch.zeros(B, T, H, K, dtype=torch.int32)
    indices[1, 2, 1, 2] = value
    return indices


# (function, changed arguments, what the message must say)
VALUE_ERRORS = [
    # shapes that disagree
    (attention, {"q": zeros(T, HQ, D)}, r"q must have 4 dimensions, got shape \[40, 4, 16\]"),
    (attention, {"k": zeros(B, T, H, 32)}, r"k must have shape \[2, .*, 16\].* got shape \[2, 40, 2, 32\]"),
    (attention, {"k": zeros(1, T, H, D)}, r"k must have shape \[2, .*got shape \[1,"),
    (attention, {"k": zeros(B, 0, H, D), "v": zeros(B, 0, H, D)}, r"k must have shape .*T_kv >= 1"),
    (attention, {"v": zeros(B, T + 1, H, D)}, r"v must have shape \[2, 40, 2, 16\] like k, got shape \[2, 41"),
    (attention, {"q": zeros(B, T, 5, D)}, r"q must have a multiple of k's 2 heads, got 5 heads"),
    (attention, {"indices": zeros(B, T, HQ, K, dtype=torch.int32)}, r"indices must have shape \[2, 40, 2, K >= 1\]"),
    (attention, {"indices": zeros(B, T, H, 0, dtype=torch.int32)}, r"indices must .*K >= 1.*got shape \[2, 40, 2, 0\]"),
    (attention, {"weights": zeros(B, T, 3, K)}, r"weights must have shape \[2, 40, 2 or 4, 3\].*got shape \[2, 40, 3"),
    (attention, {"weights": zeros(B, T, H, K + 1)}, r"weights must have shape"),
    (retrieve, {"landmarks": zeros(B, N, H + 1, D)}, r"landmarks must have shape \[2, N, 2, 16\].*got shape \[2, 3, 3"),
    (retrieve, {"landmarks": zeros(B, N, H, D + 1)}, r"landmarks must have shape"),
    (retrieve, {"landmarks": zeros(1, N, H, D)}, r"landmarks must have shape"),
    (retrieve, {"q_slc": zeros(T, H, D)}, r"q_slc must have 4 dimensions"),
    (
        weights,
        {"kind": "joint", "swa_lse": zeros(B, T, 3)},
        r"swa_lse must have shape \[2, 40, 2\].*got shape \[2, 40, 3",
    ),
    (weights, {"kind": "joint", "swa_lse": zeros(B, H)}, r"swa_lse must have 3 dimensions"),
    (weights, {"scores": zeros()}, r"scores must have a last dimension"),
    (pairs, {"indices": int32(0, 1)}, r"indices must have 4 dimensions, got shape \[2\]"),
    # values
    *((attention, {"chunk_size": s}, rf"chunk_size must be .*16, 32, 64 or 128, got {s}") for s in (1, 8, 24, 256)),
    (retrieve, {"chunk_size": 48}, r"chunk_size must be 16, 32, 64 or 128, got 48"),
    (attention, {"chunk_size": 0}, r"chunk_size must be .*got 0"),
    *(
        (f, {"scale": x}, rf"scale must be finite.*, got {x}")
        for f in (attention, retrieve)
        for x in (float("nan"), -0.5)
    ),
    (attention, {"impl": "cuda"}, r"impl must be one of auto, reference, tilelang, triton, got 'cuda'"),
    (retrieve, {"impl": "cuda"}, r"impl must be one of"),
    (retrieve, {"topk": 0}, r"topk must be at least 1, got 0"),
    (retrieve, {"q_start": -1}, r"q_start must be at least 0, got -1"),
    (retrieve, {"exclude_window": -5}, r"exclude_window must be at least 0, got -5"),
    (weights, {"kind": "sigmoid"}, r"kind must be one of softmax, .*joint, got 'sigmoid'"),
    (weights, {"kind": "joint"}, r"swa_lse must be given for kind=\"joint\", .*got None with kind='joint'"),
    (weights, {"swa_lse": zeros(B, T, H)}, r"swa_lse must be given .* no other, got one with kind='softmax'"),
    (pairs, {"num_chunks": -1}, r"num_chunks must be at least 0, got -1"),
    *(
        (f, {"indices": index(i)}, rf"indices must lie in \[-1, 3\).*got {i} at \[1, 2, 1, 2\]")
        for f in (attention, pairs)
        for i in (-2, 3, 2**31 - 1)
    ),
    *((f, {"scale": 1e39}, r"scale must be finite, in float32 too.*, got 1e\+39") for f in (attention, retrieve)),
    # sizes of 0
    (attention, {"q": zeros(B, T, HQ, 0), "k": zeros(B, T, H, 0)}, r"q must have a D of at least 1, got shape"),
    (attention, {"q": zeros(B, T, 0, D)}, r"q must have a multiple of k's 2 heads, got 0 heads"),
    (retrieve, {"q_slc": zeros(B, T, H, 0), "landmarks": zeros(B, N, H, 0)}, r"q_slc must have a D_r of at least 1"),
    # the layout [B, heads, T, D]
    *(
        (f, changes, r"must be laid out \[B, T, heads, D\], these look like \[B, heads, T, D\]")
        for f, changes in (
            (attention, {"q": zeros(B, HQ, T, D), "k": zeros(B, H, T, D), "v": zeros(B, H, T, D)}),
            (
                attention,
                {"q": zeros(B, HQ, T, D), "k": zeros(B, H, T, D), "v": zeros(B, H, T, D)}
                | {"weights": zeros(B, H, T, K), "indices": zeros(B, H, T, K, dtype=torch.int32)},
            ),
            (retrieve, {"q_slc": zeros(B, H, T, D), "landmarks": zeros(B, H, N, D)}),
        )
    ),
    # what validate=True finds besides
    (attention, {"indices": index(3), "validate": True}, r"indices must lie in \[-1, 3\), the chunks there are, got 3"),
    (
        attention,
        {"indices": index(1), "validate": True},
        r"indices must name whole chunks in the past, below 0 for token 0, got 0 at",
    ),
    (
        attention,
        {"indices": index(0) - 1, "weights": zeros(B, T, H, K) - 0.5, "validate": True},
        r"weights must be at least 0 and sum to at most 1.*raw scores\?, got \[-0.5",
    ),
    (attention, {"indices": index(0) - 1, "weights": zeros(B, T, H, K) + 0.5, "validate": True}, r"weights must .*0.5"),
    (
        retrieve,
        {"landmarks": zeros(B, 1, H, D), "validate": True},
        r"landmarks must hold the 2 whole chunks before the last token, got 1",
    ),
    (retrieve, {"exclude_window": 10**30}, r"exclude_window must be less than 2\^62, got 10"),
    # types
    (attention, {"q": zeros(B, T, HQ, D, dtype=torch.int32)}, r"q must have dtype bfloat16, .*got torch.int32"),
    (attention, {"k": zeros(B, T, H, D, dtype=torch.float16)}, r"k must have dtype torch.float32.*got torch.float16"),
    (attention, {"v": zeros(B, T, H, D).double()}, r"v must have dtype torch.float32.*got torch.float64"),
    (
        attention,
        {"weights": zeros(B, T, H, K).bfloat16()},
        r"weights must have dtype torch.float32, got torch.bfloat16",
    ),
    (attention, {"indices": index(0).long()}, r"indices must have dtype int32, got torch.int64"),
    (retrieve, {"q_slc": zeros(B, T, H, D).long()}, r"q_slc must have dtype bfloat16, .*got torch.int64"),
    (retrieve, {"landmarks": zeros(B, N, H, D).bfloat16()}, r"landmarks must have dtype torch.float32.*torch.bfloat16"),
    (weights, {"scores": zeros(B, T, H, K).int()}, r"scores must have a floating dtype, got torch.int32"),
    (pairs, {"indices": index(0).long()}, r"indices must have dtype int32, got torch.int64"),
    # devices
    (attention, {"k": zeros(B, T, H, D, device="meta")}, r"k must be on cpu.*got meta"),
    (attention, {"indices": index(0).to("meta")}, r"indices must be on cpu.*got meta"),
    (retrieve, {"landmarks": zeros(B, N, H, D, device="meta")}, r"landmarks must be on cpu.*got meta"),
    (weights, {"kind": "joint", "swa_lse": zeros(B, T, H, device="meta")}, r"swa_lse must be on cpu.*got meta"),
    # packed sequences
    (attention, {"cu_seqlens": int32(0, T)}, r"cu_seqlens must come with batch size B = 1, got B = 2"),
    (packed, {"cu_seqlens": int32(0, T - 1)}, r"cu_seqlens must rise from 0 to the token count 40, got \[0, 39\]"),
    (packed, {"cu_seqlens": int32(1, T)}, r"cu_seqlens must rise from 0 .*got \[1, 40\]"),
    (packed, {"cu_seqlens": int32(0, 30, 20, T)}, r"cu_seqlens must rise .*got \[0, 30, 20, 40\]"),
    (packed, {"cu_seqlens": int32(0)}, r"cu_seqlens must hold at least two offsets"),
    (packed, {"cu_seqlens": int32(0, T).long()}, r"cu_seqlens must have dtype int32, got torch.int64"),
    (packed, {"cu_seqlens": int32(0, T), "k": zeros(1, 9, H, D), "v": zeros(1, 9, H, D)}, r"k must have q's 40 tokens"),
    (retrieve, {"cu_seqlens": int32(0, T)}, r"cu_seqlens must come with batch size B = 1, got B = 2"),
    (
        retrieve,
        {"q_slc": zeros(1, T, H, D), "landmarks": zeros(1, N, H, D), "cu_seqlens": int32(0, 20, T)},
        r"landmarks must hold 4 chunks, .*got 3",
    ),
    (
        retrieve,
        {"q_slc": zeros(1, T, H, D), "landmarks": zeros(1, N, H, D), "cu_seqlens": int32(0, T), "q_start": 3},
        r"q_start must be 0 with cu_seqlens, got 3",
    ),
    # parts to merge
    (merge, {"out": zeros(B, T, HQ, D + 1)}, r"out of parts\[1\] must have shape \[2, 40, 4, 16\] like the first, got"),
    (
        merge,
        {"lse": zeros(B, T, H)},
        r"lse of parts\[1\] must have shape \[2, 40, 4\] to match out, got",
    ),
    (merge, {"lse": zeros(B, T, HQ, 1)}, r"lse of parts\[1\] must have 3 dimensions"),
    (merge, {"lse": zeros(B, T, HQ).half()}, r"lse of parts\[1\] must have dtype torch.float32"),
    (merge, {"out": zeros(B, T, HQ, D).half()}, r"out of parts\[1\] must have dtype torch.float32"),
    (merge, {"out": zeros(B, T, HQ, D, device="meta")}, r"out of parts\[1\] must be on cpu"),
    (means, {"k": zeros(T, H, D)}, r"k must have 4 dimensions"),
    (means, {"k": zeros(B, T, H, D).int()}, r"k must have dtype bfloat16"),
    (means, {"chunk_size": 24}, r"chunk_size must be 16, 32, 64 or 128, got 24"),
]

TYPE_ERRORS = [
    (attention, {"q": [1.0]}, r"q must be a torch.Tensor, got list"),
    (attention, {"indices": None}, r"indices must be a torch.Tensor, got NoneType"),
    (attention, {"chunk_size": 16.0}, r"chunk_size must be an int, got float"),
    (attention, {"scale": "1"}, r"scale must be a float or None, got str"),
    (attention, {"scale": True}, r"scale must be a float or None, got bool"),
    (attention, {"config": "fast"}, r"config must be a dict.*got str"),
    (packed, {"cu_seqlens": [0, T]}, r"cu_seqlens must be a torch.Tensor, got list"),
    (retrieve, {"topk": 2.0}, r"topk must be an int, got float"),
    (retrieve, {"topk": True}, r"topk must be an int, got bool"),
    (retrieve, {"q_slc": None}, r"q_slc must be a torch.Tensor, got NoneType"),
    (retrieve, {"landmarks": None}, r"landmarks must be a torch.Tensor, got NoneType"),
    (weights, {"scores": [1.0]}, r"scores must be a torch.Tensor, got list"),
    (pairs, {"indices": [[0]]}, r"indices must be a torch.Tensor, got list"),
    (pairs, {"num_chunks": "3"}, r"num_chunks must be an int, got str"),
    (merge, {"lse": None}, r"lse of parts\[1\] must be a torch.Tensor, got NoneType"),
]

for cases in (VALUE_ERRORS, TYPE_ERRORS):
    cases += [(selected, x, words) for f, x, words in cases if f is attention and "weights" not in x]


def _id(x):
    function, changes, _ = x
    return function.__name__ + "-" + "-".join(changes)


@pytest.fixture
def no_implementation(monkeypatch):
    """Nothing may be launched."""

    def launched(name):
        raise AssertionError(f"impl {name} was looked up")

    monkeypatch.setattr(ops, "implementation", launched)


@pytest.mark.parametrize("case", VALUE_ERRORS, ids=map(_id, VALUE_ERRORS))
def test_value_error(case, no_implementation):
    function, changes, message = case
    with pytest.raises(ValueError, match=message):
        function(**changes)


@pytest.mark.parametrize("case", TYPE_ERRORS, ids=map(_id, TYPE_ERRORS))
def test_type_error(case, no_implementation):
    function, changes, message = case
    with pytest.raises(TypeError, match=message):
        function(**changes)


@pytest.mark.parametrize("impl", tiered(("auto", "tilelang", "triton"), quick=("auto",)))
def test_unchecked_an_index_out_of_range_is_an_empty_slot(impl):
    q, k, v = torch.randn(1, T, HQ, D), torch.randn(1, T, H, D), torch.randn(1, T, H, D)
    weights, indices = torch.rand(1, T, H, K), torch.zeros(1, T, H, K, dtype=torch.int32)
    for bad in (-2, 3, 2**31 - 1):
        indices[..., 1] = bad
        got = hsa_attention(q, k, v, weights, indices, chunk_size=16, impl=impl, validate=False)
        indices[..., 1] = -1
        assert torch.equal(got, hsa_attention(q, k, v, weights, indices, chunk_size=16, impl=impl))


def test_no_selection_of_ours_is_refused():
    """validate=True takes what retrieve_chunks and fusion_weights give, packed and in segments too."""
    q_slc, q, k = torch.randn(1, 90, H, 8), torch.randn(1, 90, HQ, D), torch.randn(1, 90, H, D)
    cu_seqlens = int32(0, 41, 41, 90)
    for kind in ("softmax", "softmax1", "stick_breaking"):
        for start, packing in ((0, {}), (37, {}), (0, {"cu_seqlens": cu_seqlens})):
            landmarks = torch.randn(1, 7 if packing else 6, H, 8)
            options = {"chunk_size": 16, "validate": True} | packing
            scores, indices = retrieve_chunks(q_slc[:, start:], landmarks, 3, q_start=start, **options)
            hsa_attention(q[:, start:], k, k, fusion_weights(scores, kind), indices, **options)
            selected_attention(q[:, start:], k, k, indices, **options)


def test_index_beyond_its_own_packed_sequence(no_implementation):
    """Sequences of 16 and 24 tokens: chunk 1 is in the second only."""
    indices = torch.zeros(1, T, H, K, dtype=torch.int32)
    indices[0, 3, 1, 2] = indices[0, 20, 1, 0] = 1
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, 1\).*got 1 at \[0, 3, 1, 2\]"):
        packed(int32(0, 16, T), indices=indices)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_out_of_range_raises_with_and_without_gradients(requires_grad, no_implementation):
    with pytest.raises(ValueError, match="indices must lie in"):
        attention(indices=index(3), v=zeros(B, T, H, D).requires_grad_(requires_grad))


@pytest.mark.parametrize("impl", ("tilelang", "triton"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_unable_implementation(impl, dtype):
    """An explicit impl never falls back. On the CPU, kernels run float32: the interpreter gets bfloat16 wrong."""
    x = {name: zeros(B, T, n, D, dtype=dtype) for name, n in (("q", HQ), ("k", H), ("v", H))}
    w = zeros(B, T, H, K, dtype=torch.promote_types(dtype, torch.float32))
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}' cannot run .*; use 'auto' or"):
        attention(**x, weights=w, impl=impl)


@pytest.mark.parametrize("T_kv, token, chunk", ((20, 16, 0), (40, 16, 0), (60, 12, 1)))
def test_a_chunk_is_past_for_the_token_behind_it(T_kv, token, chunk):
    """Queries are the last of the keys' tokens, or the first where there are fewer keys."""
    kv = {name: zeros(B, T_kv, H, D) for name in ("k", "v")}
    indices = zeros(B, T, H, K, dtype=torch.int32) - 1
    indices[:, token] = chunk
    attention(**kv, indices=indices, validate=True)
    with pytest.raises(ValueError, match=f"below {chunk} for token {token - 1}, got {chunk}"):
        attention(**kv, indices=indices.roll(-1, 1), validate=True)


@pytest.mark.parametrize("impl", ("tilelang", "triton"))
@pytest.mark.parametrize(
    "dtype, topk, words", [(torch.bfloat16, 2, "float32 only"), (torch.float32, 129, "at most 128")]
)
def test_unable_retrieval(impl, dtype, topk, words):
    x = {name: zeros(B, n, H, D, dtype=dtype) for name, n in (("q_slc", T), ("landmarks", N))}
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}' cannot run .*{words}.*; use 'auto' or"):
        retrieve(**x, topk=topk, impl=impl)


@pytest.mark.parametrize(
    "impl, config, words",
    [
        ("reference", {"hsa_fwd_token": {}}, r"config must name nothing for impl='reference'"),
        ("triton", {"hsa_fwd_token": {}}, r"config must name kernels among forward_kernel, .*got \['hsa_fwd_token'\]"),
        ("triton", {"forward_kernel": {"threads": 4}}, r"must have no fields but .*got 'threads'"),
        ("triton", {"forward_kernel": {"num_warps": 3}}, r"config\['num_warps'\] must be a power of two, got 3"),
        ("tilelang", {"forward_kernel": {}}, r"config must name programs among hsa_fwd_token, .*got 'forward_kernel'"),
    ],
)
def test_config_of_another_implementation(impl, config, words):
    for function in (attention,) if impl == "tilelang" else (attention, selected):
        with pytest.raises(ValueError, match=words):
            function(impl=impl, config=config)


def test_more_pairs_than_int32_counts_are_refused_by_name():
    """Before anything is read: these tensors are views of one element."""
    tokens, slots = 1 << 25, 64
    indices = torch.zeros(1, dtype=torch.int32).expand(1, tokens, 1, slots)
    q, kv, weights = (torch.zeros(1).expand(1, n, 1, d) for n, d in ((tokens, 16), (16, 16), (tokens, slots)))
    words = r"indices must have less than 2\^31 slots T \* K, got 33554432 \* 64"
    with pytest.raises(ValueError, match=words):
        attention(q=q, k=kv, v=kv, weights=weights, indices=indices)
    with pytest.raises(ValueError, match=words):
        build_pairs(indices, 1)


def test_the_device_is_the_tensors(monkeypatch):
    """The current GPU is an A100, the second one a Hopper."""
    capability = {None: (8, 0), 0: (8, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[device])
    for index, first in ((None, "triton"), (0, "triton"), (1, "tilelang")):
        problem = Problem(1, 64, 1, 16, 1, 128, 64, 4, device_index=index)
        assert ops.preferred(problem)[0] == first
        assert (ops.implementation("tilelang").unavailable(problem) is None) == (index == 1)


@pytest.mark.parametrize("overlap", (-0.1, 1.5, "high", None))
def test_an_overlap_is_a_share(overlap):
    with pytest.raises(ValueError, match=r"config\['overlap'\] must be a number in \[0, 1\], got "):
        attention(config={"overlap": overlap})


@pytest.mark.parametrize("impl", ("auto", "reference", "tilelang", "triton"))
def test_every_implementation_takes_an_overlap(impl):
    assert attention(impl=impl, config={"overlap": 0.5}).shape == (B, T, HQ, D)
    if impl != "tilelang":
        assert selected(impl=impl, config={"overlap": 0.5})[0].shape == (B, T, HQ, D)
