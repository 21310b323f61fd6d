"""Launchers of the TileLang programs: on Hopper, and on the CPU through TileLang's C target (float32).

Where an emulator has attached itself to the compiler, CPU tensors in bfloat16 and float16 run what is compiled for
Hopper.
"""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_tl.autotune import plan
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.pairs import Pairs, Window, partial_window, windows
from hsa_tl.pairs import sort_pairs as sort_by_torch
from hsa_tl.problem import Problem, Selection

SORT_BLOCKS = 4096  # CTAs of the pairs' counting sort at most
SORT_TOKENS = 16  # of a CTA at least
HALF = (torch.bfloat16, torch.float16)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def emulating() -> bool:
    """Whether an emulator runs what is compiled for CUDA on CPU tensors."""
    compile = sys.modules.get("hsa_tl.kernels_tilelang.compile")  # an emulator has imported it
    return compile is not None and compile.emulator is not None


@functools.cache
def _finds_compiler(named: str | None, path: str | None) -> bool:
    names = ("g++", "clang++", "c++") if named is None else (named,)
    return any(shutil.which(name, path=path) for name in names)


def _lacks_compiler() -> str | None:
    """What compiles for the host: TileLang takes CXX, CC or what is on PATH."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    if _finds_compiler(named, os.environ.get("PATH")):
        return None
    return f"on a CPU it needs a C++ compiler, and there is no {named or 'g++, clang++ or c++ on PATH'}"


def targeted(problem):
    """The problem as its programs are compiled: for CUDA where an emulator runs them on CPU tensors."""
    emulated = problem.device_type == "cpu" and problem.dtype in (*HALF, None) and emulating()
    return problem.on_cuda() if emulated else problem


def unavailable(problem, programs: tuple[str, ...] = ()) -> str | None:
    """Why the TileLang programs, by default those of some plan of attention, cannot run this problem here, or None."""
    if not installed():
        return "the package tilelang is not installed"
    emulated = targeted(problem) != problem
    if problem.device_type == "cpu" and not emulated:
        return _lacks_compiler() if problem.dtype == torch.float32 else "the CPU target runs float32 only"
    hopper = problem.device_type == "cuda" and torch.cuda.get_device_capability(problem.device_index) == (9, 0)
    if not emulated and not hopper:
        return "it needs a Hopper GPU (compute capability 9.0) or CPU tensors"
    if problem.dtype not in HALF:
        return "on CUDA it runs bfloat16 and float16"
    return misfit(problem.bucketed(), programs) if programs else planless(problem.bucketed())


@functools.lru_cache(maxsize=4096)
def misfit(problem, programs: tuple[str, ...]) -> str | None:
    """Which of the programs has no config for the problem and why, or None."""
    for program in programs:
        if not configs.space(program, problem):
            reason = configs.why_illegal(program, problem, configs.config_of(program)())
            return f"no config of {program} suits it: {reason}"
    return None


@functools.lru_cache(maxsize=4096)
def planless(problem) -> str | None:
    """What the first strategy of a direction lacks where no strategy of it has configs for the problem, or None."""
    for direction in ("forward", "backward"):
        reasons = [misfit(problem, programs) for programs in plan.strategies(direction)]
        if None not in reasons:
            return reasons[0]
    return None


def compiled(program: str, problem, config: Config | None = None) -> Callable:
    """The program for the problem's static dims, with its first config if none is given."""
    from hsa_tl.kernels_tilelang import compile

    return compile.kernel(program, problem, config or configs.default(program, problem))


