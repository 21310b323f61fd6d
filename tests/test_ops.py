"""The torch.library operators: schemas, fakes, autograd, torch.compile, gradcheck."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from strategies import Dims, make_call, without_weights
from tiers import tiered

from hsa_tl import (
    cases,
    chunk_means,
    fusion_weights,
    hsa_attention,
    merge_attention,
    ops,
    retrieve_chunks,
    selected_attention,
)
from hsa_tl.testing import SelectedInputs, assert_attention, run_with_gradients

S = 16


def _operator_calls(call):
    """Arguments of every operator at once, the backward ones included: name -> arguments."""
    q, k, v, weights, indices, do = call
    N = k.shape[1] // S
    k, v = (x.unflatten(1, (N, S)) for x in (k, v))
    pair, offsets = ops.build_pairs(indices, N, True)
    chunk_len = torch.full((N,), S, dtype=torch.int32)
    chunk_len[-1] = 3
    cu_seqlens = torch.tensor([0, 17, q.shape[1]], dtype=torch.int32)
    q_slc, landmarks = torch.randn(1, q.shape[1], 2, 16), torch.randn(1, N, 2, 16)
    _, chosen = ops.retrieve(q_slc, landmarks, 2, S, 9, 0, None, None, 16, 0.25, "auto", True)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    once = ops.distinct(indices, N, True)
    index = ops.build_pairs(once, N, True)
    out, lse = ops.selected(q, k, v, once, *index, chunk_len, 0.25, "auto", "", False)
    table = torch.arange(N, dtype=torch.int32)[None]
    both = [x.detach().requires_grad_() for x in (q_slc, landmarks)]
    lengths, recency = torch.tensor([20], dtype=torch.int32), torch.tensor([0.5, 2.0])
    return {
        "build_pairs": (indices, N, True),
        "pack": (cu_seqlens, indices.clamp(max=0), S, N + 2, True),
        "attention": (*leaves, indices, pair, offsets, None, 0.25, "auto", "", False, True),
        "attention_short_chunk": (*leaves, indices, pair, offsets, chunk_len, 0.25, "reference", "", True, False),
        "attention_without_pairs": (q, k, v, weights, indices, None, None, None, 0.25, "auto", "", False, True),
        "attention_backward": (*(do, q, k, v, weights, indices, pair, offsets, chunk_len, 0.25, "auto", "", False),),
        "decode": (q, *_pages(k, v), weights, indices, table, 0.25, "auto", True),
        "distinct": (indices, N, True),
        "selected": (*leaves[:3], once, *index, None, 0.25, "auto", "", False),
        "selected_short_chunk": (*leaves[:3], once, *index, chunk_len, 0.25, "reference", "", True),
        "selected_without_pairs": (q, k, v, once, None, None, None, 0.25, "auto", "", False),
        "selected_backward": (do, lse, q, k, v, once, out, lse, *index, chunk_len, 0.25, "auto", "", False),
        "selected_decode": (q, *_pages(k, v), indices, table, 0.25, "auto", True),
        "retrieve_decode": (q_slc, landmarks, lengths, None, None, 2, S, 0, None, 16, 0.25, "auto", True),
        "retrieve_decode_recency": (q_slc, landmarks, lengths, None, None, 2, S, 0, recency, 16, 0.25, "auto", True),
        "retrieve": (*both, 2, S, 9, 0, None, None, 16, 0.25, "auto", True),
        "retrieve_packed": (*both, 2, S, 0, 0, cu_seqlens, None, 16, 0.25, "auto", True),
        "retrieve_recency": (*both, 2, S, 0, 0, cu_seqlens, recency.clone().requires_grad_(), 2, 0.25, "auto", True),
        "retrieve_backward": (torch.randn(chosen.shape), chosen, q_slc, landmarks, None, S, 0.25),
    }


def _pages(*x):
    return (y.flatten(0, 1) for y in x)


OPERATOR_CALLS = (
    "build_pairs",
    "pack",
    "attention",
    "attention_short_chunk",
    "attention_without_pairs",
    "attention_backward",
    "decode",
    "distinct",
    "selected",
    "selected_short_chunk",
    "selected_without_pairs",
    "selected_backward",
    "selected_decode",
    "retrieve_decode",
    "retrieve_decode_recency",
    "retrieve",
    "retrieve_packed",
    "retrieve_recency",
    "retrieve_backward",
)


@pytest.mark.parametrize("per_head", tiered((False, True), quick=(False,)))
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(name, per_head):
    calls = _operator_calls(make_call(Dims(HQ=4, H=2, T_kv=64, per_head=per_head)))
    assert calls.keys() == set(OPERATOR_CALLS)
    operators = {n: x for n, x in vars(ops).items() if isinstance(x, torch._ops.OpOverload)}
    assert operators.keys() == {n for n in OPERATOR_CALLS if n in vars(ops)}, "an operator has no check"
    torch.library.opcheck(operators[max((n for n in operators if name.startswith(n)), key=len)], calls[name])


def test_triton_says_why_a_gpu_cannot_run_it(monkeypatch):
    module, problem = ops.implementation("triton"), cases.case("paper-d64").problem
    gpu = SimpleNamespace(shared_memory_per_block=49152, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.unavailable(problem) == "no CUDA device is present"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for capability, reason in (((7, 5), "it needs compute capability 8.0 or newer"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert module.unavailable(problem) == reason
    gpu.shared_memory_per_block_optin = 16384
    assert "needs more than the 16384 bytes of shared memory" in module.unavailable(problem)


def test_triton_caps_registers_so_that_three_programs_share_an_sm():
    """Of its 65536; with D = 128 there is no room for three."""
    module = ops.implementation("triton")
    small, large = (module.plan(module.dkdv_kernel, 16, D, 64, 2) for D in (64, 128))
    assert 3 * 32 * small["num_warps"] * small["maxnreg"] <= 65536 and "maxnreg" not in large


def test_neither_the_command_nor_the_first_call_imports_the_compiler():
    """A second or two that a served or scripted call would pay every time."""
    code = """
        import sys, torch, hsa_tl, hsa_tl.cli
        q, weights = torch.randn(1, 32, 1, 16, requires_grad=True), torch.rand(1, 32, 1, 2)
        landmarks = torch.randn(1, 2, 1, 16)
        scores, indices = hsa_tl.retrieve_chunks(q, landmarks, 2, chunk_size=16)
        out = hsa_tl.hsa_attention(q, q, q, hsa_tl.fusion_weights(scores), indices, chunk_size=16)
        out.sum().backward()
        pages = torch.randn(2, 16, 1, 16)
        table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([32], dtype=torch.int32)
        scores, indices = hsa_tl.retrieve_decode(q[:, :1].detach(), landmarks, lengths, 2, chunk_size=16)
        hsa_tl.hsa_decode(q[:, :1].detach(), pages, pages, hsa_tl.fusion_weights(scores), indices, table)
        assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def selected_layer(q_slc, landmarks, q, k, v, cu_seqlens=None):
    """The chosen chunks by one softmax, merged with each token's own key, the way a pretrained layer may call it."""
    _, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, cu_seqlens=cu_seqlens)
    past = selected_attention(q, k, v, indices, chunk_size=S, cu_seqlens=cu_seqlens)
    own_k, own_v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    own = (own_v, (q * own_k).sum(-1) / 4)
    return merge_attention(past, own)[0] + chunk_means(k, S).mean() * q_slc.sum() * landmarks.sum()


