"""Config of the retrieval program. A Problem's D stands for D_r, its H for R; its rows are tokens, whatever G is."""

from dataclasses import dataclass
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_auxiliary import AuxiliaryConfig, next_power_of_two
from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, WARPGROUP, first_legal

KEY_BYTES = 8  # a score and its chunk
MAX_TOPK = 128
MIN_PLACES = 16  # that the sort's network takes
RADIX = 8  # keys of a thread in the sort's network
TILE = 64  # landmarks that retrieve_split multiplies at once
TOKENS = 8  # of that product: the fewest columns that wgmma takes
RANGES = (1024, 256, 128)  # landmarks of a CTA
FILL = 120  # CTAs that keep the most of 132 SMs busy


class SelectConfig(AuxiliaryConfig):
    """Of a program that sorts keys in shared memory, and so places its own barriers."""

    KEY: ClassVar[tuple[str, ...]] = ("D", "K", "dtype")
    own_barriers: ClassVar[bool] = True

    @staticmethod
    def places(K: int) -> int:
        """Of a row's K best: a power of two."""
        return max(MIN_PLACES, next_power_of_two(K))

    def refusal(self, p):
        return f"topk must be at most {MAX_TOPK}, got {p.K}" if p.K > MAX_TOPK else None


@dataclass(frozen=True)
class RetrieveTopkConfig(SelectConfig):
    """A CTA owns block_M tokens of a retrieval head; num_stages tiles of block_N landmarks are in flight."""

    block_M: int = 128
    block_N: int = 128
    threads: int = 256
    num_stages: int = 2
    DIRECTION: ClassVar[str] = "retrieve"
    working_registers: ClassVar[int] = 72  # the sort's keys; with 52 ptxas spilled

    def total_threads(self):
        return self.threads + WARPGROUP  # automatic warp specialisation adds a producer

    def rows(self, p):
        return self.block_M

    def pairs(self, p):
        return self.block_M / p.G  # a pair has G rows

    def ctas(self, p):
        return p.B * p.H * -(-p.T // self.block_M)

    def pair_bytes(self, p):
        return {"l2": p.S * p.D * p.itemsize / self.pairs(p)}

    def smem_bytes(self, p):
        tiles = (self.block_M + self.num_stages * self.block_N) * p.D * p.itemsize
        return tiles + self.block_M * (2 * KEY_BYTES * self.places(p.K) + 4) + 8 + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * self.block_N

    def refusal(self, p):
        if self.block_M % 64 or self.block_M // 64 * WARPGROUP != self.threads:
            return f"block_M must be 64 for each of the warpgroups, got {self.block_M} and {self.threads} threads"
        if reason := super().refusal(p):
            return reason
        if self.block_N % 8:
            return f"block_N must be a multiple of 8, got {self.block_N}"
        return None if self.num_stages >= 1 else f"num_stages must be at least 1, got {self.num_stages}"

    @classmethod
    def options(cls, p):
        tiles = [(128, 64, 256), (64, 64, 128)]
        return first_legal(p, [cls(*x, 2) for x in tiles], [cls(*x, 1) for x in tiles])

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=16, block_N=32, num_stages=1)

    def tensor_core(self):
        return "hgmma"


@dataclass(frozen=True)
class RetrieveSplitConfig(SelectConfig):
    """A CTA owns block_N landmarks and TOKENS tokens of a retrieval head; num_stages tiles are in flight."""

    block_N: int = 1024
    threads: int = 128
    num_stages: int = 3
    DIRECTION: ClassVar[str] = "scan"  # of landmarks: bytes are what it costs
    working_registers: ClassVar[int] = 80  # the sort's keys; with 72 ptxas spilled

    def total_threads(self):
        return self.threads + WARPGROUP  # automatic warp specialisation adds a producer

    def ctas(self, p):
        return p.B * p.H * -(-p.T // TOKENS) * -(-p.N // self.block_N)

    def pair_bytes(self, p):
        moved = p.D * p.itemsize  # for one token; others of the tile read nothing more
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        tiles = (TOKENS + self.num_stages * min(TILE, self.block_N)) * p.D * p.itemsize
        return tiles + self.block_N * (4 * TOKENS + KEY_BYTES) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return TILE * TOKENS

    def refusal(self, p):
        if reason := super().refusal(p):
            return reason
        if self.block_N & (self.block_N - 1) or self.block_N < max(TILE, self.places(p.K)):
            return f"block_N must be a power of two of at least {max(TILE, self.places(p.K))}, got {self.block_N}"
        return None if self.num_stages >= 1 else f"num_stages must be at least 1, got {self.num_stages}"

    @classmethod
    def options(cls, p):
        def effort(config):
            """The longest ranges that keep the GPU busy, or the shortest."""
            n = config.ctas(p)
            return n < FILL, n if n >= FILL else -n

        return sorted((cls(block_N) for block_N in RANGES), key=effort)

    @classmethod
    def on_cpu(cls, p):
        return cls(block_N=max(32, cls.places(p.K)), num_stages=1)


@dataclass(frozen=True)
class RetrieveCombineConfig(SelectConfig):
    """A CTA owns a token and a retrieval head; its threads hold RADIX keys each."""

    threads: int = 256
    DIRECTION: ClassVar[str] = "combine"
    KEY: ClassVar[tuple[str, ...]] = ("K",)

    def rows_of(self, K: int) -> int:
        """Ranges' rows that the CTA holds at a time."""
        return max(1, self.threads * RADIX // self.places(K))

    def pair_bytes(self, p):
        moved = KEY_BYTES * self.places(p.K) / p.K
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        return KEY_BYTES * self.places(p.K) * (self.rows_of(p.K) + 1) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return 0

    def refusal(self, p):
        if reason := super().refusal(p):
            return reason
        threads = self.threads
        return f"threads must be a power of two, got {threads}" if threads & (threads - 1) else None

    @classmethod
    def options(cls, p):
        return [cls()]

    @classmethod
    def on_cpu(cls, p):
        return cls(threads=32)


@dataclass(frozen=True)
class RetrieveDlandmarksConfig(AuxiliaryConfig):
    """A CTA owns a chunk of a retrieval head; it adds up block_M gathered rows of q_slc at a time."""

    block_M: int = 32
    threads: int = 128
    DIRECTION: ClassVar[str] = "index"
    KEY: ClassVar[tuple[str, ...]] = ("D", "K", "dtype")

    def pair_bytes(self, p):
        return {"l2": p.D * p.itemsize + 8, "hbm": 4 + 32}  # pair; a sector of dscores

    def smem_bytes(self, p):
        columns = next_power_of_two(p.D)
        return 8 * self.block_M + 4 * self.threads + 4 * columns * self.threads // 32 + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (self.block_M + 1) * next_power_of_two(p.D)

    @classmethod
    def options(cls, p):
        return first_legal(p, [cls(), cls(16)])

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=8)