@dataclass(frozen=True)
class Call:
    """One call as the programs take it: heads split into [H, G], contiguous; chunk_len always there."""

    problem: Problem
    q: Tensor  # [B, T, H, G, D], like do
    k: Tensor  # [B, N, S, H, D], like v
    v: Tensor
    weights: Tensor | None  # [B, T, H, heads_w, K]; None: one softmax over all chosen chunks
    indices: Tensor  # [B, T, H, K]
    pairs: Pairs | None
    chunk_len: Tensor  # [N]
    scale: float
    do: Tensor | None = None
    lse: Tensor | None = None  # [B, T, H, G], like delta: what the backward takes in the place of weights
    delta: Tensor | None = None

    @classmethod
    def of(cls, q, k, v, weights, indices, pairs, chunk_len, scale, do=None, lse=None, delta=None) -> "Call":
        problem = targeted(Problem.of(q, k, weights, indices, chunk_len))
        of_heads = (q, weights, do, lse, delta)
        split = (k.shape[3], -1)  # heads
        q, weights, do, lse, delta = (x if x is None else x.contiguous().unflatten(2, split) for x in of_heads)
        if chunk_len is None:
            chunk_len = torch.empty(k.shape[1], dtype=torch.int32, device=k.device)  # not read
        k, v, indices = (x.contiguous() for x in (k, v, indices))
        return cls(problem, q, k, v, weights, indices, pairs, chunk_len, scale, do, lse, delta)

    def selection(self) -> tuple[Tensor, ...]:
        """What a forward program takes of it."""
        return (self.indices,) if self.weights is None else (self.weights, self.indices)

    def results(self) -> dict[str, Tensor]:
        """What a forward program fills."""
        found = {"out": torch.empty_like(self.q)}
        if self.weights is None:
            found["lse"] = self.q.new_empty(self.q.shape[:4], dtype=torch.float32)
        return found

    def spare_chunk(self) -> Tensor:
        """[B, T, H]: a chunk that the token chose, for its empty slots to read; -1 if it chose none."""
        return torch.where(self.indices < self.problem.N, self.indices, -1).amax(-1)


# A launcher allocates a program's outputs and returns them with what runs it, which can be run again.
Launch = tuple[Callable[[], object], dict[str, Tensor]]


def fwd_token(program: str, call: Call, config: Config) -> Launch:
    kernel = compiled(program, call.problem, config)
    results, spare = call.results(), call.spare_chunk()
    arguments = call.q, call.k, call.v, *call.selection(), spare, call.chunk_len, call.scale, *results.values()
    return lambda: kernel(*arguments), results


