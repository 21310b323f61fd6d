"""The Triton kernels of both attentions, compiled for Hopper without a GPU."""

import pytest
import torch
from strategies import Dims, make_call, without_weights
from tiers import tiered

from hsa_tl import cases, hsa_attention, ops, selected_attention
from hsa_tl.testing import assert_attention, run_with_gradients

triton = pytest.importorskip("triton")

TYPES = {
    **dict.fromkeys(("q", "k", "v", "do", "out", "dq", "dk", "dv"), "*bf16"),
    **dict.fromkeys(("weights", "dweights", "lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("indices", "chunk_len", "page_table", "pair"), "*i32"),
    **{"offsets": "*i64", "scale": "fp32", "scale_log2": "fp32"},
}
SHAPES = {"paper": (16, 128, 64, False), "short-chunk": (16, 64, 64, True), "few-heads": (4, 64, 32, False)}


@pytest.mark.static
@pytest.mark.parametrize("weighted", (True, False), ids=("hsa", "selected"))
@pytest.mark.parametrize("G, D, S, masked", tiered(SHAPES, quick=("short-chunk",), rows=True))
def test_kernels_compile_for_hopper(weighted, G, D, S, masked, monkeypatch):
    """On tensor cores, with loads that run ahead, without local memory in what ptxas gets, in the shared memory that
    the plan reckons with. Pointers are aligned as tensors are, or Triton would load nothing ahead."""
    kernels, base, triton_launch = map(ops.implementation, ("triton_kernels", "triton", "triton_launch"))
    monkeypatch.setattr(base, "_device_shared_bytes", lambda device: base._HOPPER_SHARED_BYTES)
    q, k = (torch.empty(shape, device="meta").bfloat16() for shape in ((1, 8, G, D), (1, 3, S, 1, D)))
    slots = torch.empty(1, 8, 1, 4, device="meta")
    absent = ("lse", "dlse", "delta") if weighted else ("weights", "dweights")
    forward = kernels.forward_kernel
    for kernel, paged in ((forward, False), (kernels.dq_kernel, False), (kernels.dkdv_kernel, False), (forward, True)):
        constants, _ = base._setup(kernel, q, k, slots if weighted else None, slots, "")
        constants |= dict.fromkeys(absent if masked and not paged else (*absent, "chunk_len"))
        constants |= {"WANT_DK": True, "WANT_DV": True}
        if kernel is forward and not paged:
            constants |= dict.fromkeys(("page_table", "P", "splits"))
        if weighted and kernel is kernels.dq_kernel:
            constants["out"] = None
        jitted = triton_launch.form(kernel, False)
        signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in jitted.arg_names}
        given = {n: constants[n] for n in signature if n in constants}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = triton.compiler.ASTSource(jitted, signature, given, attrs=aligned)
        options = {n: constants[n] for n in ("num_warps", "num_stages", "maxnreg") if n in constants}
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        made = triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})
        ptx = made.asm["ptx"]
        assert "mma" in ptx and "cp.async" in ptx and "st.local" not in ptx, kernel.__name__
        settings = base.plan(kernel, G, D, S, 2)
        reckoned = base._shared_bytes(kernel, settings["block_M"], settings["num_stages"], S, constants["BLOCK_D"], 2)
        assert reckoned - 512 <= made.metadata.shared <= reckoned, kernel.__name__


@pytest.mark.parametrize("lacking", ("forward_kernel", "dq_kernel", "dkdv_kernel"))
def test_one_softmax_needs_every_kernel_and_decode_the_forward_one(lacking, monkeypatch):
    base, selected, decode = map(ops.implementation, ("triton", "triton_selected", "triton_decode"))
    monkeypatch.setattr(base.triton_launch, "unavailable", lambda problem: None)
    monkeypatch.setattr(base, "_device_shared_bytes", lambda device: 16384)
    monkeypatch.setattr(base, "plan", lambda kernel, *_: None if kernel.__name__ == lacking else {})
    problem = cases.case("paper-d64").problem
    reason = f"{lacking} needs more than the 16384 bytes of shared memory that a block can have"
    assert selected.unavailable(problem) == base.unavailable(problem) == reason
    for of_decode in (selected.decode_unavailable, decode.unavailable):
        assert of_decode(problem) == (reason if lacking == "forward_kernel" else None)


@pytest.mark.parametrize("attention", (hsa_attention, selected_attention))
def test_a_chunk_s_pairs_may_be_shared_out(attention):
    """Programs that sum parts of dk and dv, as a GPU has where there are few chunks."""
    call = make_call(Dims(B=2, T=70, T_kv=40, HQ=4, H=2, K=2))
    call = without_weights(call) if attention is selected_attention else call
    config = {"dkdv_kernel": {"num_splits": 3}}
    assert_attention(
        run_with_gradients(attention, call, impl="triton", config=config, chunk_size=16), call, chunk_size=16
    )
