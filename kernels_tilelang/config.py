"""Configs of the programs, their search spaces, shared-memory arithmetic, and the one statement of what is illegal."""

from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import ClassVar

from hsa_tl.problem import Problem

SMEM_LIMIT = 227 * 1024  # bytes a CTA may ask for on sm_90
SMEM_SM = 228 * 1024  # bytes of an SM, SMEM_RESERVED of them for each CTA
SMEM_RESERVED = 1024 + 128  # 128: static shared memory (barriers), rounded up
SMEM_ALIGNMENT = 2048  # what aligning swizzled tiles to 1 KB may add
MAX_REGISTERS = 255  # a thread
WORKING_REGISTERS = 52  # beside the accumulators: addresses, row statistics, operands; less made ptxas spill
WARPGROUP = 128  # threads
SPECIALISED_REGISTERS = 224  # a thread of two warpgroups that a third, which copies, leaves its registers to


class Config:
    """A program's config: its fields, and what its tile takes. One frozen subclass for each program."""

    DIRECTION: ClassVar[str]  # what it computes: a key of hsa_tl.problem.GEMMS
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of static_key: its builder's
    specialised: ClassVar[bool] = False  # on a GPU run sm90a/<program>.py, its hand-specialised twin
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

    def pair_bytes(self, p: Problem) -> dict[str, float]:
        """Bytes that one pair moves, by level: l2, hbm, reduce (float32 reduce-add); keys and values stay in L2."""
        raise NotImplementedError

    def smem_bytes(self, p: Problem) -> int:
        """At most so much shared memory does a CTA take."""
        raise NotImplementedError

    def accumulators(self, p: Problem) -> int:
        """float32 elements of the CTA's fragments."""
        raise NotImplementedError

    def refusal(self, p: Problem) -> str | None:
        """Why the program cannot run this problem, beside threads, shared memory and registers, or None."""
        raise NotImplementedError

    @classmethod
    def options(cls, p: Problem) -> list:
        """The search space in order of preference, legal or not."""
        raise NotImplementedError

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


def row_bytes(p: Problem) -> int:
    """One token's q, do, dq or out for one key/value head."""
    return p.G * p.D * p.itemsize


