"""Problem: the static description of one attention call; what configs, tables, cost models and cases are keyed by."""

import functools
from dataclasses import dataclass, replace

import torch

# [rows, D] x [D, S] products for each pair, by direction
GEMMS = {
    "forward": 2,
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


@dataclass(frozen=True)
class Problem:
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
    def of(cls, q, k, weights, indices, chunk_len) -> "Problem":
        """The problem of tensors as operators pass them: k [B, N, S, H, D], chunk_len None when chunks are full.

        weights is None where one softmax runs over all chosen chunks.
        """
        B, T, HQ, D = q.shape
        _, N, S, H, _ = k.shape
        return cls(
            B=B, T=T, N=N, HQ=HQ, H=H, D=D, S=S, K=indices.shape[3], dtype=q.dtype, masked=chunk_len is not None,
            per_head=weights is not None and weights.shape[2] != H, device_type=q.device.type,
            device_index=q.device.index,
        )  # fmt: skip

    @classmethod
    def of_decode(cls, q, k_pages, weights, indices, page_table) -> "Problem":
        """The problem of a decode step: k_pages [num_pages, S, H, D], N the chunks of the longest sequence."""
        B, T, HQ, D = q.shape
        _, S, H, _ = k_pages.shape
        return cls(
            B=B, T=T, N=page_table.shape[1], HQ=HQ, H=H, D=D, S=S, K=indices.shape[3], dtype=q.dtype,
            per_head=weights is not None and weights.shape[2] != H, device_type=q.device.type,
            device_index=q.device.index,
        )  # fmt: skip

    @classmethod
    def of_retrieval(cls, q_slc, N: int, topk: int, S: int) -> "Problem":
        """A retrieval's: R for H, D_r for D."""
        (B, T, R, D_r), device = q_slc.shape, q_slc.device
        return cls(
            B=B, T=T, N=N, HQ=R, H=R, D=D_r, S=S, K=topk, dtype=q_slc.dtype, device_type=device.type,
            device_index=device.index,
        )  # fmt: skip

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def bucketed(self) -> "Problem":
        """The problem of lengths up to the next powers of two: what is decided once for all in between."""
        return replace(self, T=power_of_two(self.T), N=power_of_two(self.N))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def on_cuda(self) -> "Problem":
        return replace(self, device_type="cuda")

    @property
    def G(self) -> int:
        """Query heads for each key/value head."""
        return self.HQ // self.H

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def pairs(self) -> int:
        """(token, key/value head, chunk) pairs of a causal selection: token t takes min(K, t // S) chunks."""
        full, tail = divmod(self.T, self.S)
        per_head = self.S * sum(min(self.K, i) for i in range(full)) + tail * min(self.K, full)
        return self.B * self.H * per_head

    def pair_flops(self, direction: str = "forward") -> int:
        """FLOPs of one pair: 2 * G * S * D for each matrix product."""
        return GEMMS[direction] * 2 * self.G * self.S * self.D

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
