"""What the benchmarks compare: HSA's implementations and dense baselines behind one small adapter.

A provider that cannot run says precisely why; nothing is substituted for it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_tl import api, ops
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.oracle import attention_oracle
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs

MODES = ("forward", "backward", "train")  # train is forward and backward


@dataclass(frozen=True)
class Provider:
    """attention and oracle take (q, k, v, weights, indices, *, chunk_size); a dense one ignores the selection."""

    name: str
    attention: Callable[..., torch.Tensor]
    oracle: Callable[..., torch.Tensor]
    unavailable: Callable[[Problem], str | None]
    dense: bool = False

    def flops(self, problem: Problem, mode: str) -> int:
        count = problem.dense_flops if self.dense else problem.flops
        return sum(count(m) for m in (("forward", "backward") if mode == "train" else (mode,)))


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
    def attention(*args, chunk_size):
        return api.hsa_attention(*args, chunk_size=chunk_size, impl=impl)

    return Provider(f"hsa-{impl}", attention, attention_oracle, lambda problem: why_not(impl, problem))


def _strategy(name: str, programs: tuple[str, ...]) -> Provider:
    """The TileLang programs of one strategy, whatever the rule would choose."""
    config = {program: {} for program in programs}

    def attention(*args, chunk_size):
        return api.hsa_attention(*args, chunk_size=chunk_size, impl="tilelang", config=config)

    def unavailable(problem):
        reason = why_not("tilelang", problem)
        lacking = [p for p in programs if problem.device_type == "cuda" and not configs.space(p, problem)]
        return reason or (f"no config of {' and '.join(lacking)} suits {problem}" if lacking else None)

    return Provider(f"hsa-tilelang-{name}", attention, attention_oracle, unavailable)


def dense_oracle(q, k, v, weights, indices, *, chunk_size):
    """Causal softmax attention over all keys, as the equation has it."""
    G, T = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(G, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[3] ** 0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(future, -torch.inf).softmax(-1), v)


def _sdpa(q, k, v, weights, indices, *, chunk_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _sdpa_expanded(q, k, v, weights, indices, *, chunk_size):
    """Keys and values copied to every query head first: on a CPU faster than letting SDPA group the heads."""
    G = q.shape[2] // k.shape[2]
    return _sdpa(q, *(x.repeat_interleave(G, 2) for x in (k, v)), weights, indices, chunk_size=chunk_size)


def _sdpa_backend(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attention(*args, chunk_size):
        with sdpa_kernel(backend):
            return _sdpa(*args, chunk_size=chunk_size)

    return attention


def _needs_half_on_cuda(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"needs CUDA tensors, the problem is on {problem.device_type}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the problem is in {problem.dtype_name}"
    return None


def _flash3(q, k, v, weights, indices, *, chunk_size):
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def _flash3_unavailable(problem: Problem) -> str | None:
    if reason := _needs_half_on_cuda(problem):
        return reason
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "FlashAttention-3 is not installed: no module flash_attn_interface"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"FlashAttention-3 needs a Hopper GPU, got {torch.cuda.get_device_name()}"
    return None


def _dense(name: str, attention: Callable, unavailable: Callable) -> Provider:
    return Provider(name, attention, dense_oracle, unavailable, dense=True)


PROVIDERS = {
    p.name: p
    for p in (
        _dense("dense", _sdpa, lambda problem: None),
        _dense("dense-expanded", _sdpa_expanded, lambda problem: None),
        _dense("dense-cudnn", _sdpa_backend(SDPBackend.CUDNN_ATTENTION), _needs_half_on_cuda),
        _dense("dense-flash", _sdpa_backend(SDPBackend.FLASH_ATTENTION), _needs_half_on_cuda),
        _dense("dense-fa3", _flash3, _flash3_unavailable),
        *(_hsa(impl) for impl in api.IMPLS),
        _strategy("token", ("hsa_fwd_token", "hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk")),
        _strategy("union", ("hsa_fwd_union", "hsa_bwd_chunk")),
        _strategy("chunk", ("hsa_fwd_chunk", "hsa_bwd_chunk")),
    )
}
DEFAULT_PROVIDERS = {"cpu": ("dense", "dense-expanded", "hsa-auto"), "cuda": tuple(PROVIDERS)}


def provider(name: str) -> Provider:
    """The provider of that name; ValueError lists the names."""
    if name not in PROVIDERS:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {name!r}")
    return PROVIDERS[name]


def call(p: Provider, inputs: Inputs, chunk_size: int, mode: str) -> Callable[[], object]:
    """One call of the provider in that mode, without arguments."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    q, k, v, weights, indices, do = inputs

    def forward(*leaves):
        return p.attention(*leaves, indices, chunk_size=chunk_size)

    if mode == "forward":
        return torch.no_grad()(lambda: forward(q, k, v, weights))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    wanted = leaves[:3] if p.dense else leaves
    if mode == "train":
        return lambda: torch.autograd.grad(forward(*leaves), wanted, do)
    out = forward(*leaves)
    return lambda: torch.autograd.grad(out, wanted, do, retain_graph=True)
