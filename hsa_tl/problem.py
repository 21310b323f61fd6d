"""Problems: the static description of one call; what configs, tables, cost models and cases are keyed by."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

# [rows, D] x [D, S] products for each pair, by direction
GEMMS = {
    "forward": 2,
    "selected_forward": 2,
    "selected_backward": 5,
    "decode": 2,
    "backward": 5,
    "dkdv": 4,
    "dq": 3,
    "index": 0,
    "combine": 0,
    "retrieve": 1,
    "scan": 0,
}


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class _Tensors:
    """What the dims B, T, N, K, the dtype and the device of any problem give."""

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def bucketed(self):
        """The problem of lengths up to the next powers of two: what is decided once for all in between."""
        return replace(self, T=power_of_two(self.T), N=power_of_two(self.N))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def on_cuda(self):
        return replace(self, device_type="cuda")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Selection(_Tensors):
    """Chosen chunks [B, T, H, K] among N, for the programs that index them."""

    B: int
    T: int
    N: int
    H: int
    K: int
    device_type: str = "cuda"
    device_index: int | None = None  # of the CUDA device; None for the current one
    dtype: ClassVar[None] = None

    def static_key(self) -> dict:
        return {"K": self.K}


@dataclass(frozen=True)
class Retrieval(_Tensors):
    """Dims of one `retrieve_chunks` call: N landmarks of D_r = D, R retrieval heads, K chunks wanted."""

    B: int
    T: int
    N: int
    R: int
    D: int
    K: int
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"
    device_index: int | None = None

    @classmethod
    def of(cls, q_slc, N: int, topk: int) -> "Retrieval":
        B, T, R, D_r = q_slc.shape
        return cls(B, T, N, R, D_r, topk, q_slc.dtype, q_slc.device.type, q_slc.device.index)

    def static_key(self) -> dict:
        return {"D": self.D, "K": self.K, "dtype": self.dtype_name}

    def row_flops(self, direction: str) -> int:
        """FLOPs of a token's score of one landmark."""
        return GEMMS[direction] * 2 * self.D

    pair_flops = row_flops

    def __str__(self) -> str:
        return f"B{self.B}-T{self.T}-N{self.N}-R{self.R}-D{self.D}-K{self.K}-{self.dtype_name}"


@dataclass(frozen=True)
class Problem(_Tensors):
    """Dims of one `hsa_attention` call. Legend in hsa_tl.api; N chunks, each of S key slots.

    masked: a chunk may hold fewer than S keys. per_head: weights per query head (else per key/value head).
    """

    B: int
    T: int
    N: int
    HQ: int
    H: int
    D: int
    S: int
    K: int
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    per_head: bool = False
    device_type: str = "cuda"
    device_index: int | None = None  # of the CUDA device; None for the current one

    @classmethod
    def of(cls, q, k, weights, indices, chunk_len=None, page_table=None) -> "Problem":
        """The problem of tensors as operators pass them.

        k is [B, N, S, H, D], chunk_len None when chunks are full; in a decode step k is [num_pages, S, H, D] and N the
        chunks of the longest sequence. weights is None where one softmax runs over all chosen chunks.
        """
        (B, T, HQ, D), (S, H, _) = q.shape, k.shape[-3:]
        N, K = (k if page_table is None else page_table).shape[1], indices.shape[3]
        masked, per_head = chunk_len is not None, weights is not None and weights.shape[2] != H
        return cls(B, T, N, HQ, H, D, S, K, q.dtype, masked, per_head, q.device.type, q.device.index)

    def retrieval(self) -> Retrieval:
        """The retrieval that chooses the chunks, with R = H heads of D_r = D."""
        p = self
        return Retrieval(p.B, p.T, p.N, p.H, p.D, p.K, p.dtype, p.device_type, p.device_index)

    def static_key(self) -> dict:
        """What a program is compiled for. B, T, N, H and the pair count are free."""
        return {
            "G": self.G, "D": self.D, "S": self.S, "K": self.K, "heads_w": self.G if self.per_head else 1,
            "masked": self.masked, "dtype": self.dtype_name,
        }  # fmt: skip

    @property
    def G(self) -> int:
        return self.HQ // self.H

    @property
    def pairs(self) -> int:
        """(token, key/value head, chunk) pairs of a causal selection: token t takes min(K, t // S) chunks."""
        full, tail = divmod(self.T, self.S)
        per_head = self.S * sum(min(self.K, i) for i in range(full)) + tail * min(self.K, full)
        return self.B * self.H * per_head

    def row_flops(self, direction: str) -> int:
        """FLOPs of one query head and chunk: 2 * S * D for each matrix product."""
        return GEMMS[direction] * 2 * self.S * self.D

    def pair_flops(self, direction: str = "forward") -> int:
        """FLOPs of one pair, G rows."""
        return self.G * self.row_flops(direction)

    def flops(self, direction: str = "forward") -> int:
        return self.pairs * self.pair_flops(direction)

    def dense_flops(self, direction: str = "forward") -> int:
        """FLOPs of causal dense attention with the same heads and length."""
        return GEMMS[direction] * self.B * self.HQ * self.D * self.T * self.T

    def chunk_bytes(self) -> int:
        """Keys and values of one chunk and head."""
        return 2 * self.S * self.D * self.itemsize

    def __str__(self) -> str:
        extra = ("-masked" if self.masked else "") + ("-perhead" if self.per_head else "")
        return f"B{self.B}-T{self.T}-{self.HQ}x{self.H}-D{self.D}-S{self.S}-K{self.K}-{self.dtype_name}{extra}"
