"""Configs of the programs without matrix products, which stand between the chunk-stationary ones. Not tuned."""

from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, Config, row_bytes
from hsa_tl.problem import Problem


def next_power_of_two(n: int) -> int:
    """Of fragments' columns, which then always share out among the threads."""
    return 1 << (n - 1).bit_length()


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


class AuxiliaryConfig(Config):
    """Of a program without matrix products."""

    def rows(self, p):
        return 0

    def chunk_reads(self, p):
        return 0.0

    def smem_bytes(self, p):
        return 0

    def refusal(self, p):
        return None

    def tensor_core(self):
        return None


@dataclass(frozen=True)
class CombineConfig(AuxiliaryConfig):
    """A CTA sums the partial rows of one token and key/value head, or of a few tokens; num_stages rows in flight."""

    threads: int = 256
    num_stages: int = 4
    DIRECTION: ClassVar[str] = "combine"
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "K", "dtype")

    def lanes(self, vectors: int) -> int:
        """A row's 16-byte vectors, padded to a power of two where whole rows do not share out among the threads."""
        return vectors if _power_of_two(lcm(vectors, self.threads) // self.threads) else next_power_of_two(vectors)

    def tile(self, vectors: int) -> int:
        """Tokens of a CTA: the fewest that give every thread as much."""
        return self.threads // gcd(self.threads, self.lanes(vectors))

    def elements(self, p: Problem) -> int:
        """Elements of a thread in a row's fragment."""
        vectors = row_bytes(p) // 16
        return self.tile(vectors) * self.lanes(vectors) * 16 // p.itemsize // self.threads

    def pair_bytes(self, p):
        moved = row_bytes(p) * (1 + 1 / p.K)
        return {"hbm": moved, "l2": moved}

    def smem_bytes(self, p):
        return 4 * self.tile(row_bytes(p) // 16) * p.K + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.threads * self.elements(p) * (4 + self.num_stages * p.itemsize) // 4

    def refusal(self, p):
        return None if self.num_stages >= 1 else f"num_stages must be at least 1, got {self.num_stages}"

    @classmethod
    def options(cls, p):
        def effort(config):
            """nvcc splits the 16-byte stores where a CTA has several tokens."""
            vectors = row_bytes(p) // 16
            return config.elements(p), config.lanes(vectors) > vectors, config.tile(vectors) > 1, -config.threads

        best = sorted((cls(32 * warps) for warps in range(2, 9)), key=effort)[:2]
        return [replace(c, num_stages=n) for c in best for n in ((4, 8) if c.elements(p) <= 32 else (2, 1))]

    @classmethod
    def on_cpu(cls, p):
        return cls(threads=32, num_stages=2)


@dataclass(frozen=True)
class PairsCountConfig(AuxiliaryConfig):
    """A CTA owns a block of tokens and takes block_M of them at a time."""

    block_M: int = 8
    threads: int = 256
    DIRECTION: ClassVar[str] = "index"
    KEY: ClassVar[tuple[str, ...]] = ("K",)

    def pair_bytes(self, p):
        return {"hbm": 4, "reduce": 4}

    def accumulators(self, p):
        return 0

    @classmethod
    def options(cls, p):
        return [cls(max(1, 256 // p.K))]


@dataclass(frozen=True)
class PairsPlaceConfig(AuxiliaryConfig):
    """A CTA owns a block of tokens; it ranks the slots of block_M of them at a time."""

    block_M: int = 8
    threads: int = 128
    DIRECTION: ClassVar[str] = "index"
    KEY: ClassVar[tuple[str, ...]] = ("K",)

    def pair_bytes(self, p):
        return {"hbm": 4 + 4, "l2": 4 + 8 + 8 + 4}  # index, cursor read and written, pair

    def smem_bytes(self, p):
        return 3 * 4 * self.block_M * next_power_of_two(p.K) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (2 * self.block_M + 2) * next_power_of_two(p.K)

    @classmethod
    def options(cls, p):
        # More threads than a token has slots only wait at the barriers.
        return [cls(8, min(256, max(64, next_power_of_two(p.K))))]


@dataclass(frozen=True)
class UnionIndexConfig(AuxiliaryConfig):
    """A CTA owns the tokens of one tile of hsa_fwd_union with the same block_M."""

    block_M: int = 128
    threads: int = 128
    DIRECTION: ClassVar[str] = "index"
    KEY: ClassVar[tuple[str, ...]] = ("G", "K")

    def padded_keys(self, G: int, K: int) -> int:
        """Slots of the tile, up to a power of two and one for each thread: else several threads would add for one."""
        return max(next_power_of_two(self.threads), next_power_of_two(self.block_M // G * K))

    def pair_bytes(self, p):
        return {"hbm": 16.0}  # the index read; order, union_chunks and union_groups written

    def smem_bytes(self, p):
        return 4 * 4 * self.padded_keys(p.G, p.K) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return 3 * self.padded_keys(p.G, p.K)

    def refusal(self, p):
        return None if self.block_M >= p.G else f"block_M must be at least G = {p.G}, got {self.block_M}"

    @classmethod
    def options(cls, p):
        return [cls(block_M) for block_M in (192, 128, 64)]

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=64)
