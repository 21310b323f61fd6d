"""What every config states of its program's tile, and the arithmetic of shared memory and registers on sm_90."""

from dataclasses import replace
from typing import ClassVar

from hsa_tl.problem import Problem

SMEM_LIMIT = 227 * 1024  # bytes a CTA may ask for on sm_90
SMEM_SM = 228 * 1024  # bytes of an SM, SMEM_RESERVED of them for each CTA
SMEM_RESERVED = 1024 + 128  # 128: static shared memory (barriers), rounded up
SMEM_ALIGNMENT = 2048  # what aligning swizzled tiles to 1 KB may add
MAX_REGISTERS = 255  # a thread
MAX_THREADS = 384  # that compute: three warpgroups
WORKING_REGISTERS = 52  # beside the accumulators: addresses, row statistics, operands; less made ptxas spill
WGMMA_REGISTERS = 30  # beside its accumulator
WARPGROUP = 128  # threads
PRODUCER_REGISTERS = 24  # a thread of the producer warpgroup keeps, when it gives the rest to the consumers
CONSUMER_REGISTERS = 240  # a thread at most, then


class Config:
    """A program's config: its fields, and what its tile takes. One frozen subclass for each program."""

    DIRECTION: ClassVar[str]  # what it computes: a key of hsa_tl.problem.GEMMS
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of static_key: its builder's
    specialised: ClassVar[bool] = False  # on a GPU run sm90a/<program>.py, its hand-specialised twin
    moves_registers: ClassVar[bool] = False  # from the producer warpgroup to the consumers
    producer_registers: ClassVar[int] = PRODUCER_REGISTERS  # where moves_registers
    working_registers: ClassVar[int] = WORKING_REGISTERS
    own_barriers: ClassVar[bool] = False  # the program places every barrier itself, TileLang adds none
    blocks: ClassVar[int] = 0  # CTAs of an SM; 0: as many as fit
    reduce_add: ClassVar[int] = 0  # adds into its output atomically, in no fixed order
    threads: int  # that compute

    def total_threads(self) -> int:
        """Threads of a CTA, with those that only copy."""
        return self.threads

    def rows(self, p: Problem) -> int:
        """Rows of the tile that the tensor cores multiply."""
        raise NotImplementedError

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
        raise NotImplementedError

    def refusal(self, p: Problem) -> str | None:
        """Why the program cannot run this problem, beside threads, shared memory and registers, or None."""
        raise NotImplementedError

    @classmethod
    def options(cls, p: Problem) -> list:
        """What may run without a table, in order of preference, legal or not."""
        raise NotImplementedError

    @classmethod
    def variants(cls, p: Problem) -> list:
        """What the tuner tries beside options(), legal or not."""
        return []

    @classmethod
    def on_cpu(cls, p: Problem) -> "Config":
        """The config for the CPU target, where only the tile's size matters."""
        return cls()

    def loop_share(self, p: Problem) -> float:
        """Share of its inner loop's matrix products that a warpgroup executes; the others stand in another's branch."""
        return 1.0

    def tensor_core(self) -> str | None:
        """The instruction that the program claims (wgmma takes 64 rows and a whole warpgroup), or None."""
        return "hgmma"


class ChunkConfig(Config):
    """Of a program whose CTA owns a chunk and a key/value head and takes block_M rows of its pairs at a time."""

    block_M: int

    def rows(self, p):
        return self.block_M

    def pairs(self, p):
        return self.block_M // p.G

    def chunk_reads(self, p):
        return 0.0  # once for all its pairs

    def ctas(self, p):
        return p.B * p.H * p.N


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
    if p.D % 16:
        return f"D must be a multiple of 16, got {p.D}"
    if config.threads % 32 or not 32 <= config.threads <= MAX_THREADS:
        return f"threads must be 32 to {MAX_THREADS} in whole warps, got {config.threads}"
    if reason := config.refusal(p):
        return reason
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


def warps_refusal(config: Config, p: Problem) -> str | None:
    """Why block_M rows of pairs and D columns cannot be shared out among the warps, or None."""
    # A warpgroup multiplies 64 rows at a time with wgmma, fewer warps 16 each with mma.sync.
    warps = config.threads // 32
    rows, columns = (64, 16) if warps in (4, 8) else (16 * warps, max(16, 8 * warps))
    if config.block_M < p.G or config.block_M % rows:
        return f"block_M must be at least G = {p.G} and a multiple of {rows}, got {config.block_M}"
    if p.D % columns:
        return f"{warps} warps need D to be a multiple of {columns}, got {p.D}"
    return None


def gradient_refusal(config: Config, p: Problem) -> str | None:
    """As warps_refusal, for a program that also multiplies dk and dv, [S, D]."""
    if reason := warps_refusal(config, p):
        return reason
    warps = config.threads // 32
    if warps == 8 and p.D % 32:  # two warpgroups share the columns
        return f"8 warps need D to be a multiple of 32, got {p.D}"
    # wgmma if S is a multiple of 64, else each warp multiplies 16 rows by a multiple of 8 columns.
    shares = [(16 << i, 8 * (warps >> i)) for i in range(warps.bit_length())]
    if p.S % 64 and not any(p.S % rows == 0 and p.D % columns == 0 for rows, columns in shares):
        return f"{warps} warps cannot share out chunks of {p.S} by {p.D}"
    return None
