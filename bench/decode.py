"""`hsa-tl bench decode`: one new token a sequence, HSA's retrieval and attention against dense attention by length.

Keys and values are random, and so are landmarks: the selection is as scattered as it can be, and no bound of a block
of landmarks excludes it (the two-level provider is at its worst).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from hsa_tl import cases as named_cases
from hsa_tl import fusion_weights, hsa_decode, landmark_bounds, retrieve_decode
from hsa_tl.bench import record, timing
from hsa_tl.bench.providers import provider, why_not
from hsa_tl.cases import Case
from hsa_tl.oracle import attention_oracle
from hsa_tl.problem import Problem
from hsa_tl.testing import assert_as_accurate_as

GATE_LENGTH = 1024  # tokens
GATE_BATCH = 16  # enough numbers that the largest error is not luck
MODES = ("retrieve", "attend", "decode")  # decode is both
DENSE = ("dense", "dense-grouped", "dense-fa3")
HSA = ("hsa-auto", "hsa-auto-two-level", "hsa-tilelang", "hsa-triton")
DEFAULT_PROVIDERS = {"cpu": ("dense", "dense-grouped", "hsa-auto", "hsa-auto-two-level"), "cuda": (*DENSE, *HSA)}
METRICS = {"time": "ms", "throughput": "GFLOP/s", "peak_extra_memory": "MiB"}


@dataclass(frozen=True)
class Step:
    """A decode step: position T of sequences that hold T tokens, in pages that lie in order."""

    problem: Problem
    q: torch.Tensor  # [B, 1, HQ, D]
    q_slc: torch.Tensor  # [B, 1, H, D]
    k: torch.Tensor  # [B * N, S, H, D], as v
    v: torch.Tensor
    landmarks: torch.Tensor  # [B, N, H, D]
    bounds: torch.Tensor
    table: torch.Tensor  # [B, N]
    lengths: torch.Tensor  # [B]

    @classmethod
    def of(cls, p: Problem, seed: int = 0) -> "Step":
        g = torch.Generator(p.device_type).manual_seed(seed)
        N = p.T // p.S

        def make(*shape):
            return torch.randn(shape, generator=g, dtype=p.dtype, device=p.device_type)

        landmarks = make(p.B, N, p.H, p.D)
        k, v = (make(p.B * N, p.S, p.H, p.D) for _ in range(2))
        table = torch.arange(p.B * N, dtype=torch.int32, device=p.device_type).view(p.B, N)
        lengths = torch.full((p.B,), p.T, dtype=torch.int32, device=p.device_type)
        q, q_slc = make(p.B, 1, p.HQ, p.D), make(p.B, 1, p.H, p.D)
        return cls(p, q, q_slc, k, v, landmarks, landmark_bounds(landmarks), table, lengths)

    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, H, D]."""
        return tuple(x.view(self.problem.B, -1, self.problem.H, self.problem.D) for x in (self.k, self.v))

    def retrieve(self, two_level: bool = False):
        bounds = self.bounds if two_level else None
        p = self.problem
        return retrieve_decode(self.q_slc, self.landmarks, self.lengths, p.K, chunk_size=p.S, bounds=bounds)

    def attend(self, weights, indices, impl: str = "auto"):
        return hsa_decode(self.q, self.k, self.v, weights, indices, self.table, impl=impl)


def dense(step: Step) -> torch.Tensor:
    """SDPA of the new token over the whole cache."""
    q, k, v = (x.transpose(1, 2) for x in (step.q, *step.cache()))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def dense_grouped(step: Step) -> torch.Tensor:
    """As `dense`, with the query heads of a key/value head as rows of one query: each key is read once."""
    p = step.problem
    q = step.q.view(p.B, p.H, p.G, p.D)
    return F.scaled_dot_product_attention(q, *(x.transpose(1, 2) for x in step.cache())).view(p.B, 1, p.HQ, p.D)


def dense_fa3(step: Step) -> torch.Tensor:
    """FlashAttention-3; its causal mask is aligned to the last key."""
    return provider("dense-fa3").attention(step.q, *step.cache(), None, None, chunk_size=step.problem.S)


DENSE_CALLS = {"dense": dense, "dense-grouped": dense_grouped, "dense-fa3": dense_fa3}


def unavailable(name: str, problem: Problem) -> str | None:
    """Why the provider cannot run the problem here, or None. ValueError: no such provider."""
    if name not in (*DENSE, *HSA):
        raise ValueError(f"provider must be one of {', '.join((*DENSE, *HSA))}, got {name!r}")
    if name == "dense-fa3":
        return provider(name).unavailable(problem)
    return None if name in DENSE else why_not(name.split("-")[1], problem)


