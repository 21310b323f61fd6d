"""Configs of the forward programs."""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_base import (
    SMEM_ALIGNMENT,
    WARPGROUP,
    WORKING_REGISTERS,
    ChunkConfig,
    Config,
    first_legal,
    padded_rows,
    row_bytes,
    union_chunks,
    warps_refusal,
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

    @classmethod
    def variants(cls, p):
        return [cls(*x) for x in product((128, 64), (2, 3, 4, 1))]

    def tensor_core(self):
        return "hmma"  # a token's tile has too few rows for wgmma


@dataclass(frozen=True)
class FwdUnionConfig(Config):
    """A CTA owns block_M // G neighbouring tokens, a warpgroup 64 rows; num_stages chunks of their union in flight.

    specialised: a warpgroup skips the chunks that none of its own tokens chose. q_registers: q stays in registers,
    since a wgmma of 64 keys with both operands in shared memory takes all of its bandwidth. blocks: CTAs of an SM, 0
    for as many as fit.
    """

    block_M: int = 128
    num_stages: int = 2
    specialised: int = 0
    q_registers: int = 0
    blocks: int = 0
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

    def again(self, p, overlap):
        read = union_chunks(p, self.pairs(p), overlap)
        return read, union_chunks(p, 64 // p.G, overlap) if self.specialised else read

    def pair_bytes(self, p):
        moved = 2 * row_bytes(p) / p.K
        return {"l2": p.chunk_bytes() / self.pairs(p) + moved, "hbm": moved}

    def smem_bytes(self, p):
        tiles = self.block_M * p.D + 2 * self.num_stages * p.S * p.D
        slots = self.pairs(p) * p.K * 4 * (2 + self.specialised + (p.G if p.per_head else 1))
        return tiles * p.itemsize + slots + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * (p.D + p.S + p.D * p.itemsize // 4 * self.q_registers)

    def largest(self, p):
        return self.block_M * max(p.D, p.S)

    def refusal(self, p):
        if self.num_stages < 1:
            return f"num_stages must be at least 1, got {self.num_stages}"
        if self.block_M not in (64, 128, 192) or self.block_M < p.G:
            return f"block_M must be 64, 128 or 192 and at least G = {p.G}, got {self.block_M}"
        if self.specialised and (64 % p.G or self.block_M == 64):
            return f"specialised needs whole tokens in a warpgroup's 64 rows, two warpgroups, got G = {p.G}, {self}"
        return None

    @classmethod
    def options(cls, p):
        usual = [cls(*x, 1) for x in product((192, 128), (2, 3))] + [
            cls(*x) for x in ((192, 2), (128, 2), (64, 2), (64, 3))
        ]
        return first_legal(p, usual, [cls(block_M, 1) for block_M in (128, 64)])

    @classmethod
    def variants(cls, p):
        return [cls(*x) for x in product((192, 128, 64), (2, 3, 4, 1), (1, 0), (0, 1), (0, 1, 2))]

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=64)


@dataclass(frozen=True)
class FwdChunkConfig(ChunkConfig):
    """A CTA owns one chunk and key/value head and takes block_M rows at a time: block_M // G pairs of G heads.

    specialised: a producer warpgroup copies num_stages tiles ahead. reduce_add: float32 reduce-add into the output, not
    a partial for each pair.
    """

    block_M: int = 128
    threads: int = 256
    num_stages: int = 2
    specialised: int = 1
    reduce_add: int = 0
    DIRECTION: ClassVar[str] = "forward"
    producer_registers: ClassVar[int] = 40  # a tile's pair ids; with 32 ptxas spilled them

    @property
    def moves_registers(self):
        return bool(self.specialised)

    @property
    def working_registers(self):
        return WORKING_REGISTERS - (4 if self.specialised else 0)  # the producer has the gather's addresses

    def total_threads(self):
        return self.threads + (WARPGROUP if self.specialised else 0)

    def pair_bytes(self, p):
        read = row_bytes(p)
        if self.reduce_add:  # q, and the output in float32, stay in L2 while a chunk's neighbours use them
            return {"l2": read, "reduce": p.G * p.D * 4, "hbm": (read + p.G * p.D * 4) / p.K}
        return {"l2": read, "hbm": 2 * read + 2 * read / p.K}  # a partial is written and read back

    def smem_bytes(self, p):
        rows, stages = self.block_M, self.num_stages if self.specialised else 1
        tiles = 2 * p.S * p.D + stages * rows * p.D
        if not self.specialised:
            reductions = 12 * self.threads if self.threads > 2 * rows else 0
            return tiles * p.itemsize + 4 * -(-rows // p.G) + SMEM_ALIGNMENT + reductions
        staging = 0 if self.reduce_add else rows * p.D
        return (tiles + staging) * p.itemsize + 8 * stages * rows + SMEM_ALIGNMENT

    def accumulators(self, p):
        # P, in 16 bits, stands beside the output or the scores; the other half of S is for the gather's addresses.
        return self.block_M * max(p.D + p.S // (2 if self.specialised else 1), p.S + p.S // 2)

    def largest(self, p):
        return self.block_M * max(p.D, p.S)

    def refusal(self, p):
        if not self.specialised:
            return warps_refusal(self, p)
        if p.G % 8 or p.D not in (64, 128) or p.itemsize != 2:
            return f"the specialised program needs G % 8 == 0, D 64 or 128, 16 bits, got {p.G}, {p.D}, {p.dtype_name}"
        if self.block_M < p.G or (self.block_M, self.threads) != (128, 256):
            return f"the specialised program needs block_M 128 >= G, threads 256, got {self.block_M}, {self.threads}"
        if self.num_stages < 1:
            return f"num_stages must be at least 1, got {self.num_stages}"
        return None

    @classmethod
    def options(cls, p):
        specialised = [cls(num_stages=3), cls(num_stages=2)]
        plain = [cls(*x, num_stages=1, specialised=0) for x in ((64, 128), (128, 128), (128, 256))]
        adding = [replace(c, reduce_add=1) for c in (specialised[0], *plain[::2])]
        return first_legal(p, specialised + plain + adding)

    @classmethod
    def variants(cls, p):
        specialised = [cls(num_stages=n, reduce_add=add) for n in (3, 2, 4, 1) for add in (0, 1)]
        tiles = ((64, 128), (128, 128), (128, 256), (192, 128))
        return specialised + [cls(*x, 1, 0, add) for x in tiles for add in (0, 1)]

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G), threads=128, num_stages=1, specialised=0)