def padded_rows(G: int) -> int:
    """Rows of a token's tile: its G heads, up to a multiple of 16, the tensor core's row count."""
    return -(-G // 16) * 16


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
        return _first_legal(p, usual, [cls(*x) for x in ((128, 1), (64, 1), (32, 2), (32, 1))])

    def tensor_core(self):
        return "hmma"  # a token's tile has too few rows for wgmma


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

    def pair_bytes(self, p):
        return {"l2": 2 * row_bytes(p), "hbm": 2 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        tiles = 2 * (self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        reductions = 12 * self.threads if self.threads > 2 * self.block_M else 0
        return tiles * p.itemsize + 4 * -(-self.block_M // p.G) + SMEM_ALIGNMENT + reductions

    def accumulators(self, p):
        return 2 * p.S * p.D + 2 * self.block_M * p.S

    def refusal(self, p):
        return pair_rows_refusal(self, p)

    @classmethod
    def options(cls, p):
        every = [cls(*x) for x in product((64, 128, 32, 16), (128, 256, 64))]
        # Less than a warpgroup is for shapes that nothing better fits.
        return _first_legal(p, [c for c in every if c.threads >= WARPGROUP], every)

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"


@dataclass(frozen=True)
class BwdChunkConfig(Config):
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

    def total_threads(self):
        return self.threads + WARPGROUP * self.specialised

    def rows(self, p):
        return self.block_M

    def pairs(self, p):
        return self.block_M // p.G

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

    def refusal(self, p):
        if p.D not in (64, 128):
            return f"D must be 64 or 128, got {p.D}"
        if p.S * p.D > 64 * 128:
            return f"S must be at most {64 * 128 // p.D} at D = {p.D}, got {p.S}"
        if not self.specialised:
            if self.num_stages != 1:
                return f"num_stages must be 1 without specialised, got {self.num_stages}"
            return pair_rows_refusal(self, p)
        if p.D not in (64, 128) or p.S != 64 or p.G not in (8, 16, 32, 64):
            return f"specialised needs D of 64 or 128, S = 64 and G of 8, 16, 32 or 64, got {p.D}, {p.S} and {p.G}"
        if (self.block_M, self.threads) != (128, 256) or self.num_stages < 1:
            return f"specialised needs block_M = 128, threads = 256 and num_stages of at least 1, got {self}"
        return None

    @classmethod
    def options(cls, p):
        fast = [cls(128, 256, n, 1, r) for r, n in product((0, 1), (2, 3, 1))]
        plain = [cls(m, t, 1, 0, r) for r, t, m in product((0, 1), (128, 256, 64), (128, 64, 32, 16))]
        # Less than a warpgroup is for shapes that nothing better fits.
        return _first_legal(p, fast + [c for c in plain if c.threads >= WARPGROUP], plain)

    def loop_share(self, p):
        return 5 / 7 if self.specialised and p.D == 64 else 1.0  # dv in one consumer's branch, dk in the other's

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(16, p.G))

    def tensor_core(self):
        return "hgmma" if self.threads >= WARPGROUP else "hmma"


def pair_rows_refusal(config, p: Problem) -> str | None:
    """Why block_M rows of pairs cannot be shared out among the warps, or None."""
    # A warpgroup multiplies 64 rows at a time with wgmma, fewer warps 16 each with mma.sync.
    warps = config.threads // 32
    rows, columns = (64, 16) if warps in (4, 8) else (16 * warps, 16 * warps)
    if config.block_M < p.G or config.block_M % rows:
        return f"block_M must be at least G = {p.G} and a multiple of {rows}, got {config.block_M}"
    if p.D % columns:
        return f"{warps} warps need D to be a multiple of {columns}, got {p.D}"
    return None


CONFIGS = {
    "hsa_fwd_token": FwdTokenConfig,
    "hsa_bwd_dq_token": BwdDqTokenConfig,
    "hsa_bwd_dkdv_chunk": BwdDkdvChunkConfig,
    "hsa_bwd_chunk": BwdChunkConfig,
}
PROGRAMS = tuple(CONFIGS)
_NAMES = {config: program for program, config in CONFIGS.items()}


def static_key(problem: Problem) -> dict:
    """What a program is compiled for. B, T, N, H and the pair count are free."""
    return {
        "G": problem.G,
        "D": problem.D,
        "S": problem.S,
        "K": problem.K,
        "heads_w": problem.G if problem.per_head else 1,
        "masked": problem.masked,
        "dtype": problem.dtype_name,
    }


def registers_left(config: Config, blocks: int = 1) -> int:
    """Registers that a thread may have when `blocks` CTAs are to fit the SM's four partitions."""
    if config.specialised:  # the producer warpgroup hands its registers over
        return SPECIALISED_REGISTERS if blocks == 1 else 0
    warps = config.total_threads() // 32 * blocks
    return min(MAX_REGISTERS, 16384 // (32 * -(-warps // 4)) // 8 * 8)


def registers_needed(config: Config, problem: Problem) -> int:
    """Registers a thread: the accumulators and what a program needs beside them."""
    return config.accumulators(problem) // config.threads + WORKING_REGISTERS


def blocks_per_sm(config: Config, problem: Problem) -> int:
    """CTAs that fit an SM by shared memory and by the registers the program needs; 0 if not even one does."""
    by_smem = SMEM_SM // (config.smem_bytes(problem) + SMEM_RESERVED)
    needed = registers_needed(config, problem)
    return max((n for n in range(1, min(by_smem, 8) + 1) if registers_left(config, n) >= needed), default=0)


def why_illegal(program: str, problem: Problem, config) -> str | None:
    """Why this config cannot run this problem on Hopper, or None. The space, the tables and the launcher all ask it."""
    p = problem
    if type(config) is not CONFIGS[program]:
        return f"{program} takes a {CONFIGS[program].__name__}, got {type(config).__name__}"
    if p.D % 16:
        return f"D must be a multiple of 16, got {p.D}"
    if config.threads % 32 or not 32 <= config.threads <= 256:
        return f"threads must be 32 to 256 in whole warps, got {config.threads}"
    if reason := config.refusal(p):
        return reason
    smem = config.smem_bytes(p)
    if smem > SMEM_LIMIT:
        return f"shared memory must be at most {SMEM_LIMIT} bytes, got {smem}"
    if blocks_per_sm(config, p) == 0:
        needed = registers_needed(config, p)
        return f"registers must be at most {registers_left(config)} a thread, got about {needed}"
    return None


def _first_legal(problem: Problem, *groups: list) -> list:
    """The legal configs of the first group that has any."""
    for group in groups:
        if legal := [c for c in group if why_illegal(_NAMES[type(c)], problem, c) is None]:
            return legal
    return []


def space(program: str, problem: Problem) -> list:
    """Every legal config of the program's search space, in a fixed order of preference."""
    return [c for c in CONFIGS[program].options(problem) if why_illegal(program, problem, c) is None]


def from_dict(program: str, values: dict):
    """The program's config from a mapping; ValueError names unknown programs and fields."""
    if program not in CONFIGS:
        raise ValueError(f"config must name programs among {', '.join(PROGRAMS)}, got {program!r}")
    known = [f.name for f in fields(CONFIGS[program])]
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"config of {program} must have fields among {', '.join(known)}, got {sorted(unknown)}")
    return CONFIGS[program](**values)


def describe(config) -> str:
    """One readable token for tables: field=value, comma separated."""
    return ",".join(f"{k}={v}" for k, v in asdict(config).items())


def parse(program: str, text: str):
    """The config that describe() printed; every field is an integer."""
    return from_dict(program, {k: int(v) for k, v in (item.split("=") for item in text.split(","))})