def hsa_layer(q_slc, landmarks, q, k, v, cu_seqlens=None):
    """Retrieval to output, the way a model calls it."""
    scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, cu_seqlens=cu_seqlens)
    weights = fusion_weights(scores)
    config = {"overlap": 0.5}
    return hsa_attention(q, k, v, weights, indices, chunk_size=S, cu_seqlens=cu_seqlens, config=config)


def _layer_inputs(T, chunks=None):
    d = Dims(T=T, T_kv=T, HQ=6, H=2)
    call = make_call(d)
    inputs = (torch.randn(1, T, 2, 16), torch.randn(1, chunks or d.N, 2, 16), *call[:3])
    return [x.requires_grad_() for x in inputs], call.do


def _out_and_gradients(function, inputs, do, **options):
    out = function(*inputs, **options)
    return (out.detach(), *torch.autograd.grad(out, inputs, do))


each_layer = pytest.mark.parametrize("layer", (hsa_layer, selected_layer))


# One softmax is quick in one graph of packed sequences, below.
@pytest.mark.parametrize(
    "layer, backend, lengths",
    tiered(
        [(f, *x) for f in (hsa_layer, selected_layer) for x in (("aot_eager", (64, 96, 70)), ("inductor", (64, 96)))],
        quick=[(hsa_layer, "aot_eager", (64, 96, 70))],
        rows=True,
    ),
)
def test_compile_equals_eager(layer, backend, lengths):
    """One graph for every length of whole chunks, one for those with a short last chunk."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for T in lengths:
        inputs, do = _layer_inputs(T)
        eager, actual = (_out_and_gradients(f, inputs, do) for f in (layer, compiled))
        for a, b in zip(actual, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == len({T % S == 0 for T in lengths})


@each_layer
def test_compile_packed_sequences(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([20, 44], [33, 31]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs, do = _layer_inputs(64, sum(-(-n // S) for n in lengths))
        eager, actual = (_out_and_gradients(f, inputs, do, cu_seqlens=cu_seqlens) for f in (layer, compiled))
        for a, b in zip(actual, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_an_overlap_that_changes():
    """From its second value on it is an input of the graph. A mean by NumPy is a float too."""
    torch._dynamo.reset()
    call = make_call(Dims(T=20, T_kv=20))[:5]

    def attend(overlap):
        return hsa_attention(*call, chunk_size=S, config={"overlap": overlap})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for overlap in (0.25, 0.5, 0.75):
        assert torch.equal(compiled(overlap), attend(np.float64(overlap)))


@each_layer
def test_compile_without_gradients(layer):
    torch._dynamo.reset()
    inputs, _ = _layer_inputs(40)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*inputs))


@pytest.mark.parametrize(
    "dims", (Dims(T=4, T_kv=18, D=4), Dims(T=3, T_kv=20, D=4, HQ=4, H=2, K=2, per_head=True)), ids=str
)
def test_gradcheck(dims):
    q, k, v, weights, indices, _ = make_call(dims)
    leaves = [x.double().requires_grad_() for x in (q, k, v, weights)]
    assert torch.autograd.gradcheck(lambda *x: hsa_attention(*x, indices, chunk_size=S), leaves)


@pytest.mark.parametrize("dims", (Dims(T=4, T_kv=18, D=4), Dims(T=3, T_kv=20, D=4, HQ=4, H=2, K=2)), ids=str)
def test_gradcheck_selected(dims):
    """Through out, and lse where it is finite, at ordinary scores and at large ones, which are shifted."""
    q, k, v, _, indices, _ = make_call(dims)
    for scale in (None, 20.0):
        f = lambda *x: [y.nan_to_num(neginf=0.0) for y in selected_attention(*x, indices, chunk_size=S, scale=scale)]  # noqa: B023, E731
        assert torch.autograd.gradcheck(f, [x.double().requires_grad_() for x in (q, k, v)])


def test_gradcheck_packed():
    T = 24
    q, k, v, weights, indices, _ = make_call(Dims(T=T, T_kv=T, D=4))
    leaves = [x.double().requires_grad_() for x in (q, k, v, weights)]
    cu_seqlens = torch.tensor([0, 17, 17, T], dtype=torch.int32)
    indices = indices.clamp(max=0)
    f = lambda *x: hsa_attention(*x, indices, chunk_size=S, cu_seqlens=cu_seqlens)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", (0, 1, 2, 3))
def test_gradient_of_one_input(wanted):
    call = make_call(Dims())
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(call[:4])]
    out = hsa_attention(*leaves, call.indices, chunk_size=S)
    (gradient,) = torch.autograd.grad(out, leaves[wanted], call.do)
    everything = run_with_gradients(hsa_attention, call, chunk_size=S)
    torch.testing.assert_close(gradient, list(everything.values())[1 + wanted], rtol=0, atol=0)


def test_no_gradient_no_pairs(monkeypatch):
    """Inference does not build what only the backward needs."""
    called = []
    monkeypatch.setattr(ops, "build_pairs", lambda *x: called.append(x))
    q, k, v, weights, indices, _ = make_call(Dims())
    for attention, arguments in ((hsa_attention, (q, k, v, weights)), (selected_attention, (q, k, v))):
        attention(*arguments, indices, chunk_size=S)
        with torch.no_grad():
            attention(*(x.clone().requires_grad_() for x in arguments), indices, chunk_size=S)
        assert not called


@pytest.mark.parametrize("used", (0, 1), ids=("out", "lse"))
def test_one_output_alone(used):
    """The gradient of the other is then 0."""
    call = without_weights(make_call(Dims()))
    leaves, incoming = [x.detach().requires_grad_() for x in call[:3]], list(call[4:])
    outputs = selected_attention(*leaves, call.indices, chunk_size=S)
    gradients = torch.autograd.grad(outputs[used], leaves, incoming[used])
    incoming[1 - used] = torch.zeros_like(incoming[1 - used])
    want = run_with_gradients(selected_attention, SelectedInputs(*call[:4], *incoming), chunk_size=S)
    assert all(torch.equal(x, want[name]) for x, name in zip(gradients, ("dq", "dk", "dv"), strict=True))


def test_no_double_backward():
    """A second derivative is an error, not a wrong number."""
    call = make_call(Dims())
    leaves = [x.requires_grad_() for x in call[:4]]
    out = hsa_attention(*leaves, call.indices, chunk_size=S)
    gradients = torch.autograd.grad(out, leaves, call.do, create_graph=True)
    with pytest.raises(NotImplementedError, match="hsa_attention has no second derivative: its gradient cannot"):
        torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)
    outputs = selected_attention(*leaves[:3], call.indices, chunk_size=S)
    (gradient,) = torch.autograd.grad(outputs, leaves[0], (call.do, torch.ones(outputs[1].shape)), create_graph=True)
    with pytest.raises(NotImplementedError, match="selected_attention has no second derivative: its gradient cannot"):
        torch.autograd.grad(gradient.square().sum(), leaves[1])
    q_slc, landmarks = torch.randn(1, 40, 2, 8, requires_grad=True), torch.randn(1, 3, 2, 8, requires_grad=True)
    scores, _ = retrieve_chunks(q_slc, landmarks, 2, chunk_size=S)
    (gradient,) = torch.autograd.grad(scores.nan_to_num(neginf=0).square().sum(), q_slc, create_graph=True)
    with pytest.raises(NotImplementedError, match="retrieve_chunks has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), landmarks)


def test_backward_twice():
    """retain_graph=True: what was saved is not overwritten."""
    call = make_call(Dims())
    leaves = [x.requires_grad_() for x in call[:4]]
    out = hsa_attention(*leaves, call.indices, chunk_size=S)
    first = torch.autograd.grad(out, leaves, call.do, retain_graph=True)
    second = torch.autograd.grad(out, leaves, call.do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_incoming_gradient_of_another_layout():
    call = make_call(Dims(B=2, HQ=6, H=2))
    do = call.do.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not do.is_contiguous()
    assert_attention(run_with_gradients(hsa_attention, call._replace(do=do), chunk_size=S), call, chunk_size=S)
