"""The emulator: what TileLang makes of the programs is right on it, and a program that is broken on purpose is not."""

import re

import pytest
from strategies import Dims, make_call

from hsa_tl import hsa_attention
from hsa_tl.kernels_tilelang import compile, emulate
from hsa_tl.testing import run_with_gradients

S = 64
SPECIALISED = {
    "hsa_fwd_union": {"block_M": 128, "num_stages": 2, "specialised": 1},
    "hsa_fwd_chunk": {"block_M": 128, "threads": 256, "num_stages": 2, "specialised": 1},
    "hsa_bwd_chunk": {"block_M": 128, "threads": 256, "num_stages": 2, "specialised": 1},
}


@pytest.fixture(autouse=True)
def _emulating(monkeypatch):
    monkeypatch.setenv("HSA_TL_EMULATE", "1")


def run_changed(program: str, pattern: str, replacement: str, monkeypatch) -> None:
    """Runs the program with its CUDA source changed wherever the pattern stands, and it must stand somewhere."""
    call = make_call(Dims(T=80, T_kv=4 * S, HQ=16, D=64, S=S, K=4))
    q, k, v, do = (x.bfloat16() for x in (call.q, call.k, call.v, call.do))
    call = call._replace(q=q, k=k, v=v, do=do)
    places = []

    class Changed(emulate.Emulated):
        def __init__(self, ir, artifact):
            super().__init__(ir, artifact)
            if ir.attrs["global_symbol"] == program:
                self.source, count = re.subn(pattern, replacement, self.source)
                places.append(count)

    monkeypatch.setattr(emulate, "Emulated", Changed)
    monkeypatch.setattr(compile, "_KERNELS", {})
    options = {"impl": "tilelang", "config": {program: SPECIALISED.get(program, {})}, "chunk_size": S}
    try:
        if program.startswith("hsa_bwd"):
            run_with_gradients(hsa_attention, call, **options)
        else:
            hsa_attention(*call[:5], **options)
    finally:
        assert places and all(places), f"{pattern!r} is not in the source"


# name: (program, pattern in its CUDA source, what stands there instead, what the emulator says)
BROKEN = {
    "no proxy fence": ("hsa_fwd_union", r"tl::fence_proxy_async\(\);", "", "no fence.proxy.async"),
    "no barrier after the prologue": (
        "hsa_fwd_union", r"(tl::fence_proxy_async\(\);\s*)__syncthreads\(\);", r"\1", "race|uninitialised",
    ),
    "a stage is filled while it is read": (
        "hsa_fwd_union", r"empty\[[^;]*\.wait\([^;]*;", "", "race with a read|more arrivals",
    ),
    "a stage is read while it is filled": ("hsa_fwd_union", r"full\[[^;]*\.wait\([^;]*;", "", "race: wgmma"),
    "the wrong parity": ("hsa_fwd_union", r"(full\[[^;]*\.wait\()([^;]*)\);", r"\1(\2) ^ 1);", "race|deadlock"),
    "fewer bytes expected": (
        "hsa_fwd_union", r"expect_transaction\(8192\)", "expect_transaction(4096)", "race: wgmma|deadlock",
    ),
    "a stage never freed": ("hsa_fwd_union", r"empty\[[^;]*\.arrive\(\);", "", "deadlock.*mbarrier"),
    "more registers than there are": (
        "hsa_fwd_union", r"warpgroup_reg_alloc<\d+>", "warpgroup_reg_alloc<248>", "deadlock.*more registers",
    ),
    "wgmma not waited for": ("hsa_fwd_union", r"warpgroup_wait<0>", "warpgroup_wait<1>", "wgmma is under way"),
    "wgmma without its fence": ("hsa_fwd_union", r"tl::warpgroup_arrive\(\);", "", "wgmma without wgmma.fence"),
    "a store not waited for": (
        "hsa_bwd_chunk", r"tl::tma_store_wait<0, true>\(\);", "", "race with a read|while a TMA store",
    ),
    "a barrier for the wrong number of threads": (
        "hsa_fwd_token", r"__sync_thread_partial\(3, \d+\)", "__sync_thread_partial(3, 32 + threadIdx.x / 32 * 32)",
        "is waited at for",
    ),
    "no barrier before a tile is read": ("hsa_fwd_token", r"tl::__sync_thread_partial\([^;]*;", "", "race"),
    "half a warp": (
        "hsa_fwd_token", r"\(tl::tl_shuffle_elect<128>\(\)\)",
        "(threadIdx.x % 2 && tl::tl_shuffle_elect<128>())", "deadlock.*elect",
    ),
    "a misaligned row": (
        "hsa_fwd_token", r"(ptx_ldmatrix_x4\(\(&\(\(\(bfloat16_t\*\)q_shared\)\[)", r"\g<1>1 + ", "misaligned",
    ),
    "beyond the tensor": ("hsa_fwd_token", r"\(q \+ \(", "(q + (1 << 24) + (", "out of bounds"),
    "beyond shared memory": (
        "hsa_fwd_token", r"\(\(float\*\)weights_shared\)\[", "((float*)weights_shared)[(1 << 16) + ", "out of bounds",
    ),
    "two CTAs write one row": (
        "hsa_fwd_token", r"\*\(uint4\*\)\(out \+ [^=]*=", "*(uint4*)(out + threadIdx.x * 8) =", "race between CTAs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("program, pattern, replacement, fault", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told(program, pattern, replacement, fault, monkeypatch):
    with pytest.raises(emulate.Fault, match=fault):
        run_changed(program, pattern, replacement, monkeypatch)


def test_what_is_not_broken_passes(monkeypatch):
    for program in (*SPECIALISED, "hsa_fwd_token"):
        run_changed(program, "}", "}", monkeypatch)
