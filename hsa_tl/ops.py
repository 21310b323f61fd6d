"""torch.library operators: schemas and fakes. The only place where an implementation is looked up.

Inside, keys and values are [B, N, S, H, D]: whole chunks, zero padded, with chunk_len [N] where a chunk is short.
An implementation is a module hsa_tl.impl.<name> with `forward` and `backward`; its programs of other operators are in
<name>_selected, <name>_decode and <name>_retrieval. Each but "reference", which always can, says why it cannot run a
problem by `unavailable(problem)`; one that decodes beside that has `decode_unavailable(problem)` too, of decode alone.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hsa_tl import decode_retrieval, near, pairs, retrieval, workers
from hsa_tl.pairs import Pairs, check_pages, check_range
from hsa_tl.problem import Problem, Retrieval

LIBRARY = torch.library.Library("hsa_tl", "DEF")


def _own(x: Tensor) -> Tensor:
    """x, as a tensor that is no view: autograd lets nobody change in place a view that an operator returned."""
    return x.new_empty(0).set_(x) if x._is_view() else x


def operator(fake: Callable):
    """Registers a function of tensors, the first of them given, as hsa_tl::<its name>, without what autocast adds.

    On the CPU it runs in a worker, see hsa_tl.workers.

    fake: of the same arguments, results of the same shapes and types whose values mean nothing.
    torch.library.custom_op would do, but the first call of what it makes imports the compiler, for a second or two.
    """

    def register(function):
        name = function.__name__

        def run(*args):
            if not args[0].numel():  # no token: kernels take no empty grid
                return tree_map(Tensor.zero_, fake(*args))
            device = args[0].device.type
            call = functools.partial(workers.call, function) if device == "cpu" else function
            casts = torch.is_autocast_enabled(device)
            with torch.autocast(device, enabled=False) if casts else contextlib.nullcontext():
                results = call(*args)
            return tuple(map(_own, results)) if isinstance(results, tuple) else _own(results)

        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hsa_tl::{name}", fake)
        return getattr(torch.ops.hsa_tl, name).default

    return register


def implementation(name: str):
    """The module hsa_tl.impl.<name>, imported when first asked for."""
    return importlib.import_module(f"hsa_tl.impl.{name}")


def preferred(problem: Problem) -> tuple[str, ...]:
    """Implementations for impl="auto", fastest first."""
    if problem.device_type != "cuda" or problem.dtype == torch.float64:
        return ("reference",)
    if torch.cuda.get_device_capability(problem.device_index)[0] == 9:
        return ("tilelang", "triton", "reference")
    return ("triton", "reference")


def unavailable(impl: str, problem: Problem | Retrieval, suffix: str = "", asked: str = "unavailable") -> str | None:
    """Why the module impl + suffix cannot run the problem, or None. asked: what of the module says so."""
    return None if impl == "reference" else getattr(implementation(impl + suffix), asked)(problem)


def resolve(impl: str, problem: Problem | Retrieval, suffix: str = "", asked: str = "unavailable") -> str:
    """The module of hsa_tl.impl to run, impl + suffix; NotImplementedError if an explicit one cannot."""
    for name in preferred(problem) if impl == "auto" else (impl,):
        reason = unavailable(name, problem, suffix, asked)
        if reason is None:
            return name + suffix
    raise NotImplementedError(
        f"impl={impl!r} cannot run {problem} on {problem.device_type}: {reason}; use 'auto' or 'reference'"
    )


def sort_pairs(indices: Tensor, num_chunks: int) -> Pairs:
    """On Hopper TileLang's counting sort where it is installed, else torch's sort: the same Pairs."""
    if indices.is_cuda and torch.cuda.get_device_capability(indices.device) == (9, 0):
        tilelang = implementation("tilelang")
        if tilelang.installed():
            return tilelang.sort_pairs(indices, num_chunks)
    return pairs.sort_pairs(indices, num_chunks)


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_pairs(indices, num_chunks, validate):
    B, _, H, _ = indices.shape
    return indices.new_empty(indices.numel()), indices.new_empty(B * H * num_chunks + 1, dtype=torch.int64)


def _fake_pack(cu_seqlens, indices, chunk_size, num_chunks, validate):
    position = indices.new_empty(indices.shape[1], dtype=torch.int64)
    return position, _like(indices), indices.new_empty(num_chunks)


def _fake_out_and_lse(q, *_):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@operator(_fake_pairs)
def build_pairs(indices: Tensor, num_chunks: int, validate: bool) -> tuple[Tensor, Tensor]:
    if validate:
        check_range(indices, num_chunks)
    return tuple(sort_pairs(indices, num_chunks))


@operator(_fake_pack)
def pack(
    cu_seqlens: Tensor, indices: Tensor, chunk_size: int, num_chunks: int, validate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed sequences as one of whole chunks: each token's row, the selection in global chunks, chunk_len."""
    T = indices.shape[1]
    if validate:
        retrieval.check_cu_seqlens(cu_seqlens, T)
    lens = cu_seqlens.diff().long()
    chunks = (lens + chunk_size - 1) // chunk_size
    ends = chunks.cumsum(0)
    first = ends - chunks
    t = torch.arange(T, device=indices.device)
    seq = torch.searchsorted(cu_seqlens[1:].long(), t, right=True).clamp(max=len(lens) - 1)
    limit = chunks[seq][None, :, None, None]
    if validate:
        check_range(indices, limit)
    position = first[seq] * chunk_size + t - cu_seqlens[seq]
    valid = (indices >= 0) & (indices < limit)
    packed = torch.where(valid, indices + first[seq][None, :, None, None], -1).int()
    c = torch.arange(num_chunks, device=indices.device)
    of = torch.searchsorted(ends, c, right=True).clamp(max=len(lens) - 1)
    chunk_len = (lens[of] - (c - first[of]) * chunk_size).clamp(0, chunk_size).int()
    return position, packed, chunk_len


