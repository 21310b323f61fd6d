"""Configs of the forward programs."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import (
    SMEM_ALIGNMENT,
    WARPGROUP,
    Config,
    first_legal,
    padded_rows,
    row_bytes,
)


@dataclass(frozen=True)
class FwdTokenConfig(Config):
    """A CTA owns one token and key/value head; num_stages chunks are in flight."""

    threads: int = 128
    num_stages: int = 2
    DIRECTION: ClassVar[str] = "forward"
    TILES: ClassVar[int] = 1  # of [rows, D] in shared memory beside q
    SCORES: ClassVar[int] = 1  # fragments [rows, S]
    MOVED: ClassVar[int] = 2  # rows [G, D] to and from memory for a token

    def total_threads(self):
        return self.threads + WARPGROUP  # automatic warp specialisation adds a producer

    def rows(self, p):
        return padded_rows(p.G)

    def ctas(self, p):
        return p.B * p.H * p.T

    def pair_bytes(self, p):
        moved = self.MOVED * row_bytes(p) / p.K
        return {"l2": p.chunk_bytes() + moved, "hbm": moved}

    def smem_bytes(self, p):
        rows = self.rows(p)
        tiles = 2 * self.num_stages * p.S * p.D + rows * p.S + self.TILES * rows * p.D
        weights = 4 * p.K * ((p.G if p.per_head else 1) + (rows if self.SCORES > 1 else 0))
        reductions = 4 * self.threads * (1 + self.SCORES)
        return tiles * p.itemsize + weights + reductions + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.rows(p) * (p.D + p.S * self.SCORES)

    def refusal(self, p):
        columns = self.threads // 2  # 16 for each warp
        if p.S % columns or p.D % columns:
            return f"{self.threads // 32} warps need S and D to be multiples of {columns}, got {p.S} and {p.D}"
        if self.num_stages < 1:
            return f"num_stages must be at least 1, got {self.num_stages}"
        return None

    @classmethod
    def options(cls, p):
        usual = [cls(*x) for x in ((128, 2), (128, 3), (64, 2))]
        # A lone warp and an unpipelined loop are for shapes that nothing better fits.
        return first_legal(p, usual, [cls(*x) for x in ((128, 1), (64, 1), (32, 2), (32, 1))])

    def tensor_core(self):
        return "hmma"  # a token's tile has too few rows for wgmma


@dataclass(frozen=True)
class FwdUnionConfig(Config):
    """A CTA owns block_M // G neighbouring tokens, a warpgroup 64 rows; num_stages chunks of their union in flight.

    specialised: a warpgroup skips the chunks that none of its own tokens chose.
    """

    block_M: int = 128
    num_stages: int = 2
    specialised: int = 0
    DIRECTION: ClassVar[str] = "forward"
    moves_registers: ClassVar[bool] = True

    @property
    def threads(self):
        return 2 * self.block_M

    def total_threads(self):
        return self.threads + WARPGROUP  # automatic warp specialisation adds a producer

    def rows(self, p):
        return self.block_M

    def ctas(self, p):
        return p.B * p.H * -(-p.T // self.pairs(p))

    def pairs(self, p):
        return self.block_M // p.G  # when all tokens of the tile chose the chunk

    def again(self, p, share):
        read = share[self.block_M] * self.pairs(p)
        return read, share[64] * (64 // p.G) if self.specialised else read

    def pair_bytes(self, p):
        moved = 2 * row_bytes(p) / p.K
        return {"l2": p.chunk_bytes() / self.pairs(p) + moved, "hbm": moved}

    def smem_bytes(self, p):
        tiles = self.block_M * p.D + 2 * self.num_stages * p.S * p.D
        slots = self.pairs(p) * p.K * 4 * (2 + self.specialised + (p.G if p.per_head else 1))
        return tiles * p.itemsize + slots + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * (p.D + p.S)

    def largest(self, p):
        return self.block_M * max(p.D, p.S)

    def refusal(self, p):
        if self.block_M not in (64, 128, 192) or self.block_M < p.G:
            return f"block_M must be 64, 128 or 192 and at least G = {p.G}, got {self.block_M}"
        if self.specialised and (64 % p.G or self.block_M == 64):
            return f"specialised needs whole tokens in a warpgroup's 64 rows, two warpgroups, got G = {p.G}, {self}"
        return None

    @classmethod
    def options(cls, p):
        usual = [cls(*x, 1) for x in product((192, 128), (2, 3))] + [cls(*x) for x in product((192, 128, 64), (2, 3))]
        return first_legal(p, usual, [cls(block_M, 1) for block_M in (128, 64)])

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=64)
