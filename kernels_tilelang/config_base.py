"""What every program's config states of its tile, and the arithmetic of shared memory and registers on sm_90.

A config stands in its program's file, above the builder; what two of them share stands here.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from hsa_tl.problem import Problem, power_of_two

SMEM_SM = 228 * 1024  # bytes of an SM on sm_90, SMEM_RESERVED of them for each CTA
SMEM_RESERVED = 1024 + 128  # 128: static shared memory (barriers), rounded up
SMEM_LIMIT = SMEM_SM - SMEM_RESERVED  # bytes a CTA may ask for
SMEM_ALIGNMENT = 2048  # what aligning swizzled tiles to 1 KB may add
MAX_REGISTERS = 255  # a thread
MAX_THREADS = 384  # that compute: three warpgroups
WORKING_REGISTERS = 52  # beside the accumulators: addresses, row statistics, operands; less made ptxas spill
WGMMA_REGISTERS = 30  # beside its accumulator
WARPGROUP = 128  # threads
PRODUCER_REGISTERS = 24  # a thread of the producer warpgroup keeps, when it gives the rest to the consumers
CONSUMER_REGISTERS = 240  # a thread at most, then
KEY_BYTES = 8  # a score and its chunk, which the programs of retrieval sort
MAX_TOPK = 128
MIN_PLACES = 16  # that the sort's network takes


class Config:
    """A program's config: its fields, and what its tile takes. One frozen subclass for each program.

    The docstring of the program's module says what a CTA owns; num_stages tiles of what streams by are in flight.
    """

    DIRECTION: ClassVar[str]  # what it computes: a key of hsa_tl.problem.GEMMS
    OPTIONS: ClassVar[tuple] = ((),)  # its fields, as they may run without a table, in order of preference
    RESERVE: ClassVar[tuple] = ()  # the same, for shapes that no option fits
    VARIANTS: ClassVar[tuple] = ()  # what the tuner tries beside these
    ON_CPU: ClassVar[tuple] = ()  # its fields on the CPU target, where only the tile's size matters
    of_retrieval: ClassVar[bool] = False  # its problem is the retrieval that chooses an attention's chunks
    sm_90a_only: ClassVar[bool] = False  # thread-level code, which the CPU target cannot run
    producer: ClassVar[bool] = False  # a warpgroup that only copies, the program's own or TileLang's
    moves_registers: ClassVar[bool] = False  # from the producer warpgroup to the consumers
    producer_registers: ClassVar[int] = PRODUCER_REGISTERS  # where moves_registers
    working_registers: ClassVar[int] = WORKING_REGISTERS
    own_barriers: ClassVar[bool] = False  # the program places every barrier itself, TileLang adds none
    blocks: ClassVar[int] = 0  # CTAs of an SM; 0: as many as fit
    reduce_add: ClassVar[int] = 0  # adds into its output atomically, in no fixed order
    threads: int  # that compute

    def total_threads(self) -> int:
        """Threads of a CTA, with those that only copy."""
        return self.threads + WARPGROUP * self.producer

    def rows(self, p: Problem) -> int:
        """Rows of the tile that the tensor cores multiply."""
        return self.block_M

    def pairs(self, p: Problem) -> int:
        """(token, chunk) pairs that one pass of the tile serves, at best."""
        return 1

    def chunk_reads(self, p: Problem) -> float:
        """Times that a chunk's keys and values are read for one pair, at best."""
        return 1 / self.pairs(p)

    def again(self, p: Problem, overlap: float) -> tuple[float, float]:
        """How often a chunk is read, and rows multiplied, beyond the best case, by the selection's overlap."""
        return 1.0, 1.0

    def ctas(self, p: Problem) -> int:
        """CTAs of a launch."""
        raise NotImplementedError

    def pair_bytes(self, p: Problem) -> dict[str, float]:
        """Bytes that one pair moves, by level: l2, hbm, reduce (float32 reduce-add); keys and values stay in L2."""
        raise NotImplementedError

    def smem_bytes(self, p: Problem) -> int:
        """At most so much shared memory does a CTA take."""
        raise NotImplementedError

    def accumulators(self, p: Problem) -> int:
        """float32 elements of the CTA's fragments."""
        raise NotImplementedError

    def largest(self, p: Problem) -> int:
        """float32 elements of the largest fragment; asked where moves_registers."""
        return self.rows(p) * max(p.D, p.S)

    def refusal(self, p: Problem) -> str | None:
        """Why the program cannot run this problem, beside what `refused` asks of every config, or None."""
        return None

    @classmethod
    def options(cls, p: Problem) -> list:
        """What may run without a table, in order of preference, legal or not."""
        return first_legal(p, [cls(*x) for x in cls.OPTIONS], [cls(*x) for x in cls.RESERVE])

    @classmethod
    def on_cpu(cls, p: Problem) -> "Config":
        """The config for the CPU target."""
        return cls(*cls.ON_CPU)

    def loop_share(self, p: Problem) -> float:
        """Share of its inner loop's matrix products that a warpgroup executes; the others stand in another's branch."""
        return 1.0

    def tensor_core(self) -> str | None:
        """The instruction that the program claims (wgmma takes 64 rows and a whole warpgroup), or None."""
        return "hgmma"