@operator(lambda q, *_: _like(q))
def attention(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, indices: Tensor, pair: Optional[Tensor],
    offsets: Optional[Tensor], chunk_len: Optional[Tensor], scale: float, impl: str, config: str,
    deterministic: bool, validate: bool,
) -> Tensor:  # fmt: skip
    N = k.shape[1]
    if validate and pair is None:
        check_range(indices, N)
    module = implementation(resolve(impl, Problem.of(q, k, weights, indices, chunk_len)))
    index = None if pair is None else Pairs(pair, offsets)
    return module.forward(q, k, v, weights, indices, index, chunk_len, scale, config, deterministic)


@operator(lambda do, q, k, v, weights, *_: tuple(map(_like, (q, k, v, weights))))
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, indices: Tensor, pair: Tensor, offsets: Tensor,
    chunk_len: Optional[Tensor], scale: float, impl: str, config: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    module = implementation(resolve(impl, Problem.of(q, k, weights, indices, chunk_len)))
    return module.backward(do, q, k, v, weights, indices, Pairs(pair, offsets), chunk_len, scale, config, deterministic)


@operator(lambda indices, *_: _like(indices))
def distinct(indices: Tensor, num_chunks: int, validate: bool) -> Tensor:
    if validate:
        check_range(indices, num_chunks)
    return pairs.distinct(indices, num_chunks)


@operator(_fake_out_and_lse)
def selected(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, pair: Optional[Tensor], offsets: Optional[Tensor],
    chunk_len: Optional[Tensor], scale: float, impl: str, config: str, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """indices as `distinct` gives them."""
    module = implementation(resolve(impl, Problem.of(q, k, None, indices, chunk_len), "_selected"))
    index = None if pair is None else Pairs(pair, offsets)
    return module.forward(q, k, v, indices, index, chunk_len, scale, config, deterministic)


@operator(lambda do, dlse, q, k, v, *_: tuple(map(_like, (q, k, v))))
def selected_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, pair: Tensor,
    offsets: Tensor, chunk_len: Optional[Tensor], scale: float, impl: str, config: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    module = implementation(resolve(impl, Problem.of(q, k, None, indices, chunk_len), "_selected"))
    index = Pairs(pair, offsets)
    return module.backward(do, dlse, q, k, v, indices, out, lse, index, chunk_len, scale, config, deterministic)


@operator(_fake_out_and_lse)
def selected_decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, indices: Tensor, page_table: Tensor, scale: float, impl: str,
    validate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if validate:
        check_pages(indices, page_table, k_pages.shape[0])
    problem = Problem.of(q, k_pages, None, indices, page_table=page_table)
    module = implementation(resolve(impl, problem, "_selected", "decode_unavailable"))
    return module.decode(q, k_pages, v_pages, pairs.distinct(indices, page_table.shape[1]), page_table, scale)


@operator(lambda q, *_: _like(q))
def decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, weights: Tensor, indices: Tensor, page_table: Tensor, scale: float,
    impl: str, validate: bool,
) -> Tensor:  # fmt: skip
    if validate:
        check_pages(indices, page_table, k_pages.shape[0])
    problem = Problem.of(q, k_pages, weights, indices, page_table=page_table)
    module = implementation(resolve(impl, problem, "_decode"))
    return module.decode(q, k_pages, v_pages, weights, indices, page_table, scale)


