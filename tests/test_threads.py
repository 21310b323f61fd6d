"""Threads call anything at once: each gets its own numbers."""

import threading

import pytest
import torch
from strategies import Dims, make_call

from hsa_tl import hsa_attention, retrieve_chunks
from hsa_tl.model import MemorySpec, PagedMemory, load
from hsa_tl.testing import run_with_gradients

S = 16


def in_threads(calls):
    """What each call returns or raises, of as many threads at once, twice over."""
    results = [[] for _ in calls]
    barrier = threading.Barrier(len(calls))

    def run(call, out):
        barrier.wait()
        for _ in range(2):
            try:
                out.append(call())
            except BaseException as error:
                out.append(error)

    threads = [threading.Thread(target=run, args=x) for x in zip(calls, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("impl", ("reference", "tilelang", "triton"))
def test_attention_and_its_gradients(impl):
    """The Triton interpreter is one for the process: unlocked, its programs took each other's addresses."""
    cases = [make_call(Dims(T=20, T_kv=40, HQ=2 + 2 * (i % 2), H=2)) for i in range(4)]
    alone = [run_with_gradients(hsa_attention, c, chunk_size=S, impl=impl) for c in cases]
    calls = [lambda c=c: run_with_gradients(hsa_attention, c, chunk_size=S, impl=impl) for c in cases]
    for want, results in zip(alone, in_threads(calls), strict=True):
        for got in results:
            assert not isinstance(got, BaseException), got
            for a, b in zip(got.values(), want.values(), strict=True):
                torch.testing.assert_close(a, b)


def test_retrieval():
    inputs = [(torch.randn(1, 60, 1, 8), torch.randn(1, 4, 1, 8)) for _ in range(4)]
    alone = [retrieve_chunks(*x, 2, chunk_size=S)[1] for x in inputs]
    calls = [lambda x=x: retrieve_chunks(*x, 2, chunk_size=S, impl="triton")[1] for x in inputs]
    for want, results in zip(alone, in_threads(calls), strict=True):
        for got in results:
            assert not isinstance(got, BaseException), got
            assert torch.equal(got, want)


@pytest.mark.parametrize("cache_pages", (2, 20))
def test_an_offloaded_memory(cache_pages):
    """One cache of pages for all: unlocked, threads read what others had fetched into its place."""
    memory = PagedMemory(MemorySpec(1, 1, 64, 1, 8, S), offload=True, cache_pages=cache_pages)
    memory.append(0, *torch.randn(2, 40 * S, 1, 64), torch.randn(40, 1, 8))
    inputs = [(torch.randn(1, 1, 2, 64), torch.rand(1, 1, 1, 8), torch.randperm(40)[:8].view(1, 1, 1, 8).int())]
    inputs += [(q + 1, w, (i + 8 * n) % 40) for n in range(1, 6) for q, w, i in inputs[:1]]

    def attend(q, weights, indices):
        memory.prefetch(indices)
        return torch.stack([memory.attend(q, x, indices) for x in [weights, None] * 20])

    alone = [attend(*x) for x in inputs]
    for want, results in zip(alone, in_threads([lambda x=x: attend(*x) for x in inputs]), strict=True):
        for got in results:
            assert not isinstance(got, BaseException), got
            assert torch.equal(got, want)


def test_models_of_several_dtypes_load_at_once():
    """torch has one default dtype for the process, which a model is made by."""
    dtypes = [torch.float32, torch.bfloat16] * 2
    calls = [lambda d=d: load("needle-tiny", dtype=d) for d in dtypes]
    for want, results in zip(dtypes, in_threads(calls), strict=True):
        for got in results:
            assert not isinstance(got, BaseException), got
            assert {p.dtype for p in got.parameters()} == {want}
    assert torch.get_default_dtype() is torch.float32
