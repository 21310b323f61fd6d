"""Configs of the backward programs."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import (
    SMEM_ALIGNMENT,
    WARPGROUP,
    Config,
    first_legal,
    row_bytes,
    warps_refusal,
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
class BwdDkdvChunkConfig(Config):
    """A CTA owns one chunk and key/value head and takes block_M rows at a time: block_M // G pairs of G heads."""

    block_M: int = 64
    threads: int = 128
    DIRECTION: ClassVar[str] = "dkdv"

    def rows(self, p):
        return self.block_M

    def pairs(self, p):
        return self.block_M // p.G

    def chunk_reads(self, p):
        return 0.0  # once for all its pairs

    def ctas(self, p):
        return p.B * p.H * p.N

    def pair_bytes(self, p):
        return {"l2": 2 * row_bytes(p), "hbm": 2 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        tiles = 2 * (self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        reductions = 12 * self.threads if self.threads > 2 * self.block_M else 0
        return tiles * p.itemsize + 4 * -(-self.block_M // p.G) + SMEM_ALIGNMENT + reductions

    def accumulators(self, p):
        return 2 * p.S * p.D + 2 * self.block_M * p.S

    def refusal(self, p):
        return warps_refusal(self, p)

    @classmethod
    def options(cls, p):
        every = [cls(*x) for x in product((64, 128, 32, 16), (128, 256, 64))]
        # Less than a warpgroup is for shapes that nothing better fits.
        return first_legal(p, [c for c in every if c.threads >= WARPGROUP], every)

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"
