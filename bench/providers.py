"""What the attention benchmarks compare: HSA's implementations and other attentions behind one small adapter.

A provider that cannot run says precisely why; nothing is substituted for it. None is timed before its results are
compared with float64, as `hsa-tl check` and the demo do too.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsa_tl import api, ops, selected
from hsa_tl.accuracy import Expected, complaints, expect
from hsa_tl.bench import baselines
from hsa_tl.bench.suite import one_of
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.oracle import attention_oracle, expect_attention, expect_selected, selected_oracle
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, SelectedInputs, check_retrieval

DENSE = ("q", "k", "v")
HSA = (*DENSE, "weights", "indices")
RETRIEVAL = ("q_slc", "landmarks", "own")
D_R = 128  # dimension of the retrieval heads
Tensors = Mapping[str, torch.Tensor]


class Accuracy(NamedTuple):
    quantity: str
    max_error: float  # max |actual - high| / max |high|
    rms_error: float  # RMS of actual - high over the RMS of high
    message: str  # what is wrong by the rule of `hsa_tl.accuracy`, "" if nothing


@dataclass(frozen=True)
class Provider:
    """attention and oracle take the tensors named in `uses`, and chunk_size, by keyword."""

    name: str
    attention: Callable[..., torch.Tensor]
    unavailable: Callable[[Problem], str | None] = lambda problem: None
    oracle: Callable[..., torch.Tensor] = attention_oracle
    uses: tuple[str, ...] = HSA
    kernel: str = "hsa_attention"
    backward: bool = True
    note: str = ""  # in each of its rows

    @property
    def leaves(self) -> tuple[str, ...]:
        """What has a gradient."""
        return tuple(n for n in self.uses if n not in ("indices", "own")) if self.backward else ()

    def incoming(self, tensors: Tensors) -> torch.Tensor:
        """The incoming gradient: do, or one of weights for what ends there."""
        return tensors["do" if "q" in self.uses else "dweights"]

    def _results(self, function: Callable, tensors: Tensors, chunk_size: int) -> dict[str, torch.Tensor]:
        """out and every gradient."""
        leaves = {n: tensors[n].detach().requires_grad_() for n in self.leaves}
        out = function(**{n: leaves.get(n, tensors[n]) for n in self.uses}, chunk_size=chunk_size)
        if not leaves:
            return {"out": out}
        gradients = torch.autograd.grad(out, list(leaves.values()), self.incoming(tensors).to(out.dtype))
        return {"out": out.detach()} | dict(zip((f"d{n}" for n in leaves), gradients, strict=True))

    def expected(self, tensors: Tensors, chunk_size: int) -> dict[str, Expected]:
        """What any implementation of these equations is held against for these inputs."""
        if self.oracle is attention_oracle:
            return expect_attention(*(tensors[n] for n in (*HSA, "do")), chunk_size=chunk_size)
        if self.oracle is selected_oracle:
            call = SelectedInputs.of(Inputs(*(tensors[n] for n in (*HSA, "do"))))
            return expect_selected(*call._replace(dlse=torch.zeros_like(call.dlse)), chunk_size=chunk_size)
        kept = tensors["q" if "q" in self.uses else "weights"].dtype

        def oracle(*values):
            return self._results(self.oracle, dict(zip(tensors, values, strict=True)), chunk_size)

        return expect(oracle, *tensors.values(), dtype=kept, out=tensors["q"].dtype)

    def compare(self, tensors: Tensors, chunk_size: int, want: dict[str, Expected]) -> list[Accuracy]:
        """Errors of out and every gradient relative to float64, each judged by the rule of `hsa_tl.accuracy`."""
        rows = []
        for name, value in self._results(self.attention, tensors, chunk_size).items():
            high, least = want[name].value, torch.finfo(torch.float64).tiny
            norms = [(x.abs().max(), torch.linalg.norm(x)) for x in (value.double() - high, high)]
            errors = (float(error / size.clamp(min=least)) for error, size in zip(*norms, strict=True))
            rows.append(Accuracy(name, *errors, "; ".join(complaints(name, value, want[name]))))
        return rows


def selection_complaints(tensors: Tensors, chunk_size: int) -> list[str]:
    """What is wrong with what `retrieve_chunks` chooses for the inputs, and with "own" in them."""
    q_slc, landmarks, own = (tensors[n] for n in RETRIEVAL)
    scores, indices = api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)
    if not torch.equal(indices, own):
        return ["the selection differs from call to call"]
    return check_retrieval(scores, indices, q_slc, landmarks, chunk_size=chunk_size)


def why_not(impl: str, problem: Problem, suffix: str = "") -> str | None:
    """Why impl, or its part "_selected" or "_retrieval", cannot run problem here; None if it can."""
    try:
        if impl == "auto":
            ops.resolve(impl, problem, suffix)
            return None
        return ops.unavailable(impl, problem, suffix)
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        return f"hsa_tl.impl.{impl}{suffix} does not import: {type(error).__name__}: {error}"


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

    return Provider(f"hsa-tilelang-{forward.removeprefix('hsa_fwd_')}", attention, unavailable)


def retrieve(q_slc, landmarks, own, *, chunk_size):
    """Retrieval and fusion weights, what HSA pays before attention; own only says how many chunks."""
    return api.fusion_weights(api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)[0])


def retrieve_oracle(q_slc, landmarks, own, *, chunk_size):
    """Weights of the chunks in own."""
    s = torch.einsum("btrd,bnrd->btrn", q_slc, landmarks) / q_slc.shape[3] ** 0.5
    s = s.gather(3, own.clamp(min=0).long()).masked_fill(own < 0, -torch.inf)
    return api.fusion_weights(s.to(torch.promote_types(torch.float32, s.dtype)))


def with_retrieval(q, k, v, q_slc, landmarks, own, *, chunk_size):
    scores, chosen = api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)
    return api.hsa_attention(q, k, v, api.fusion_weights(scores), chosen, chunk_size=chunk_size)


def with_retrieval_oracle(q, k, v, q_slc, landmarks, own, *, chunk_size):
    weights = retrieve_oracle(q_slc, landmarks, own, chunk_size=chunk_size)
    return attention_oracle(q, k, v, weights, own, chunk_size=chunk_size)


_one_softmax = functools.partial(
    Provider,
    uses=(*DENSE, "indices"),
    note="different arithmetic: one softmax over the chosen chunks, no weights, as its gate has it too",
)


def _selected(impl: str) -> Provider:
    """One softmax over the chosen chunks, out alone."""

    def attention(q, k, v, indices, *, chunk_size):
        return selected.selected_attention(q, k, v, indices, chunk_size=chunk_size, impl=impl)[0]

    unavailable = functools.partial(why_not, impl, suffix="_selected")
    return _one_softmax(f"selected-{impl}", attention, unavailable, selected_oracle, kernel="selected_attention")


_dense = functools.partial(Provider, oracle=baselines.dense_oracle, uses=DENSE, kernel="dense_attention")
_retrieves = functools.partial(Provider, unavailable=functools.partial(why_not, "auto"), note=f"D_r={D_R}")
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
        *(
            Provider(f"hsa-{x}", functools.partial(api.hsa_attention, impl=x), functools.partial(why_not, x))
            for x in api.IMPLS
        ),
        *(_strategy(name) for name in configs.tuned() if name.startswith("hsa_fwd_")),
        *map(_selected, ("auto", "tilelang", "triton")),
        Provider("ramstorage-triton", baselines.ramstorage_triton, baselines.RAMSTORAGE_TRITON.unavailable),
        Provider(
            "ramstorage-tilelang", baselines.ramstorage_tilelang, baselines.ramstorage_tilelang_unavailable,
            backward=False,
        ),
        Provider("hils", baselines.hils, baselines.HILS_SCRIPT.unavailable),
        _one_softmax("nsa-fla", baselines.nsa, baselines.nsa_unavailable, baselines.nsa_oracle, kernel="nsa_attention"),
        _one_softmax(
            "moba", baselines.moba, baselines.MOBA_SCRIPT.unavailable, baselines.moba_oracle, kernel="moba_attention",
        ),
        _retrieves("retrieve", retrieve, oracle=retrieve_oracle, uses=RETRIEVAL, kernel="retrieval"),
        _retrieves(
            "hsa-with-retrieval", with_retrieval, oracle=with_retrieval_oracle, uses=(*DENSE, *RETRIEVAL),
            kernel="hsa_with_retrieval",
        ),
    )
}  # fmt: skip
DEFAULT_PROVIDERS = {
    "cpu": ("dense", "dense-expanded", "dense-math", "hsa-auto", "selected-auto", "retrieve", "hsa-with-retrieval"),
    "cuda": tuple(n for n in PROVIDERS if n not in ("dense-expanded", "dense-math")),
}


def provider(name: str) -> Provider:
    """The provider of that name; ValueError lists the names."""
    return PROVIDERS[one_of("provider", name, PROVIDERS)]
