"""Configs of the programs that multiply no tiles: indexes and sums."""

from dataclasses import dataclass
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import (
    SMEM_ALIGNMENT,
    Config,
)


@dataclass(frozen=True)
class UnionIndexConfig(Config):
    """A CTA owns the tokens of one tile of hsa_fwd_union with the same block_M."""

    block_M: int = 128
    threads: int = 128
    DIRECTION: ClassVar[str] = "index"
    KEY: ClassVar[tuple[str, ...]] = ("G", "K")

    def padded_keys(self, G: int, K: int) -> int:
        """Slots of the tile, up to a power of two."""
        return 1 << max(1, (self.block_M // G * K - 1).bit_length())

    def pair_bytes(self, p):
        return {"hbm": 12.0}  # the index read, its place in order and in union written

    def smem_bytes(self, p):
        return 4 * (self.block_M // p.G * p.K + 2 * self.padded_keys(p.G, p.K)) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return 2 * self.block_M // p.G * p.K + self.padded_keys(p.G, p.K)

    def refusal(self, p):
        return None if self.block_M >= p.G else f"block_M must be at least G = {p.G}, got {self.block_M}"

    @classmethod
    def options(cls, p):
        return [cls(block_M, threads) for block_M in (192, 128, 64) for threads in (128, 256)]

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=64)

    def tensor_core(self):
        return None
