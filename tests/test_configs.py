"""What a config states of its tile, against what its program declares: buffers, launch and parameters of the IR.

The IR is that of the program before TileLang lowers it, so nothing here compiles. What ptxas and the driver say of the
same configs is in test_static.py; what is legal, and which configs there are, in test_config_spaces.py.
"""

import heapq
import itertools
import re
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from tiers import prove

from hsa_tl import cases
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.kernels_tilelang.config_base import ChunkConfig, Config, TokenConfig, blocks_per_sm, union_chunks
from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig
from hsa_tl.kernels_tilelang.hsa_bwd_dkdv_chunk import BwdDkdvChunkConfig

PAPER = cases.case("paper-d128").problem
SHAPES = {
    "paper": PAPER,
    "odd-group-one-chunk": replace(PAPER, T=500, N=32, HQ=3, D=16, S=64, K=1),
    "per-head-tail": replace(PAPER, B=2, T=4000, N=63, HQ=16, H=2, D=64, K=16, masked=True, per_head=True),
    "wide": replace(PAPER, D=256, S=32),
    "long-chunks": replace(PAPER, N=128, HQ=40, D=64, S=128, K=8),
}
ALIGNMENT = 2048  # bytes that a config adds for aligning swizzled tiles


@dataclass
class Declared:
    """Of a program's IR: buffers by name, and the launch."""

    shared: dict[str, int]  # bytes of those that are accessed, times the stages of a pipelined loop that fills them
    fragments: dict[str, tuple[int, tuple[int, ...]]]  # bytes, shape
    parameters: dict  # the program's tensors
    grid: list  # extents of blockIdx
    threads: int
    blocks: list[int]  # CTAs of an SM that ptxas hears of
    pipelined: bool
    reductions: int  # words of a thread in them


def size(buffer, dims=None) -> int:
    """Bytes, of a tensor with the dynamic dims given."""
    elements = prod(evaluate(x, dims) for x in buffer.shape)
    return elements * compile.tvm.DataType(buffer.dtype).bits // 8


def declared(program, problem, c) -> Declared:
    """What a program says before TileLang lowers it."""
    ir = compile.build(program, problem, c)
    tirx, walk = compile.tvm.tirx, compile.tvm.tirx.stmt_functor.post_order_visit
    d = Declared({}, {}, {b.name: b for b in ir.buffer_map.values()}, [], 0, [], False, 0)
    accessed, stages = set(), {}

    def op(node):
        return getattr(getattr(node, "op", None), "name", "")

    def visit(node):
        if isinstance(node, tirx.BufferLoad | tirx.BufferStore):
            accessed.add(node.buffer.name)
        elif isinstance(node, tirx.For) and node.thread_binding is not None:
            d.grid.append(node.extent)
        elif isinstance(node, tirx.For) and "num_stages" in node.annotations:
            d.pipelined, number = True, int(node.annotations["num_stages"])
            walk(node.body, lambda x: stages.update(filled(x, number)))
        elif isinstance(node, tirx.SBlock):
            d.threads = prod(map(int, node.annotations.get("tl.launch_threads", [d.threads])))
            for b in node.alloc_buffers:
                if b.scope() == "shared.dyn":
                    d.shared[b.name] = size(b)
                elif b.scope() == "local.fragment":
                    d.fragments.setdefault(b.name, (size(b), tuple(map(int, b.shape))))
        elif getattr(node, "attr_key", None) == "tl.min_blocks_per_sm":
            d.blocks.append(int(node.value))
        if op(node) == "tl.tileop.reduce":
            d.reductions += int(node.annotations.get("batch", 1))

    def filled(node, number) -> dict[str, int]:
        """The buffer that a copy from a tensor fills."""
        if op(node) != "tl.tileop.copy":
            return {}
        source, target = (x.args[0].buffer for x in node.args[:2])
        return {target.name: number} if source.scope() == "global" else {}

    walk(ir.body, visit)
    d.shared = {name: n * stages.get(name, 1) for name, n in d.shared.items() if name in accessed}
    return d


def evaluate(extent, dims: dict[str, int] | None) -> int:
    """A dim or extent with the program's dynamic dims; TileLang may have added a number to a name."""
    tirx, values = compile.tvm.tirx, {}

    def visit(node):
        if isinstance(node, tirx.Var):
            values[node] = tirx.const(dims[re.sub(r"_\d+$", "", node.name)], node.dtype)

    if isinstance(extent, tirx.PrimExpr):
        tirx.stmt_functor.post_order_visit(extent, visit)
        extent = compile.tvm.arith.Analyzer().simplify(tirx.stmt_functor.substitute(extent, values))
    return int(extent)


def problem_of(program, shape):
    one_softmax = {"per_head": False} if program.startswith("selected_") else {}
    return config.problem_of(program, replace(SHAPES[shape], **one_softmax))