def fwd_union(program: str, call: Call, config: Config) -> Launch:
    p = call.problem
    kernel = compiled(program, p, config)
    index = compiled("union_index", p, configs.config_of("union_index")(block_M=config.block_M))
    tile = config.block_M // p.G
    tiles = -(-p.T // tile)
    results, order = call.results(), torch.empty_like(call.indices)
    chunks, groups = (call.indices.new_empty(p.B, tiles, p.H, tile * p.K) for _ in range(2))
    lengths = call.indices.new_empty(p.B, tiles, p.H)
    selection = *call.selection(), order, chunks, groups, lengths

    def run():
        index(call.indices, p.N, order, chunks, groups, lengths)
        kernel(call.q, call.k, call.v, *selection, call.chunk_len, call.scale, *results.values())

    return run, results


def pair_sums(call: Call, config: Config, launch: Callable[[Window, Tensor], object]) -> tuple[Callable, Tensor]:
    """What runs `launch(window, partial)`, which leaves a row [G, D] for each pair, and sums each token's rows.

    The partial rows are stored in windows of tokens that fit HSA_TL_PARTIAL_BYTES (2 GiB), or with reduce_add added up
    in float32. Returns it and the sums [B, T, H, G, D].
    """
    p, out = call.problem, torch.empty_like(call.q)
    pairs = call.pairs or (sort_by_torch if p.device_type == "cpu" else sort_pairs)(call.indices, p.N)
    if config.reduce_add:
        total = torch.empty(out.shape, dtype=torch.float32, device=out.device)

        def add():
            for window in windows(call.indices, p.N, pairs, p.T):
                launch(window, total.zero_())
            out.copy_(total)

        return add, out
    most = os.environ.get("HSA_TL_PARTIAL_BYTES") or str(2 << 30)
    if not most.isdecimal():
        raise ValueError(f"HSA_TL_PARTIAL_BYTES must be a number of bytes, got {most!r}")
    tokens = partial_window(p, int(most))
    partial = call.q.new_empty(p.B, p.H, tokens * p.K, p.G, p.D)
    combine = compiled("hsa_combine", p)

    def run():
        for window in windows(call.indices, p.N, pairs, tokens):
            launch(window, partial)
            combine(partial, call.indices, window.start, p.N, out)

    return run, out


def fwd_chunk(program: str, call: Call, config: Config) -> Launch:
    kernel = compiled(program, call.problem, config)

    def launch(w: Window, partial: Tensor):
        selection = call.weights, w.pair, w.begin, w.end, config.splits(call.problem), w.start
        kernel(call.q, call.k, call.v, *selection, call.chunk_len, call.scale, partial)

    run, out = pair_sums(call, config, launch)
    return run, {"out": out}


def bwd_chunk(program: str, call: Call, config: Config) -> Launch:
    kernel = compiled(program, call.problem, config)
    dk, dv = torch.empty_like(call.k), torch.empty_like(call.v)
    rows, outputs = (call.lse, call.delta), {}
    if call.weights is not None:
        rows, outputs = (call.weights,), {"dweights": torch.empty_like(call.weights)}
    shape = config.splits(call.problem), *dk.shape
    sums = [torch.empty(shape, dtype=torch.float32, device=dk.device) for _ in (dk, dv)]

    def launch(w: Window, partial: Tensor):
        selection = *rows, w.pair, w.begin, w.end, w.start
        filled = partial, *sums, *outputs.values()
        kernel(call.q, call.k, call.v, *selection, call.chunk_len, call.do, call.scale, *filled)

    sum_pairs, dq = pair_sums(call, config, launch)

    def run():
        for x in (*sums, *outputs.values()):
            x.zero_()
        sum_pairs()
        for x, total in zip((dk, dv), sums, strict=True):
            x.copy_(total.sum(0) if len(total) > 1 else total[0])

    return run, {"dq": dq, "dk": dk, "dv": dv} | outputs


def bwd_dq_token(program: str, call: Call, config: Config) -> Launch:
    kernel = compiled(program, call.problem, config)
    dq, dweights, spare = torch.empty_like(call.q), torch.empty_like(call.weights), call.spare_chunk()
    arguments = call.q, call.k, call.v, call.weights, call.indices, spare, call.chunk_len, call.do, call.scale
    return lambda: kernel(*arguments, dq, dweights), {"dq": dq, "dweights": dweights}


def bwd_dkdv_chunk(program: str, call: Call, config: Config) -> Launch:
    kernel = compiled(program, call.problem, config)
    dk, dv = torch.empty_like(call.k), torch.empty_like(call.v)
    arguments = call.q, call.k, call.v, call.weights, *call.pairs, call.chunk_len, call.do, call.scale
    return lambda: kernel(*arguments, dk, dv), {"dk": dk, "dv": dv}


def sort_pairs(indices: Tensor, num_chunks: int) -> Pairs:
    """As hsa_tl.pairs.sort_pairs, by a counting sort: O(pairs) work and memory, no host synchronisation."""
    B, T, H, K = indices.shape
    segments = B * H * (num_chunks + 1)  # the last B * H hold the empty slots
    # Few enough blocks of tokens that their counts take less memory than the pairs.
    blocks = max(1, min(indices.numel() // (4 * max(1, segments)), SORT_BLOCKS // max(1, B * H), T // SORT_TOKENS))
    counts = torch.zeros(segments, blocks, dtype=torch.int32, device=indices.device)
    cursor = torch.zeros(segments * blocks + 1, dtype=torch.int64, device=indices.device)
    pair = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    problem = targeted(Selection(B, T, num_chunks, H, K, indices.device.type, indices.device.index))
    indices, tokens = indices.contiguous(), -(-T // blocks)
    compiled("pairs_count", problem)(indices, num_chunks, tokens, counts)
    torch.cumsum(counts.flatten(), 0, dtype=torch.int64, out=cursor[1:])
    offsets = cursor[: B * H * num_chunks * blocks + 1 : blocks].clone()
    compiled("pairs_place", problem)(indices, num_chunks, tokens, cursor[:-1].view_as(counts), pair)
    return Pairs(pair, offsets)


def run_plan(direction: str, call: Call, config: str, deterministic: bool) -> dict[str, Tensor]:
    """Runs the programs of the call's plan, one after the other; their outputs."""
    results = {}
    for program, chosen in plan.choose(direction, call.problem, config, deterministic).programs:
        run, outputs = globals()[configs.PROGRAMS[program]](program, call, chosen)
        run()
        results |= outputs
    return results


def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    call = Call.of(q, k, v, weights, indices, pairs, chunk_len, scale)
    return run_plan("forward", call, config, deterministic)["out"].flatten(2, 3)


def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """dq, dk, dv, dweights. See hsa_tl.ops for the arguments."""
    call = Call.of(q, k, v, weights, indices, pairs, chunk_len, scale, do)
    gradients = run_plan("backward", call, config, deterministic)
    dq, dweights = gradients["dq"].flatten(2, 3), gradients["dweights"].flatten(2, 3)
    return dq, gradients["dk"], gradients["dv"], dweights