CHUNK_CTAS = 6 * 132  # six for each SM
SPLIT_PAIRS = 64  # in the mean at least


class ChunkConfig(Config):
    """Of a program whose CTA owns a chunk, or a split of its pairs, and a head, and takes block_M rows at a time."""

    block_M: int

    def pairs(self, p):
        return self.block_M // p.G

    def chunk_reads(self, p):
        return 0.0  # once for all its pairs

    def splits(self, p) -> int:
        """CTAs that split a chunk's pairs. Where chunks are few, the one that most tokens chose would outlast all."""
        chunks = max(1, p.B * p.H * p.N)
        return max(1, min(-(-CHUNK_CTAS // chunks), p.B * p.T * p.H * p.K // (chunks * SPLIT_PAIRS)))

    def ctas(self, p):
        return p.B * p.H * p.N * self.splits(p)

    def reductions(self) -> int:
        """Bytes of shared memory by which the warps that share a row reduce it."""
        return 24 * self.threads if self.threads > 2 * self.block_M else 0

    def refusal(self, p):
        # A warpgroup multiplies 64 rows at a time with wgmma, fewer warps 16 each with mma.sync.
        warps = self.threads // 32
        rows, columns = (64, 16) if warps in (4, 8) else (16 * warps, max(16, 8 * warps))
        if self.block_M < p.G or self.block_M % rows:
            return f"block_M must be at least G = {p.G} and a multiple of {rows}, got {self.block_M}"
        return f"{warps} warps need D to be a multiple of {columns}, got {p.D}" if p.D % columns else None

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"


class GradientConfig(ChunkConfig):
    """Of such a program that also multiplies dk and dv, [S, D]."""

    def smem_bytes(self, p):
        tiles = 2 * (self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        return tiles * p.itemsize + SMEM_ALIGNMENT + self.reductions()

    def refusal(self, p):
        if reason := super().refusal(p):
            return reason
        warps = self.threads // 32
        if warps == 8 and p.D % 32:  # two warpgroups share the columns
            return f"8 warps need D to be a multiple of 32, got {p.D}"
        # wgmma if S is a multiple of 64, else each warp multiplies 16 rows by a multiple of 8 columns.
        shares = [(16 << i, 8 * (warps >> i)) for i in range(warps.bit_length())]
        if p.S % 64 and not any(p.S % rows == 0 and p.D % columns == 0 for rows, columns in shares):
            return f"{warps} warps cannot share out chunks of {p.S} by {p.D}"
        return None


@dataclass(frozen=True)
class TokenConfig(Config):
    """Of a program whose CTA owns one token and key/value head; num_stages chunks are in flight."""

    threads: int = 128
    num_stages: int = 2
    TILES = 1  # of [rows, D] in shared memory beside q
    SCORES = 1  # fragments [rows, S]
    MOVED = 2  # rows [G, D] to and from memory for a token
    producer = True
    OPTIONS = ((128, 2), (128, 3), (64, 2))
    RESERVE = ((128, 1), (64, 1), (32, 2), (32, 1))  # a lone warp, an unpipelined loop
    VARIANTS = tuple(product((128, 64), (2, 3, 4, 1)))

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
        reductions = 8 * self.threads * (1 + self.SCORES)  # two rows a thread
        return tiles * p.itemsize + weights + reductions + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.rows(p) * (p.D + p.S * self.SCORES)

    def refusal(self, p):
        columns = self.threads // 2  # 16 for each warp
        if p.S % columns or p.D % columns:
            return f"{self.threads // 32} warps need S and D to be multiples of {columns}, got {p.S} and {p.D}"
        return None

    def tensor_core(self):
        return "hmma"  # a token's tile has too few rows for wgmma


class AuxiliaryConfig(Config):
    """Of a program without matrix products."""

    def rows(self, p):
        return 0

    def chunk_reads(self, p):
        return 0.0

    def accumulators(self, p):
        return 0

    def tensor_core(self):
        return None


class SelectConfig(AuxiliaryConfig):
    """Of a program that sorts keys in shared memory, and so places its own barriers."""

    own_barriers = True
    of_retrieval = True

    @staticmethod
    def places(K: int) -> int:
        """Of a row's K best: a power of two."""
        return max(MIN_PLACES, power_of_two(K))

    def refusal(self, p):
        return f"topk must be at most {MAX_TOPK}, got {p.K}" if p.K > MAX_TOPK else None


def union_chunks(p: Problem, tokens: int, overlap: float) -> float:
    """Distinct chunks of neighbouring tokens, over the K of one: (V - (V - K) (1 - (1 - x) K / (V - K))^(n - 1)) / K.

    n tokens, V = N / 2 chunks that a token sees on average, x the share of its K that its predecessor chose too; the
    others are drawn from those that the predecessor did not choose. With x = K / V that is a random selection.
    """
    K, others = p.K, p.N / 2 - p.K
    if others <= 0:
        return 1.0
    return (K + others * (1 - max(0.0, 1 - (1 - overlap) * K / others) ** (tokens - 1))) / K


def row_bytes(p: Problem) -> int:
    """One token's q, do, dq or out for one key/value head."""
    return p.G * p.D * p.itemsize


def padded_rows(G: int) -> int:
    """Rows of a token's tile: its G heads, up to a multiple of 16, the tensor core's row count."""
    return -(-G // 16) * 16


def launch_registers(config: Config, blocks: int = 1) -> int:
    """Registers of each thread at launch when `blocks` CTAs are to fit the SM's four partitions."""
    warps = config.total_threads() // 32 * blocks
    return min(MAX_REGISTERS, 16384 // (32 * -(-warps // 4)) // 8 * 8)


def registers_left(config: Config, blocks: int = 1) -> int:
    """Registers that a computing thread may take, with what the producer gave up where it does."""
    each = launch_registers(config, blocks)
    if not config.moves_registers:
        return each
    spare = each * config.total_threads() - config.producer_registers * (config.total_threads() - config.threads)
    return min(CONSUMER_REGISTERS, spare // config.threads // 8 * 8)


def registers_needed(config: Config, problem: Problem) -> int:
    """Registers a thread: the accumulators and what a program needs beside them."""
    return config.accumulators(problem) // config.threads + config.working_registers


def blocks_per_sm(config: Config, problem: Problem) -> int:
    """CTAs of an SM: config.blocks, or as many as fit by shared memory and the registers needed; 0 if none."""
    by_smem = SMEM_SM // (config.smem_bytes(problem) + SMEM_RESERVED)
    needed = registers_needed(config, problem)
    # ptxas wants one wgmma's accumulator and operands within the registers at launch.
    at_launch = config.largest(problem) // config.threads + WGMMA_REGISTERS if config.moves_registers else 0
    fits = [n for n in range(1, min(by_smem, 8) + 1) if registers_left(config, n) >= needed]
    most = max((n for n in fits if launch_registers(config, n) >= at_launch), default=0)
    return min(most, config.blocks or most)


def refused(config: Config, p: Problem) -> str | None:
    """Why this config cannot run this problem on Hopper, or None."""
    if getattr(p, "D", 0) % 16:  # a Selection has none
        return f"D must be a multiple of 16, got {p.D}"
    if config.threads % 32 or not 32 <= config.threads <= MAX_THREADS:
        return f"threads must be 32 to {MAX_THREADS} in whole warps, got {config.threads}"
    if reason := config.refusal(p):
        return reason
    for name in ("num_stages", "num_splits"):
        if (count := getattr(config, name, 1)) < 1:
            return f"{name} must be at least 1, got {count}"
    smem = config.smem_bytes(p)
    if smem > SMEM_LIMIT:
        return f"shared memory must be at most {SMEM_LIMIT} bytes, got {smem}"
    blocks = blocks_per_sm(config, p)
    if blocks == 0:
        needed = registers_needed(config, p)
        return f"registers must be at most {registers_left(config)} a thread, got about {needed}"
    if config.blocks and blocks_per_sm(replace(config, blocks=0), p) == blocks:
        return f"blocks must be 0 or less than the {blocks} that fit, got {config.blocks}"
    return None


def first_legal(p: Problem, *groups: list) -> list:
    """The legal configs of the first group that has any."""
    for group in groups:
        if legal := [c for c in group if refused(c, p) is None]:
            return legal
    return []
