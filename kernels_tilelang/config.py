"""Configs of the programs, their search spaces, shared-memory arithmetic, and the one statement of what is illegal."""

from dataclasses import asdict, dataclass
from itertools import product

from hsa_tl.problem import Problem

SMEM_LIMIT = 227 * 1024  # bytes a CTA may ask for on sm_90
SMEM_SM = 228 * 1024  # bytes of an SM, SMEM_RESERVED of them for each CTA
SMEM_RESERVED = 1024 + 128  # 128: static shared memory (barriers), rounded up
SMEM_ALIGNMENT = 2048  # what aligning swizzled tiles to 1 KB may add
MAX_REGISTERS = 255  # a thread
WORKING_REGISTERS = 52  # beside the accumulators: addresses, row statistics, operands; less made ptxas spill
PRODUCER_THREADS = 128


@dataclass(frozen=True)
class TokenConfig:
    """A CTA owns one token and key/value head; num_stages chunks are in flight."""

    threads: int = 128
    num_stages: int = 2


@dataclass(frozen=True)
class ChunkConfig:
    """A CTA owns one chunk and key/value head and takes block_M rows at a time: block_M // G pairs of G heads."""

    block_M: int = 64
    threads: int = 128


CONFIGS = {"hsa_fwd_token": TokenConfig, "hsa_bwd_dq_token": TokenConfig, "hsa_bwd_dkdv_chunk": ChunkConfig}
DIRECTIONS = {"hsa_fwd_token": "forward", "hsa_bwd_dq_token": "dq", "hsa_bwd_dkdv_chunk": "dkdv"}
PROGRAMS = tuple(CONFIGS)


def padded_rows(G: int) -> int:
    """Rows of a token's tile: its G heads, up to a multiple of 16, the tensor core's row count."""
    return -(-G // 16) * 16


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


def smem_bytes(program: str, problem: Problem, config) -> int:
    """At most so much shared memory does a CTA take: buffers that live together, reductions across warps, alignment."""
    p, size = problem, problem.itemsize
    reductions = 4 * config.threads * (2 if program == "hsa_fwd_token" else 3)
    if program == "hsa_bwd_dkdv_chunk":
        buffers = 2 * (config.block_M * p.D + p.S * p.D + config.block_M * p.S) * size + 4 * -(-config.block_M // p.G)
        return buffers + SMEM_ALIGNMENT + (reductions if config.threads > 2 * config.block_M else 0)
    rows = padded_rows(p.G)
    tiles = 2 * config.num_stages * p.S * p.D + rows * p.S + rows * p.D
    weights = 4 * p.K * (p.G if p.per_head else 1)
    if program == "hsa_bwd_dq_token":
        tiles += rows * p.D
        weights += 4 * rows * p.K
    return tiles * size + weights + reductions + SMEM_ALIGNMENT


def total_threads(program: str, config) -> int:
    """Threads of a CTA; automatic warp specialisation adds a producer warpgroup."""
    return config.threads + (PRODUCER_THREADS if isinstance(config, TokenConfig) else 0)


def registers_left(program: str, config, blocks: int = 1) -> int:
    """Registers that ptxas may give a thread when `blocks` CTAs are to fit the SM's four partitions."""
    warps = total_threads(program, config) // 32 * blocks
    return min(MAX_REGISTERS, 16384 // (32 * -(-warps // 4)) // 8 * 8)


def accumulator_registers(program: str, problem: Problem, config) -> int:
    """float32 registers a thread that the program's fragments take."""
    p = problem
    if program == "hsa_bwd_dkdv_chunk":
        elements = 2 * p.S * p.D + 2 * config.block_M * p.S
    else:
        elements = padded_rows(p.G) * (p.D + p.S * (1 if program == "hsa_fwd_token" else 2))
    return elements // config.threads


def blocks_per_sm(program: str, problem: Problem, config) -> int:
    """CTAs that fit an SM by shared memory and by the registers the program needs; 0 if not even one does."""
    by_smem = SMEM_SM // (smem_bytes(program, problem, config) + SMEM_RESERVED)
    needed = accumulator_registers(program, problem, config) + WORKING_REGISTERS
    return max((n for n in range(1, min(by_smem, 8) + 1) if registers_left(program, config, n) >= needed), default=0)


def why_illegal(program: str, problem: Problem, config) -> str | None:
    """Why this config cannot run this problem on Hopper, or None. The space, the tables and the launcher all ask it."""
    p, warps = problem, config.threads // 32
    if not isinstance(config, CONFIGS[program]):
        return f"{program} takes a {CONFIGS[program].__name__}, got {type(config).__name__}"
    if p.D % 16:
        return f"D must be a multiple of 16, got {p.D}"
    if config.threads % 32 or not 32 <= config.threads <= 256:
        return f"threads must be 32 to 256 in whole warps, got {config.threads}"
    if program == "hsa_bwd_dkdv_chunk":
        # A warpgroup multiplies 64 rows at a time with wgmma, fewer warps 16 each with mma.sync.
        rows, columns = (64, 16) if warps in (4, 8) else (16 * warps, 16 * warps)
        if config.block_M < p.G or config.block_M % rows:
            return f"block_M must be at least G = {p.G} and a multiple of {rows}, got {config.block_M}"
        if p.D % columns:
            return f"{warps} warps need D to be a multiple of {columns}, got {p.D}"
    else:
        if p.S % (16 * warps) or p.D % (16 * warps):
            return f"{warps} warps need S and D to be multiples of {16 * warps}, got {p.S} and {p.D}"
        if config.num_stages < 1:
            return f"num_stages must be at least 1, got {config.num_stages}"
    smem = smem_bytes(program, p, config)
    if smem > SMEM_LIMIT:
        return f"shared memory must be at most {SMEM_LIMIT} bytes, got {smem}"
    if blocks_per_sm(program, p, config) == 0:
        registers = accumulator_registers(program, p, config) + WORKING_REGISTERS
        return f"registers must be at most {registers_left(program, config)} a thread, got about {registers}"
    return None


def space(program: str, problem: Problem) -> list:
    """Every legal config of the program's search space, in a fixed order."""
    if CONFIGS[program] is TokenConfig:
        options = [TokenConfig(*x) for x in ((128, 2), (128, 3), (64, 2), (128, 1), (64, 1), (32, 2), (32, 1))]
        preferred = [c for c in options if c.threads >= 64 and c.num_stages >= 2]
    else:
        options = [ChunkConfig(*x) for x in product((64, 128, 32, 16), (128, 256, 64))]
        preferred = [c for c in options if c.threads >= 128]
    # A lone warp, an unpipelined loop and less than a warpgroup are for shapes that nothing better fits.
    legal = [c for c in options if why_illegal(program, problem, c) is None]
    return [c for c in legal if c in preferred] or legal


def from_dict(program: str, fields: dict):
    """The program's config from a mapping; ValueError names unknown programs and fields."""
    if program not in CONFIGS:
        raise ValueError(f"config must name programs among {', '.join(PROGRAMS)}, got {program!r}")
    known = CONFIGS[program].__dataclass_fields__
    unknown = set(fields) - set(known)
    if unknown:
        raise ValueError(f"config of {program} must have fields among {', '.join(known)}, got {sorted(unknown)}")
    return CONFIGS[program](**fields)


def describe(config) -> str:
    """One readable token for tables: field=value, comma separated."""
    return ",".join(f"{k}={v}" for k, v in asdict(config).items())
