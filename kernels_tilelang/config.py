"""The one door to the programs' configs: names, search spaces, and the one statement of what is illegal."""

import functools
from dataclasses import asdict, fields

from hsa_tl.kernels_tilelang.config_auxiliary import (
    CombineConfig,
    PairsCountConfig,
    PairsPlaceConfig,
    UnionIndexConfig,
)
from hsa_tl.kernels_tilelang.config_backward import BwdChunkConfig, BwdDkdvChunkConfig, BwdDqTokenConfig
from hsa_tl.kernels_tilelang.config_base import refused
from hsa_tl.kernels_tilelang.config_decode import DecodeCombineConfig, DecodeSplitConfig
from hsa_tl.kernels_tilelang.config_forward import FwdChunkConfig, FwdTokenConfig, FwdUnionConfig
from hsa_tl.kernels_tilelang.config_retrieval import (
    RetrieveCombineConfig,
    RetrieveDlandmarksConfig,
    RetrieveSplitConfig,
    RetrieveTopkConfig,
)
from hsa_tl.problem import Problem

CONFIGS = {
    "hsa_fwd_token": FwdTokenConfig,
    "hsa_fwd_union": FwdUnionConfig,
    "hsa_fwd_chunk": FwdChunkConfig,
    "hsa_bwd_dq_token": BwdDqTokenConfig,
    "hsa_bwd_dkdv_chunk": BwdDkdvChunkConfig,
    "hsa_bwd_chunk": BwdChunkConfig,
    "hsa_combine": CombineConfig,
    "pairs_count": PairsCountConfig,
    "pairs_place": PairsPlaceConfig,
    "union_index": UnionIndexConfig,
    "hsa_decode_split": DecodeSplitConfig,
    "hsa_decode_combine": DecodeCombineConfig,
    "retrieve_topk": RetrieveTopkConfig,
    "retrieve_dlandmarks": RetrieveDlandmarksConfig,
    "retrieve_split": RetrieveSplitConfig,
    "retrieve_combine": RetrieveCombineConfig,
}
PROGRAMS = tuple(CONFIGS)
# Those of `hsa_attention` with matrix products: the tuner runs a program through it.
TUNED = tuple(name for name in CONFIGS if name.startswith(("hsa_fwd_", "hsa_bwd_")))


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


def why_illegal(program: str, problem: Problem, config) -> str | None:
    """Why this config cannot run this problem on Hopper, or None. The space, the tables and the launcher all ask it."""
    if type(config) is not CONFIGS[program]:
        return f"{program} takes a {CONFIGS[program].__name__}, got {type(config).__name__}"
    return refused(config, problem)


def space(program: str, problem: Problem) -> list:
    """The legal configs that may run without a table, in order of preference; the tests assemble all of them."""
    return [c for c in CONFIGS[program].options(problem) if refused(c, problem) is None]


def candidates(program: str, problem: Problem) -> list:
    """The tuner's search space: space() first, then the program's legal variants."""
    usual = space(program, problem)
    return usual + [c for c in CONFIGS[program].variants(problem) if c not in usual and refused(c, problem) is None]


@functools.lru_cache(maxsize=1024)
def default(program: str, problem: Problem):
    """The config of a program that no plan names: the first of its space; on the CPU target a small tile."""
    if problem.device_type == "cpu":
        return CONFIGS[program].on_cpu(problem)
    if not (legal := space(program, problem)):
        raise NotImplementedError(f"{program} has no config for {problem}; name another program in config=")
    return legal[0]


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