# Fragments that are alive together, where a program's are most; vectors of a row count as working registers.
BACKWARD_ALIVE = ("acc_dk acc_dv acc_s acc_dp", "acc_dk acc_dv acc_dq")
ALIVE = {
    "hsa_bwd_dq_token": ("acc_s acc_dp acc_dq",),
    "hsa_fwd_chunk": ("acc_s acc_o", "acc_s acc_p"),
    "hsa_fwd_chunk_sm90a": ("acc_p acc_o", "acc_s acc_p"),
    "hsa_bwd_dkdv_chunk": ("acc_s acc_dp acc_dk acc_dv",),
    **dict.fromkeys(("hsa_bwd_chunk", "hsa_bwd_chunk_sm90a", "selected_bwd_chunk"), BACKWARD_ALIVE),
    **dict.fromkeys(("hsa_combine", "hsa_decode_combine", "selected_decode_combine"), ("part acc_o",)),
    "pairs_place": ("rank equal position",),
    "union_index": ("place occurrence held",),
    "retrieve_dlandmarks": ("acc total",),
}  # others: acc_s, acc_o and q_local where they have them
REUSED = ("o_shared", "dq_shared")  # of the programs of a token: written when the tiles before them are read


def shared_bytes(program, problem, c, d: Declared) -> tuple[int, int]:
    """What a CTA needs at least, and at most so much may a config say."""
    buffers = sum(n for name, n in d.shared.items() if not (isinstance(c, TokenConfig) and name in REUSED))
    # A fragment's rows lie 16 to a warp. Where warps share rows, a reduction takes words of each thread.
    split = isinstance(c, TokenConfig) or c.rows(problem) < 16 * (c.threads // 32)
    least = ALIGNMENT + buffers + (4 * c.threads * d.reductions if split else 0)
    room = 0
    if program == "hsa_fwd_chunk_sm90a":
        room = 4 * c.num_stages * c.block_M  # a slot for each row, not for each pair
    elif program in ("hsa_bwd_chunk", "selected_bwd_chunk", "hsa_fwd_chunk"):
        tables = ("head_shared", "delta_shared") if "bwd" in program else ()  # counted also where it has none
        room = 4 * c.block_M * sum(d.shared.get(name, 0) < 4 * c.block_M for name in tables)
        room += 4 * c.threads * (6 - d.reductions) if split else 0
    elif program == "retrieve_dlandmarks":
        room = 4 * problem.D * c.threads // 32  # the warps' sums of each column
    elif "decode_split" in program or program.startswith("selected_fwd_"):
        heads = problem.G if problem.per_head else 1
        room = 4 * problem.K * heads * c.pairs(problem)  # weights of all slots
    return least, least + room


def assert_counted(program, problem, c):
    d, at = declared(program, problem, c), (program, c)
    assert d.blocks == [blocks_per_sm(c, problem)] * (program != "union_index"), at
    least, most = shared_bytes(program, problem, c, d)
    if d.shared or d.reductions:
        assert least <= c.smem_bytes(problem) <= most, at
    else:
        assert c.smem_bytes(problem) == 0, at

    parts = {name: n // 4 for name, (n, _) in d.fragments.items()}
    if program == "hsa_fwd_union_sm90a":  # the fragments of one warpgroup of several
        parts = {name: n * c.block_M // 64 for name, n in parts.items()}
    alive = [x.split() for x in ALIVE.get(program, ("acc_s acc_o q_local",))]
    words = max(sum(parts.get(name, 0) for name in names) for names in alive)
    adding = c.reduce_add and "bwd" in program
    assert c.accumulators(problem) == words + (4 * 4 * c.block_M if adding else 0), at  # 4 words of each of 4 threads
    if c.moves_registers:
        assert c.largest(problem) == max(parts.values()), at

    assert c.total_threads() == d.threads + 128 * (c.producer and not c.sm_90a_only), at
    assert c.total_threads() - c.threads == 128 * (d.pipelined or d.threads > c.threads), at
    if scores := d.fragments.get("acc_s"):
        rows = c.rows(problem) if program != "retrieve_split" else 64
        assert rows == scores[1][0] * (c.block_M // 64 if program == "hsa_fwd_union_sm90a" else 1), at


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_counts_what_its_program_declares(shape):
    """Shared memory and registers, from below and above; threads, rows, and the CTAs of an SM that ptxas hears of.

    Of another candidate with each shape, the first one with the paper's.
    """
    for program in config.PROGRAMS:
        problem = problem_of(program, shape)
        if found := config.candidates(program, problem):
            assert_counted(program, problem, found[7 * list(SHAPES).index(shape) % len(found)])
        else:
            assert program.endswith("_sm90a") or program in ("hsa_bwd_chunk", "selected_bwd_chunk")


@prove  # 80 s
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_counts_what_its_program_declares(shape):
    for program in config.PROGRAMS:
        problem = problem_of(program, shape)
        for c in config.candidates(program, problem):
            assert_counted(program, problem, c)


# What a launch moves, by level: tensors that cross once, each_ what every pair reads or adds for itself, tile_ what one
# read serves a tile with. Partial rows go to HBM and back. Weights and slots are small beside them and not counted.
ROWS = {"l2": "each_kv q out", "hbm": "q out"}
UNION = {"l2": "tile_kv q out", "hbm": "q out"}
CHUNK = {"l2": "each_q", "hbm": "partial partial q out"}, {"l2": "each_q", "reduce": "each_sum", "hbm": "q sum"}
BACKWARD = (
    # dout is as large as q. dq counts as float32 here too: 0.8 % more than the bytes in 16 bits, at K = 64.
    {"l2": "each_q each_q", "hbm": "dq_partial dq_partial q q sum"},
    {"l2": "each_q each_q", "reduce": "each_sum", "hbm": "q q sum"},
)
PAGES = dict.fromkeys(("l2", "hbm"), "each_page splits_q out")
SUMS = dict.fromkeys(("l2", "hbm"), "partial out")
MOVED = {
    "hsa_fwd_token": (ROWS,),
    "hsa_bwd_dq_token": ({"l2": "each_kv q q dq", "hbm": "q q dq"},),
    "selected_fwd_token": (ROWS,),
    **dict.fromkeys(("hsa_fwd_union", "hsa_fwd_union_sm90a", "selected_fwd_union"), (UNION,)),
    **dict.fromkeys(("hsa_fwd_chunk", "hsa_fwd_chunk_sm90a"), CHUNK),
    **dict.fromkeys(("hsa_bwd_chunk", "hsa_bwd_chunk_sm90a", "selected_bwd_chunk"), BACKWARD),
    "hsa_bwd_dkdv_chunk": ({"l2": "each_q each_q", "hbm": "q q"},),
    **dict.fromkeys(("hsa_decode_split", "selected_decode_split"), (PAGES,)),
    **dict.fromkeys(("hsa_combine", "hsa_decode_combine", "selected_decode_combine"), (SUMS,)),
    "pairs_count": ({"hbm": "indices", "reduce": "each_count"},),
    "pairs_place": ({"hbm": "indices pair", "l2": "indices pair each_cursor each_cursor"},),
    "union_index": ({"hbm": "indices order union_chunks union_groups"},),
    "retrieve_topk": ({"l2": "tile_landmark"},),
    "retrieve_split": (dict.fromkeys(("l2", "hbm"), "each_landmark"),),
    "retrieve_combine": (dict.fromkeys(("l2", "hbm"), "best"),),
    "retrieve_dlandmarks": ({"l2": "each_q_slc each_pair each_weight", "hbm": "pair each_sector"},),
}
AT = {"B": 2, "tokens": 6144, "N": 2048, "H": 2, "R": 2, "P": 4096, "blocks": 3, "splits": 1}
MANY = replace(PAPER, B=AT["B"], T=AT["tokens"], N=AT["N"], HQ=16, H=AT["H"], D=64, K=16)  # G = 8: whole tiles
PAIRS = MANY.B * MANY.T * MANY.H * MANY.K


def amounts(d: Declared, c, tile: int) -> dict[str, float]:
    """Bytes by name: of the program's tensors, and of what MOVED makes of them."""
    pairs = dict.fromkeys(("pairs", "partial_rows", "window_rows", "rows"), MANY.T * MANY.K) | {"pairs": PAIRS}
    dims = AT | pairs | {"tiles": MANY.T // tile} | dict.fromkeys(("segments", "bounds"), 9)
    n = {name: size(b, dims) for name, b in d.parameters.items()}
    chunks = MANY.B * MANY.N * MANY.H
    item = {
        "kv": sum(n.get(x, 0) for x in "kv") / chunks,
        "page": sum(n.get(x, 0) for x in ("k_pages", "v_pages")) / (AT["P"] * MANY.H),
        "q": n.get("q", 0) / (PAIRS / MANY.K),
        "q_slc": n.get("q_slc", 0) / (PAIRS / MANY.K),
        "landmark": n.get("landmarks", 0) / chunks,
        "sum": 4 * MANY.G * MANY.D,
        "count": 4, "pair": 4, "weight": 4, "cursor": 8, "sector": 32,
    }  # fmt: skip
    q = n.get("q", 0)
    once = {"q": q, "out": q, "sum": 2 * q, "splits_q": q * getattr(c, "num_splits", 1)}
    each = {f"each_{name}": x * PAIRS for name, x in item.items()}
    return once | n | each | {f"tile_{name}": x * PAIRS / tile for name, x in item.items()}


@pytest.mark.parametrize("program", config.PROGRAMS)
def test_a_config_counts_the_bytes_that_its_launch_moves(program):
    problem = config.problem_of(program, MANY)
    found = config.candidates(program, problem)
    for c in {c.reduce_add: c for c in found}.values():
        d = declared(program, problem, c)
        tile = c.block_M if program == "retrieve_topk" else getattr(c, "block_M", MANY.G) // MANY.G  # tokens
        n, levels = amounts(d, c, tile), MOVED[program][c.reduce_add]
        stated = {level: x * PAIRS for level, x in c.pair_bytes(problem).items()}
        assert stated == pytest.approx({level: sum(n[x] for x in names.split()) for level, names in levels.items()}), c


def test_a_config_counts_the_ctas_of_its_launch():
    """By the program's own grid. Tiles and ranges are as many as hold all tokens and landmarks."""
    for program in config.PROGRAMS:
        problem = replace(problem_of(program, "per-head-tail"), T=397, N=1100)
        for c in config.candidates(program, problem)[-1:]:
            if type(c).ctas is Config.ctas:
                continue  # the tuner does not plan it
            d = declared(program, problem, c)
            dims = {"B": problem.B, "tokens": problem.T, "N": problem.N, "H": 2, "R": 2}
            if "union_chunks" in d.parameters:
                dims["tiles"] = -(-problem.T // (int(d.parameters["union_chunks"].shape[3]) // problem.K))
            elif program == "retrieve_split":
                dims["splits"] = -(-problem.N // c.block_N)
            elif isinstance(c, ChunkConfig):
                dims["splits"] = c.splits(problem)
            assert c.ctas(problem) == prod(evaluate(x, dims) for x in d.grid), (program, c)


@pytest.mark.parametrize("T, splits", [(2048, 25), (4096, 13), (16384, 4), (32768, 2), (65536, 1)])
def test_ctas_split_a_chunk_where_chunks_are_few(T, splits):
    p = cases.at_length(PAPER, T)
    assert BwdChunkConfig().splits(p) == splits and BwdChunkConfig().ctas(p) == p.N * splits
    few = replace(p, T=p.S * p.N // p.K)  # a segment behind a long cache: 64 pairs for each chunk
    assert BwdChunkConfig().splits(few) == 1 and BwdDkdvChunkConfig().splits(p) == 1


@pytest.mark.parametrize("T", (4096, 8192, 16384, 32768, 65536))
def test_splits_keep_all_sms_busy_to_the_end(T):
    """Of a prefill with random selections, whose first chunks most tokens see. One CTA an SM, in order of launch."""
    p = cases.at_length(PAPER, T)
    seen = torch.arange(1, p.N)
    each = p.S * (p.K / seen).clamp(max=1)  # pairs that the tokens of a chunk give each of those that they see
    pairs = each.flip(0).cumsum(0).flip(0).repeat_interleave(splits := BwdChunkConfig().splits(p)) / splits
    busy = [0.0] * 132
    for n in pairs.tolist():
        heapq.heapreplace(busy, busy[0] + n)
    assert max(busy) < 1.03 * sum(busy) / 132


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tile_serves_whole_pairs(shape):
    """A chunk is read for each pair of a token's program, once for those of a union's tile, else for all its pairs."""
    for program in config.PROGRAMS:
        problem = problem_of(program, shape)
        for c in config.candidates(program, problem):
            if program == "retrieve_topk":
                assert c.pairs(problem) == c.rows(problem) == c.block_M
            elif hasattr(c, "block_M") and c.rows(problem):
                assert c.pairs(problem) * problem.G <= c.rows(problem) < (c.pairs(problem) + 1) * problem.G, (
                    program,
                    c,
                )
            else:
                assert c.pairs(problem) == 1
            shared = "fwd_union" in program or "_token" in program  # pairs() is 1 for a token
            assert c.chunk_reads(problem) == (1 / c.pairs(problem) if shared else 0.0), program


def test_a_union_tile_reads_its_union_and_multiplies_what_a_warpgroup_needs():
    for overlap, block_M in itertools.product((0.0, 0.5, 1.0), (64, 128, 192)):
        read, of_64 = (union_chunks(PAPER, rows // PAPER.G, overlap) for rows in (block_M, 64))
        for program, multiplied in (("hsa_fwd_union", read), ("hsa_fwd_union_sm90a", of_64)):
            c = config.config_of(program)(block_M)
            assert c.again(PAPER, overlap) == (read, multiplied)
    for program in config.PROGRAMS:
        c = config.config_of(program)()
        assert c.again(config.problem_of(program, PAPER), 1.0) == (1.0, 1.0)
        assert program == "hsa_bwd_chunk_sm90a" or c.loop_share(PAPER) == 1.0