@operator(lambda q_slc, landmarks, lengths, chunks, bounds, topk, *_: retrieval.empty_slots(q_slc, topk))
def retrieve_decode(
    q_slc: Tensor, landmarks: Tensor, lengths: Tensor, chunks: Optional[Tensor], bounds: Optional[Tensor], topk: int,
    chunk_size: int, exclude_window: int, recency: Optional[Tensor], recency_span: int, scale: float, impl: str,
    validate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if bounds is None:
        problem = Retrieval.of(q_slc, landmarks.shape[1], topk)
        run = implementation(resolve(impl, problem, "_retrieval", "decode_unavailable")).retrieve_decode
    elif impl in ("auto", "reference"):
        run = functools.partial(decode_retrieval.retrieve_decode, bounds=bounds)
    else:
        raise NotImplementedError(f"impl={impl!r} cannot retrieve by bounds; use 'auto' or 'reference'")
    if recency is not None and validate:
        near.check(recency)
    given = q_slc, landmarks, lengths, chunks, topk, chunk_size
    if run is decode_retrieval.retrieve_decode:
        return run(*given, exclude_window, scale, recency=recency, recency_span=recency_span)
    if recency is None:
        return run(*given, exclude_window, scale)
    best = run(*given, near.far_window(recency_span, chunk_size, exclude_window), scale)
    return near.join_decode(
        q_slc, *best, landmarks, lengths, chunks, recency, recency_span, chunk_size, exclude_window, scale
    )


@operator(lambda q_slc, landmarks, topk, *_: retrieval.empty_slots(q_slc, topk))
def retrieve(
    q_slc: Tensor, landmarks: Tensor, topk: int, chunk_size: int, q_start: int, exclude_window: int,
    cu_seqlens: Optional[Tensor], recency: Optional[Tensor], recency_span: int, scale: float, impl: str,
    validate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = landmarks.shape[1]
    parts = retrieval.sequences(cu_seqlens, q_slc.shape[1], N, chunk_size)
    name = resolve(impl, Retrieval.of(q_slc, N, topk), "_retrieval")
    if recency is not None and validate:
        near.check(recency)
    run, static = implementation(name).retrieve, (topk, chunk_size, q_start)
    if name == "reference_retrieval":
        return run(q_slc, landmarks, *static, exclude_window, scale, parts, recency, recency_span)
    window = exclude_window if recency is None else near.far_window(recency_span, chunk_size, exclude_window)
    static += (window, scale)
    if len(parts) == 1:
        best = run(q_slc, landmarks, *static)
    else:
        results = (run(q_slc[:, tokens], landmarks[:, chunks], *static) for tokens, chunks in parts)
        best = [torch.cat(x, 1) for x in zip(*results, strict=True)]
    if recency is None:
        return tuple(best)
    return near.join(
        q_slc, *best, landmarks, cu_seqlens, recency, recency_span, chunk_size, q_start, exclude_window, scale
    )


@operator(lambda dscores, indices, q_slc, landmarks, *_: (_like(q_slc), _like(landmarks)))
def retrieve_backward(
    dscores: Tensor, indices: Tensor, q_slc: Tensor, landmarks: Tensor, cu_seqlens: Optional[Tensor], chunk_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = landmarks.shape[1]
    chosen = retrieval.global_chunks(indices, cu_seqlens, N, chunk_size)
    run = implementation(resolve("auto", Retrieval.of(q_slc, N, 1), "_retrieval"))  # sums take any number of slots
    dlandmarks = run.dlandmarks(dscores, sort_pairs(chosen, N), q_slc, N, scale)
    return retrieval.dq_slc(dscores, chosen, q_slc, landmarks, scale), dlandmarks
