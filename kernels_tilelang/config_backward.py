"""Configs of the backward programs."""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import (
    SMEM_ALIGNMENT,
    WARPGROUP,
    ChunkConfig,
    first_legal,
    gradient_refusal,
    row_bytes,
)
from hsa_tl.kernels_tilelang.config_forward import FwdTokenConfig


@dataclass(frozen=True)
class BwdDqTokenConfig(FwdTokenConfig):
    """As FwdTokenConfig."""

    DIRECTION: ClassVar[str] = "dq"
    TILES: ClassVar[int] = 2
    SCORES: ClassVar[int] = 2
    MOVED: ClassVar[int] = 3


@dataclass(frozen=True)
class BwdDkdvChunkConfig(ChunkConfig):
    """A CTA owns one chunk and key/value head and takes block_M rows at a time: block_M // G pairs of G heads."""

    block_M: int = 64
    threads: int = 128
    DIRECTION: ClassVar[str] = "dkdv"

    def pair_bytes(self, p):
        return {"l2": 2 * row_bytes(p), "hbm": 2 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        tiles = 2 * (self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        reductions = 12 * self.threads if self.threads > 2 * self.block_M else 0
        return tiles * p.itemsize + 4 * -(-self.block_M // p.G) + SMEM_ALIGNMENT + reductions

    def accumulators(self, p):
        return 2 * p.S * p.D + 2 * self.block_M * p.S

    def refusal(self, p):
        return gradient_refusal(self, p)

    @classmethod
    def options(cls, p):
        every = [cls(*x) for x in product((64, 128, 32, 16), (128, 256, 64))]
        # Less than a warpgroup is for shapes that nothing better fits.
        return first_legal(p, [c for c in every if c.threads >= WARPGROUP], every)

    @classmethod
    def variants(cls, p):
        return [cls(*x) for x in product((64, 128, 192, 256), (128, 256))]

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"


@dataclass(frozen=True)
class BwdChunkConfig(ChunkConfig):
    """A CTA owns one chunk and key/value head: dk and dv in its registers, block_M gathered rows at a time.

    specialised: a producer warpgroup copies num_stages tiles ahead of `threads` that compute. reduce_add: dq by float32
    atomics, else a row for each pair.
    """

    block_M: int = 64
    threads: int = 128
    num_stages: int = 1
    specialised: int = 0
    reduce_add: int = 0
    DIRECTION: ClassVar[str] = "backward"
    producer_registers: ClassVar[int] = 56  # a tile's tokens

    @property
    def moves_registers(self):
        return bool(self.specialised)

    def total_threads(self):
        return self.threads + WARPGROUP * self.specialised

    def pair_bytes(self, p):
        dq = {"reduce": 4 * p.G * p.D, "hbm": 0} if self.reduce_add else {"hbm": 2 * row_bytes(p)}
        return {"l2": 2 * row_bytes(p)} | dq | {"hbm": dq["hbm"] + 4 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        tiles = 2 * (self.num_stages * self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        if self.specialised:  # slots and weights, delta
            small = 2 * self.num_stages * self.block_M // p.G * (1 + (p.G if p.per_head else 1)) + self.block_M
        else:  # slots, heads, delta
            small = 3 * self.block_M
        reductions = 12 * self.threads if self.threads > 2 * self.block_M else 0
        return tiles * p.itemsize + 4 * small + SMEM_ALIGNMENT + reductions

    def accumulators(self, p):
        # The scores and dP are dead where dq is. The four threads of a row keep what its atomics' addresses share.
        return 2 * p.S * p.D + self.block_M * (max(2 * p.S, p.D) + 16 * self.reduce_add)

    def largest(self, p):
        return max(p.S, self.block_M) * p.D

    def refusal(self, p):
        if p.D not in (64, 128):
            return f"D must be 64 or 128, got {p.D}"
        if p.S * p.D > 64 * 128:
            return f"S must be at most {64 * 128 // p.D} at D = {p.D}, got {p.S}"
        if not self.specialised:
            if self.num_stages != 1:
                return f"num_stages must be 1 without specialised, got {self.num_stages}"
            return gradient_refusal(self, p)
        if p.D not in (64, 128) or p.S != 64 or p.G not in (8, 16, 32, 64):
            return f"specialised needs D of 64 or 128, S = 64 and G of 8, 16, 32 or 64, got {p.D}, {p.S} and {p.G}"
        if (self.block_M, self.threads) != (128, 256) or self.num_stages < 1:
            return f"specialised needs block_M = 128, threads = 256 and num_stages of at least 1, got {self}"
        return None

    @classmethod
    def options(cls, p):
        twin = [cls(128, 256, n, 1) for n in (2, 3, 1)]
        plain = [cls(m, t) for t, m in product((128, 256), (128, 64))]
        if p.S < 64:
            plain.remove(cls(128, 128))  # spills
        adding = [replace(c, reduce_add=1) for c in (twin[0], *plain[-2:])]
        # Less than a warpgroup is for shapes that nothing better fits.
        return first_legal(p, twin + plain + adding, [cls(m, 64) for m in (64, 32, 16)])

    @classmethod
    def variants(cls, p):
        twin = [cls(128, 256, n, 1, add) for n in (1, 2, 3) for add in (0, 1)]
        return twin + [cls(m, t, reduce_add=add) for t, m in product((128, 256), (128, 64, 192)) for add in (0, 1)]

    def loop_share(self, p):
        return 5 / 7 if self.specialised and p.D == 64 else 1.0  # dv in one consumer's branch, dk in the other's

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"
