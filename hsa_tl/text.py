"""Real text as inputs of the operator: byte n-grams hashed to features, and what a selection on text looks like.

A landmark is the mean of its chunk's n-gram vectors, a retrieval query the mean over the bytes just read, so a token
retrieves the chunks that share its recent n-grams; rare n-grams count more. One byte is one token. Deterministic.
"""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hsa_tl import api
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs
from hsa_tl.validation import require

RETRIEVAL_NGRAMS = (3, 4, 5, 6)  # bytes; their vectors make q_slc and landmarks
LOCAL_NGRAMS = (1, 2, 3, 4)  # bytes; their vectors make q, k and v
BUCKETS = 1 << 16
WINDOW = 64  # bytes just read that make one retrieval query
SAMPLES = 512  # tokens that best_chunk_found judges


class Corpus(NamedTuple):
    name: str
    data: bytes
    files: tuple[tuple[str, int], ...]  # each file's name and its first byte


class Features(NamedTuple):
    """float32 arguments of `retrieve_chunks` and `hsa_attention`."""

    q_slc: torch.Tensor  # [1, T, R, D_r], R = H
    landmarks: torch.Tensor  # [1, N, R, D_r]
    q: torch.Tensor  # [1, T, HQ, D]
    k: torch.Tensor  # [1, T, H, D]
    v: torch.Tensor  # [1, T, H, D]


