"""What the attention benchmarks compare: HSA's implementations and other attentions behind one small adapter.

A provider that cannot run says precisely why; nothing is substituted for it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hsa_tl import api, ops
from hsa_tl.bench import baselines, published
from hsa_tl.bench.suite import one_of
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.oracle import attention_oracle
from hsa_tl.problem import Problem

DENSE = ("q", "k", "v")
HSA = (*DENSE, "weights", "indices")
RETRIEVAL = ("q_slc", "landmarks", "own")
LAYER = (*DENSE, *RETRIEVAL)
D_R = 128  # dimension of the retrieval heads


@dataclass(frozen=True)
class Provider:
    """attention and oracle take the tensors named in `uses`, and chunk_size, by keyword."""

    name: str
    attention: Callable[..., torch.Tensor]
    oracle: Callable[..., torch.Tensor]
    unavailable: Callable[[Problem], str | None]
    uses: tuple[str, ...] = HSA
    kernel: str = "hsa_attention"
    ours: bool = True
    backward: bool = True
    note: str = ""  # in each of its rows
    config: dict | None = None  # of hsa_attention, to which a sweep adds its selection's overlap; None if it takes none

    @property
    def leaves(self) -> tuple[str, ...]:
        """What has a gradient."""
        return tuple(n for n in self.uses if n not in ("indices", "own")) if self.backward else ()

    def incoming(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The incoming gradient: do, or one of weights for what ends there."""
        return tensors["do" if "q" in self.uses else "dweights"]


def why_not(impl: str, problem: Problem) -> str | None:
    """Why impl cannot run problem here, None if it can; a failing import is a reason."""
    try:
        if impl == "auto":
            ops.resolve(impl, problem)
            return None
        return ops.implementation(impl).unavailable(problem)
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        return f"hsa_tl.impl.{impl} does not import: {type(error).__name__}: {error}"


def _hsa(impl: str) -> Provider:
    attention = functools.partial(api.hsa_attention, impl=impl)
    return Provider(f"hsa-{impl}", attention, attention_oracle, functools.partial(why_not, impl), config={})


def _strategy(forward: str) -> Provider:
    """The TileLang programs of one forward strategy and a backward, whatever the plan would be."""
    chunk = ("hsa_bwd_chunk_sm90a",) if forward.endswith("_sm90a") else ("hsa_bwd_chunk",)
    programs = forward, *(("hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk") if forward == "hsa_fwd_token" else chunk)
    config = {program: {} for program in programs}
    attention = functools.partial(api.hsa_attention, impl="tilelang", config=config)

    def unavailable(problem):
        reason = why_not("tilelang", problem)
        if problem.device_type == "cpu":
            return reason or configs.cpu_refusal(forward)
        lacking = [p for p in programs if not configs.space(p, problem)]
        return reason or (f"no config of {' and '.join(lacking)} suits {problem}" if lacking else None)

    name = f"hsa-tilelang-{forward.removeprefix('hsa_fwd_')}"
    return Provider(name, attention, attention_oracle, unavailable, config=config)


def retrieve(q_slc, landmarks, own, *, chunk_size):
    """Retrieval and fusion weights, what HSA pays before attention; own only says how many chunks."""
    return api.fusion_weights(api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)[0])


def retrieve_oracle(q_slc, landmarks, own, *, chunk_size):
    """Weights of the chunks in own."""
    s = torch.einsum("btrd,bnrd->btrn", q_slc, landmarks) / q_slc.shape[3] ** 0.5
    s = s.gather(3, own.clamp(min=0).long()).masked_fill(own < 0, -torch.inf)
    return api.fusion_weights(s.to(torch.promote_types(torch.float32, s.dtype)))


def with_retrieval(q, k, v, q_slc, landmarks, own, *, chunk_size, config=None):
    scores, chosen = api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)
    return api.hsa_attention(q, k, v, api.fusion_weights(scores), chosen, chunk_size=chunk_size, config=config)


def with_retrieval_oracle(q, k, v, q_slc, landmarks, own, *, chunk_size):
    weights = retrieve_oracle(q_slc, landmarks, own, chunk_size=chunk_size)
    return attention_oracle(q, k, v, weights, own, chunk_size=chunk_size)


def _dense(name: str, attention: Callable, unavailable: Callable = lambda problem: None) -> Provider:
    return Provider(name, attention, baselines.dense_oracle, unavailable, DENSE, "dense_attention", ours=False)


def _published(name: str, attention: Callable, unavailable: Callable, **changes) -> Provider:
    return Provider(name, attention, changes.pop("oracle", attention_oracle), unavailable, ours=False, **changes)


_ramstorage = functools.partial(published.checkout_unavailable, published.RAMSTORAGE, "hsa_triton")
_hils = functools.partial(published.checkout_unavailable, published.HILS, "hils_fwd_bwd_head")
_nsa_note = "different arithmetic: one softmax over the chosen chunks, no weights; the gate holds it against that"
_d_r = f"D_r={D_R}"
_auto = functools.partial(why_not, "auto")
_layer = with_retrieval, with_retrieval_oracle, _auto, LAYER
PROVIDERS = {
    p.name: p
    for p in (
        _dense("dense", baselines.sdpa),
        _dense("dense-expanded", baselines.sdpa_expanded),
        _dense("dense-math", baselines.dense_oracle),
        _dense("dense-cudnn", baselines.cudnn, baselines.needs_half_on_cuda),
        _dense("dense-flash", baselines.flash2, baselines.needs_half_on_cuda),
        _dense("dense-flex", baselines.flex, baselines.flex_unavailable),
        _dense("dense-fa3", baselines.flash3, baselines.flash3_unavailable),
        *(_hsa(impl) for impl in api.IMPLS),
        *(_strategy(name) for name in configs.tuned() if name.startswith("hsa_fwd_")),
        _published("ramstorage-triton", published.ramstorage_triton, _ramstorage),
        _published(
            "ramstorage-tilelang",
            published.ramstorage_tilelang,
            published.ramstorage_tilelang_unavailable,
            backward=False,
        ),
        _published("hils", published.hils, _hils),
        _published(
            "nsa-fla",
            published.nsa,
            published.nsa_unavailable,
            oracle=published.nsa_oracle,
            uses=(*DENSE, "indices"),
            kernel="nsa_attention",
            note=_nsa_note,
        ),
        Provider("retrieve", retrieve, retrieve_oracle, _auto, RETRIEVAL, "retrieval", note=_d_r),
        Provider("hsa-with-retrieval", *_layer, "hsa_with_retrieval", note=_d_r, config={}),
    )
}
DEFAULT_PROVIDERS = {
    "cpu": ("dense", "dense-expanded", "dense-math", "hsa-auto", "retrieve", "hsa-with-retrieval"),
    "cuda": tuple(n for n in PROVIDERS if n not in ("dense-expanded", "dense-math")),
}


def provider(name: str) -> Provider:
    """The provider of that name; ValueError lists the names."""
    return PROVIDERS[one_of("provider", name, PROVIDERS)]
