"""The rule that chooses the programs of a direction: a pure function of the problem and of how much tokens agree.

Each strategy is bound by what its pairs cost (docs of autotune.cost; a pair is one token, key/value head and chunk):
- token-stationary reads 2 S D values of keys and values from L2 for every pair, whatever the selection;
- a union tile reads and multiplies each chunk of its union once for all its rows, so it costs
  share = union / (tokens * K) of that for every token of the tile: 1 / tokens when all agree, 1 when none do;
- chunk-stationary reads a row of q and moves a row of partial results out and in again, whatever the selection.
A GPU that the CTAs do not fill, and keys and values that have left L2, cost what they cost in time. At D = 128, G = 16
this takes the union tile below a share of about 0.4 for 4 tokens, and chunk-stationary programs above.
The share is sampled on the device at the first call of a problem's size and now and then again; config=
{"union_share": {block_M: share}} (what union_share() returned for a layer's selection) takes its place, and config=
{program: {}} names the program outright.
"""

import math

import torch

from hsa_tl.autotune import cost, table
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import blocks_per_sm
from hsa_tl.problem import Problem

STRATEGIES = {
    "forward": (("hsa_fwd_token",), ("hsa_fwd_union",), ("hsa_fwd_chunk",)),
    "backward": (("hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk"), ("hsa_bwd_chunk",)),
}
BLOCKS = (64, 128, 192)  # rows of a union tile
SAMPLES = 64  # tiles
CALLS = 1000  # between two samples

_SAMPLED: dict[tuple, tuple[int, dict[int, float]]] = {}


def union_share(indices: torch.Tensor, num_chunks: int, G: int) -> dict[int, float]:
    """block_M -> chunks in the union of a tile's tokens over their chosen slots, from sampled tiles; reads the device.

    indices [B, T, H, K]; a tile of block_M rows is block_M // G tokens.
    """
    _, T, _, K = indices.shape
    sums = []
    for block_M in BLOCKS:
        tile = min(max(1, block_M // G), T)
        start = torch.linspace(0, T - tile, min(SAMPLES, T - tile + 1), device=indices.device).long()
        rows = indices[:, start[:, None] + torch.arange(tile, device=indices.device)]  # [B, samples, tile, H, K]
        rows = rows.transpose(2, 3).reshape(-1, tile * K).sort(-1).values
        valid = (rows >= 0) & (rows < num_chunks)
        fresh = valid.clone()
        fresh[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        sums += [fresh.sum(), valid.sum()]
    sums = torch.stack(sums).tolist()
    return {block_M: sums[2 * i] / max(1, sums[2 * i + 1]) for i, block_M in enumerate(BLOCKS)}


def random_share(problem: Problem) -> dict[int, float]:
    """union_share of a random causal selection in the middle of the sequence: without a sample, the worst to expect."""
    n = max(1, problem.N // 2)
    k = min(problem.K, n)
    tiles = {block_M: max(1, block_M // problem.G) for block_M in BLOCKS}
    return {block_M: n * (1 - (1 - k / n) ** tile) / (k * tile) for block_M, tile in tiles.items()}


def expected_ns(problem: Problem, config, share: dict[int, float], device: cost.Device) -> float:
    """Bound of a pair's time for the whole GPU, in ns: memory, tensor cores, and how well the CTAs fill the GPU."""
    p = problem
    read, multiplied = config.again(p, share)
    rate = device.mma_sync if config.tensor_core() == "hmma" else 1.0
    tensor = multiplied * p.pair_flops(config.DIRECTION) / device.tensor_flops_clock / rate * device.ns_for_each_clock
    memory = cost.memory_ns(config, p, device, read)
    slots = device.sms * max(1, blocks_per_sm(config, p))
    ctas = max(1, config.ctas(p))
    return max(tensor, *memory.values()) * math.ceil(ctas / slots) * slots / ctas


def choose(direction: str, problem: Problem, share: dict[int, float], device: cost.Device, deterministic=False) -> list:
    """[(program, config)]: the strategy of least expected time, each of its programs with its best config."""
    best, least = [], math.inf
    for programs in STRATEGIES[direction]:
        chosen, total = [], 0.0
        for program in programs:
            legal = [c for c in configs.space(program, problem) if not (deterministic and getattr(c, "reduce_add", 0))]
            if not legal:
                total = math.inf
                break
            config = min(legal, key=lambda c: expected_ns(problem, c, share, device))
            total += expected_ns(problem, config, share, device)
            chosen.append((program, config))
        if total < least:
            best, least = chosen, total
    return best


def _share(problem: Problem, indices: torch.Tensor, config: dict | None) -> dict[int, float]:
    if config and "union_share" in config:
        return {int(block_M): value for block_M, value in config["union_share"].items()}
    p = problem
    if p.T < SAMPLES or (indices.is_cuda and torch.cuda.is_current_stream_capturing()):
        return random_share(p)
    size = (p.B, p.H, p.G, p.K, p.S, p.T.bit_length(), p.N.bit_length())
    age, share = _SAMPLED.get(size, (CALLS, {}))
    if age >= CALLS:
        age, share = 0, union_share(indices, p.N, p.G)
    _SAMPLED[size] = age + 1, share
    return share


def programs(direction: str, problem: Problem, indices: torch.Tensor, config: dict | None, deterministic=False) -> list:
    """[(program, config)] to run: what config= names, else on the CPU the first strategy, else the rule's choice.

    The rule chooses the program, and those of its fields that hang on the selection (RULED: the union tile's rows and
    twin); the others come from the tuned table where it has a row that agrees, see table.resolve. ValueError: config
    names an unknown program or field, two strategies of a direction, or fields that do not suit.
    """
    for name, fields in (config or {}).items():
        if name != "union_share":
            configs.from_dict(name, fields)
    named = [names for names in STRATEGIES[direction] if config and any(name in config for name in names)]
    if len(named) > 1:
        raise ValueError(f"config must name one strategy for the {direction}, got {' and '.join(map(str, named))}")
    for names in named:
        chosen = [(name, table.resolve(name, problem, config)) for name in names]
        if deterministic and any(getattr(c, "reduce_add", 0) for _, c in chosen):
            raise ValueError("config must have reduce_add=0 with deterministic=True, got 1")
        return chosen
    if problem.device_type == "cpu":
        return [(name, table.resolve(name, problem)) for name in STRATEGIES[direction][0]]
    device = cost.DEVICES[table.device_name() or "h100"]
    chosen = choose(direction, problem, _share(problem, indices, config), device, deterministic)
    tuned = [(name, best, table.resolve(name, problem, preferred=best)) for name, best in chosen]
    return [(name, best if deterministic and getattr(c, "reduce_add", 0) else c) for name, best, c in tuned]