def read_corpus(path: str | Path | None = None, at_least: int = 0) -> Corpus:
    """The file at path; by default the *.py files at the top of Python's standard library, in sorted order.

    Files are read whole; once at_least > 0 bytes are there no further file is read. OSError: path cannot be read.
    ValueError: fewer than at_least bytes; the file at path is not UTF-8.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files, name = sorted(root.glob("*.py")), f"Python {sysconfig.get_python_version()} standard library"
    else:
        files, name = [Path(path)], Path(path).name
    data, starts = bytearray(), []
    for file in files:
        starts.append((file.name, len(data)))
        data += file.read_bytes()
        if 0 < at_least <= len(data):
            break
    if len(data) < max(1, at_least):
        raise ValueError(f"text must hold at least {max(1, at_least)} bytes, got {len(data)} from {name}")
    if path is not None:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            byte = data[error.start]
            raise ValueError(f"text must be UTF-8, got the byte {byte:#04x} at {error.start} of {name}") from None
    return Corpus(name, bytes(data), tuple(starts))


def _bytes(data: bytes, T: int) -> torch.Tensor:
    if len(data) < T:
        raise ValueError(f"text must hold at least {T} bytes, one for each token, got {len(data)}")
    return torch.frombuffer(bytearray(data[:T]), dtype=torch.uint8).long() + 1


def ngram_hashes(x: torch.Tensor, n: int) -> torch.Tensor:
    """x [T] int64 bytes -> [T] int64 in [0, 2^40): a hash of the n bytes that end at each position."""
    padded = F.pad(x, (n - 1, 0))
    h = torch.full_like(x, n)
    for j in range(n):
        # int64 products wrap, which is what a multiplicative hash wants.
        h = (h + padded[j : j + len(x)]) * 0x1E3779B97F4A7C15
        h = h ^ ((h >> 29) & 0x7FFFFFFFF)
    return (h >> 20) & 0xFFFFFFFFFF


def _ngram_vectors(buckets: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """[T] buckets -> [T, dim]: the fixed random vector of each bucket."""
    table = torch.randn(BUCKETS, dim, generator=torch.Generator().manual_seed(seed))
    return F.embedding(buckets, table)


def _rarity(buckets: torch.Tensor, S: int) -> torch.Tensor:
    """log(chunks / chunks that hold the n-gram) at each position: 0 for an n-gram that every chunk holds."""
    chunk = torch.arange(len(buckets)) // S
    held = torch.unique(chunk * BUCKETS + buckets) % BUCKETS
    document_frequency = torch.bincount(held, minlength=BUCKETS)
    return torch.log((int(chunk[-1]) + 1) / document_frequency[buckets].float())


def _trailing_mean(x: torch.Tensor, window: int) -> torch.Tensor:
    """[T, dim] -> [T, dim]: the mean of the last `window` rows up to and with each row."""
    total = F.pad(x.double().cumsum(0), (0, 0, 1, 0))
    end = torch.arange(1, len(x) + 1)
    begin = (end - window).clamp(min=0)
    return ((total[end] - total[begin]) / (end - begin)[:, None]).float()


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


def text_features(data: bytes, problem: Problem, *, retrieval_dim: int = 128) -> Features:
    """Features of the first problem.T bytes, on the CPU in float32; vectors are RMS-normalised.

    Retrieval head r has its own random vectors. Query head h looks for the 1 + h % 4 bytes that end h // 4 bytes
    before the token. ValueError: B is not 1, or too few bytes.
    """
    p = problem
    if p.B != 1:
        raise ValueError(f"problem must have B = 1 for text, got B = {p.B}")
    x = _bytes(data, p.T)
    grams = [ngram_hashes(x, n) % BUCKETS for n in RETRIEVAL_NGRAMS]
    rarity = [_rarity(g, p.S) for g in grams]
    queries, marks = [], []
    for r in range(p.H):
        f = sum(w[:, None] * _ngram_vectors(g, retrieval_dim, r) for g, w in zip(grams, rarity, strict=True))
        queries.append(_trailing_mean(f, WINDOW))
        marks.append(F.pad(f, (0, 0, 0, p.N * p.S - p.T)).view(p.N, p.S, -1).sum(1))
    q_slc, landmarks = (_rms_norm(torch.stack(y, 1))[None] for y in (queries, marks))

    local = [ngram_hashes(x, n) % BUCKETS for n in LOCAL_NGRAMS]
    match = [_ngram_vectors(g, p.D, 1000) for g in local]
    value = sum(_ngram_vectors(g, p.D * p.H, 2000) for g in local)
    key = sum(match)
    n = len(match)
    heads = [_rms_norm(F.pad(match[h % n], (0, 0, h // n, 0))[: p.T]) for h in range(p.HQ)]
    q = torch.stack(heads, 1)[None]
    # A key/value head sees the n-gram vectors through its own signs, and so do its query heads.
    signs = torch.randint(0, 2, (p.H, p.D), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    q = q * signs.repeat_interleave(p.G, 0)
    k = _rms_norm(key)[:, None] * signs
    return Features(q_slc, landmarks, q, k[None], _rms_norm(value.view(p.T, p.H, p.D))[None])


def text_inputs(problem: Problem, corpus: Corpus | None = None) -> Inputs:
    """Inputs of `hsa_attention` from text: selection by `retrieve_chunks`, weights by `fusion_weights`. On the CPU."""
    p = problem
    corpus = read_corpus(at_least=p.T) if corpus is None else corpus
    f = text_features(corpus.data, p)
    scores, indices = api.retrieve_chunks(f.q_slc, f.landmarks, p.K, chunk_size=p.S)
    weights = api.fusion_weights(scores)
    if p.per_head:
        weights = weights.repeat_interleave(p.G, 2)
    do = torch.randn(f.q.shape, generator=torch.Generator().manual_seed(0)).to(p.dtype)
    q, k, v = (y.to(p.dtype) for y in f[2:])
    return Inputs(q, k, v, weights.to(torch.promote_types(torch.float32, p.dtype)), indices, do)


def choosing(indices: torch.Tensor, S: int) -> torch.Tensor:
    """indices [1, T', H, K] of the tokens that see more than K chunks, so that they have a choice."""
    first = (indices.shape[3] + 1) * S
    rule = f"hold at least {first + 16} tokens for K = {indices.shape[3]}, S = {S}"
    require(indices.shape[1] >= first + 16, "indices", rule, indices.shape[1])
    return indices[:1, first:]


def union_size(indices: torch.Tensor, S: int, tokens: int) -> float:
    """The mean number of distinct chunks that `tokens` neighbouring tokens choose, who see more than K chunks each."""
    rows = choosing(indices, S)[0].transpose(0, 1)  # [H, T', K]
    groups = rows.shape[1] // tokens
    tile = rows[:, : groups * tokens].reshape(rows.shape[0] * groups, -1).sort(dim=-1).values
    distinct = 1 + (tile[:, 1:] != tile[:, :-1]).sum(-1)
    return float(distinct.float().mean())


def best_chunk_found(data: bytes, indices: torch.Tensor, S: int) -> float:
    """How often the selection holds the chunk that truly shares the most distinct 6-grams with the token's window.

    Counted exactly, of the chunks wholly before the window (a chunk that the window overlaps shares its own bytes), for
    evenly spaced tokens that see more than K chunks and share any 6-gram; of equal chunks any one will do.
    """
    T, K, n = indices.shape[1], indices.shape[3], RETRIEVAL_NGRAMS[-1]
    _, gram = torch.unique(ngram_hashes(_bytes(data, T), n), return_inverse=True)
    tokens = torch.linspace((K + 1) * S, T - 1, SAMPLES).long()
    wanted = gram[tokens[:, None] - torch.arange(WINDOW - n + 1)].sort(dim=-1).values  # [SAMPLES, WINDOW]
    first = F.pad(wanted[:, 1:] != wanted[:, :-1], (1, 0), value=True)
    N = T // S
    holds = torch.zeros(int(gram.max()) + 1, N, dtype=torch.uint8)
    holds[gram[: N * S], torch.arange(N * S) // S] = 1
    shared = torch.stack([holds[w[f]].sum(0) for w, f in zip(wanted, first, strict=True)])  # [SAMPLES, N]
    shared.masked_fill_(torch.arange(N) >= ((tokens - WINDOW + 1) // S)[:, None], 0)
    most = shared.amax(-1, keepdim=True)
    chosen = torch.zeros(SAMPLES, N, dtype=torch.bool).scatter_(1, indices[0, tokens, 0].long(), True)
    counted = most[:, 0] > 0
    return float(((shared == most) & chosen).any(-1)[counted].float().mean())