def call(name: str, step: Step, mode: str) -> Callable[[], object]:
    """What to time: a dense provider has one mode, "decode"."""
    if name in DENSE:
        return lambda: DENSE_CALLS[name](step)
    impl, two_level = name.split("-")[1], name.endswith("two-level")
    if mode == "retrieve":
        return lambda: step.retrieve(two_level)
    if mode == "attend":
        scores, indices = step.retrieve()
        weights = fusion_weights(scores)
        return lambda: step.attend(weights, indices, impl)

    def decode():
        scores, indices = step.retrieve(two_level)
        return step.attend(fusion_weights(scores), indices, impl)

    return decode


def flops(name: str, p: Problem, mode: str) -> int:
    if name in DENSE:
        return 4 * p.B * p.HQ * p.D * p.T
    attend = 4 * p.B * p.HQ * p.D * p.S * min(p.K, p.T // p.S)
    retrieve = 2 * p.B * p.H * p.D * (p.T // p.S)
    return {"retrieve": retrieve, "attend": attend, "decode": retrieve + attend}[mode]


def gate(name: str, problem: Problem) -> str | None:
    """Why the provider's output is not as accurate as the eager equations, or None."""
    step = Step.of(named_cases.at_length(problem, GATE_LENGTH, B=GATE_BATCH))
    k, v = step.cache()
    if name in DENSE:
        G = problem.G
        s = torch.einsum("bthd,bshd->bths", step.q.double(), k.repeat_interleave(G, 2).double()) * problem.D**-0.5
        high = torch.einsum("bths,bshd->bthd", s.softmax(-1), v.repeat_interleave(G, 2).double())
        low = torch.einsum("bths,bshd->bthd", s.to(k.dtype).softmax(-1), v.repeat_interleave(G, 2))
    else:
        scores, indices = step.retrieve()
        weights = fusion_weights(scores)
        low = attention_oracle(step.q, k, v, weights, indices, chunk_size=problem.S)
        doubles = (x.double() for x in (step.q, k, v, weights))
        high = attention_oracle(*doubles, indices, chunk_size=problem.S)
    try:
        assert_as_accurate_as("out", call(name, step, "decode")(), low, high)
    except Exception as error:
        return f"refused by the gate: {type(error).__name__}: {error}".split("\n")[0][:200]


def run_decode(
    case: Case, lengths: Iterable[int], providers: Iterable[str] | None = None, device: str = "cpu",
    out_dir: Path | None = None, progress: Callable[[int, int, str], None] | None = None, *, threads: int = 2,
    min_repeats: int = 3, seconds: float = 1.0,
) -> list[record.Row]:  # fmt: skip
    """Measures a decode step at each length; with out_dir, decode.csv and decode.json are written there.

    A provider first passes the gate; one that fails or is missing has a row that says so. ValueError: an unknown
    provider, or a length that is not a positive multiple of the chunk size.
    """
    kind = torch.device(device).type
    base = named_cases.on_cpu(case.problem) if kind == "cpu" else case.problem
    names, lengths = list(providers or DEFAULT_PROVIDERS[kind]), list(lengths)
    if bad := [T for T in lengths if T < 1 or T % base.S]:
        raise ValueError(f"lengths must be multiples of the chunk size {base.S}, got {bad[0]}")
    missing = {n: f"unavailable: {r}" if (r := unavailable(n, base)) else None for n in names}
    before = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(threads)
    try:
        source = record.device_name(device), record.versions(), record.commit()
        missing = {n: reason or gate(n, base) for n, reason in missing.items()}
        rows = []
        for i, T in enumerate(lengths):
            if progress:
                progress(i, len(lengths), f"T={T}")
            p = named_cases.at_length(base, T)
            config = f"{case.name}: HQ={p.HQ} H={p.H} D={p.D} S={p.S} K={p.K} D_r={p.D} {p.dtype_name}"
            step = Step.of(p)
            for mode in MODES:

                def row(name, metric, values=(None,) * 3, note="", mode=mode, T=T, config=config):
                    kernel = "dense_attention" if name in DENSE else "hsa_decode"
                    unit = METRICS[metric]
                    return record.Row(
                        kernel, name, mode, metric, unit, "T", T, *values, config, "random", *source, note
                    )

                mine = [n for n in names if mode == "decode" or n not in DENSE]
                rows += [row(n, "time", note=missing[n]) for n in mine if missing[n]]
                calls = {n: call(n, step, mode) for n in mine if not missing[n]}
                for n, function in calls.items():
                    function()
                    peak = timing.peak_extra_bytes(function, device) / 2**20
                    rows.append(row(n, "peak_extra_memory", (peak,) * 3))
                times = timing.measure(calls, device=device, min_repeats=min_repeats, seconds=seconds)
                for n, t in times.items():
                    rows.append(row(n, "time", t[:3], f"{t.repeats} repeats"))
                    rate = tuple(flops(n, p, mode) / (x * 1e6) for x in (t.p80, t.p50, t.p20))
                    rows.append(row(n, "throughput", rate))
            if out_dir is not None:
                record.write_rows(rows, out_dir, "decode")
        return rows
    finally:
        torch.set_num_threads(before)
