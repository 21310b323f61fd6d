"""Which configs there are: the exact edge of each refusal, what an SM holds, and the lists that plans and tuner try."""

import csv
import itertools
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest
import torch

from hsa_tl import cases
from hsa_tl.autotune import cost, static
from hsa_tl.kernels_tilelang import config
from hsa_tl.kernels_tilelang.config_base import (
    Config,
    blocks_per_sm,
    launch_registers,
    refused,
    registers_left,
    registers_needed,
)

ROOT = Path(__file__).parent.parent
PAPER = cases.case("paper-d128").problem

# Config fields and changes of the paper's problem that are legal, and the nearest that are not, with the reason.
EDGES = [
    ("hsa_fwd_token", {"threads": 32}, {}, {"threads": 0}, {}, "threads must be 32 to 384 in whole warps, got 0"),
    ("hsa_fwd_token", {"threads": 64}, {"D": 96, "S": 32}, {}, {"D": 96}, "4 warps need S and D to be multiples of 64"),
    ("hsa_fwd_token", {"threads": 64}, {"S": 32}, {"threads": 64}, {"S": 48}, "2 warps need S and D to be multiples"),
    ("hsa_fwd_token", {"threads": 64}, {"D": 32}, {"threads": 64}, {"D": 40}, "D must be a multiple of 16, got 40"),
    ("hsa_fwd_token", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1, got 0"),
    ("hsa_fwd_token", {"num_stages": 6}, {}, {"num_stages": 7}, {}, "shared memory must be at most 232320 bytes"),
    ("hsa_fwd_union", {"block_M": 192}, {"HQ": 192}, {"block_M": 192}, {"HQ": 193}, "and at least G = 193, got 192"),
    ("hsa_fwd_union", {"block_M": 64}, {}, {"block_M": 96}, {}, "block_M must be 64, 128 or 192"),
    ("hsa_fwd_union", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1"),
    ("hsa_fwd_union", {"block_M": 64, "blocks": 1}, {}, {"block_M": 64, "blocks": 2}, {}, "blocks must be 0 or less"),
    ("hsa_fwd_union_sm90a", {}, {"HQ": 64}, {}, {"HQ": 48}, "whole tokens in a warpgroup's 64 rows"),
    ("hsa_fwd_union_sm90a", {"block_M": 128}, {}, {"block_M": 64}, {}, "two warpgroups"),
    ("hsa_fwd_chunk", {"block_M": 64}, {"HQ": 64}, {"block_M": 64}, {"HQ": 65}, "at least G = 65 and a"),
    ("hsa_fwd_chunk", {"block_M": 32, "threads": 64}, {}, {"block_M": 48, "threads": 64}, {}, "of 32, got 48"),
    ("hsa_fwd_chunk", {"block_M": 128}, {}, {"block_M": 96}, {}, "a multiple of 64, got 96"),
    ("hsa_fwd_chunk", {"threads": 64}, {"D": 48}, {"threads": 96, "block_M": 48}, {"D": 64}, "3 warps need D to be"),
    ("hsa_fwd_chunk", {"threads": 96, "block_M": 96}, {"D": 48}, {"threads": 96}, {"D": 48}, "a multiple of 48"),
    ("hsa_fwd_chunk", {"threads": 256, "block_M": 128}, {"D": 48}, {"threads": 256, "block_M": 32}, {}, "of 64"),
    ("hsa_fwd_chunk_sm90a", {}, {"HQ": 128}, {}, {"HQ": 136}, "block_M 128 >= G"),
    ("hsa_fwd_chunk_sm90a", {}, {"HQ": 8}, {}, {"HQ": 12}, "G % 8 == 0"),
    ("hsa_fwd_chunk_sm90a", {}, {"D": 64}, {}, {"D": 96}, "D 64 or 128"),
    ("hsa_fwd_chunk_sm90a", {}, {}, {}, {"dtype": torch.float32}, "16 bits"),
    ("hsa_fwd_chunk_sm90a", {}, {}, {"block_M": 256}, {}, "block_M 128"),
    ("hsa_fwd_chunk_sm90a", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1"),
    ("hsa_bwd_chunk", {}, {"D": 64}, {}, {"D": 96}, "D must be 64 or 128, got 96"),
    ("hsa_bwd_chunk", {"threads": 256}, {"D": 64, "S": 128}, {"threads": 256}, {"D": 64, "S": 144}, "at most 128 at D"),
    ("hsa_bwd_chunk", {}, {"S": 64}, {}, {"S": 80}, "S must be at most 64 at D = 128, got 80"),
    ("hsa_bwd_chunk", {}, {}, {"block_M": 96}, {}, "a multiple of 64, got 96"),
    ("hsa_bwd_dkdv_chunk", {}, {"D": 96, "S": 16}, {}, {"D": 80, "S": 16}, "share out chunks of 16 by 80"),
    ("hsa_bwd_dkdv_chunk", {}, {"D": 80, "S": 32}, {}, {"D": 80, "S": 48}, "share out chunks of 48 by 80"),
    ("hsa_bwd_dkdv_chunk", {"threads": 256}, {"D": 64}, {"threads": 256}, {"D": 48}, "D to be a multiple of 32"),
    ("hsa_bwd_dkdv_chunk", {"threads": 64}, {"D": 48, "S": 16}, {}, {"D": 48, "S": 16}, "cannot share out chunks"),
    ("hsa_bwd_chunk_sm90a", {}, {"HQ": 64}, {}, {"HQ": 128}, "G of 8, 16, 32 or 64"),
    ("hsa_bwd_chunk_sm90a", {}, {"HQ": 8}, {}, {"HQ": 4}, "G of 8, 16, 32 or 64"),
    ("hsa_bwd_chunk_sm90a", {}, {"HQ": 32}, {}, {"S": 32}, "S = 64"),
    ("hsa_bwd_chunk_sm90a", {}, {"D": 64}, {}, {"D": 96}, "D of 64 or 128"),
    ("hsa_bwd_chunk_sm90a", {}, {}, {"threads": 128}, {}, "block_M = 128 and threads = 256"),
    ("hsa_bwd_chunk_sm90a", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1"),
    ("hsa_combine", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1"),
    ("union_index", {"block_M": 64}, {"HQ": 64}, {"block_M": 64}, {"HQ": 65}, "at least G = 65, got 64"),
    ("hsa_decode_split", {"num_splits": 64}, {}, {"num_splits": 65}, {}, "num_splits must be 1 to K = 64, got 65"),
    ("hsa_decode_split", {"num_splits": 1}, {}, {"num_splits": 0}, {}, "num_splits must be 1 to K = 64, got 0"),
    ("hsa_decode_split", {}, {}, {}, {"S": 32}, "4 warps need S and D to be multiples of 64"),
    ("hsa_decode_combine", {"num_splits": 1}, {}, {"num_splits": 0}, {}, "num_splits must be at least 1"),
    ("retrieve_combine", {}, {"K": 128}, {}, {"K": 129}, "topk must be at most 128, got 129"),
    ("retrieve_combine", {"threads": 128}, {}, {"threads": 96}, {}, "threads must be a power of two, got 96"),
    ("retrieve_split", {"block_N": 64}, {}, {"block_N": 32}, {}, "a power of two of at least 64, got 32"),
    ("retrieve_split", {"block_N": 128}, {"K": 65}, {"block_N": 64}, {"K": 65}, "of at least 128, got 64"),
    ("retrieve_split", {"block_N": 256}, {}, {"block_N": 192}, {}, "block_N must be a power of two"),
    ("retrieve_split", {"num_stages": 1}, {"K": 128}, {}, {"K": 129}, "topk must be at most 128"),
    ("retrieve_split", {"num_stages": 1}, {}, {"num_stages": 0}, {}, "num_stages must be at least 1"),
    ("retrieve_topk", {"block_M": 64, "threads": 128}, {}, {"block_M": 64}, {}, "block_M must be 64 for each"),
    ("retrieve_topk", {"block_N": 72}, {"D": 64}, {"block_N": 68}, {"D": 64}, "a multiple of 8, got 68"),
    ("retrieve_topk", {"num_stages": 1}, {"D": 64}, {"num_stages": 0}, {"D": 64}, "num_stages must be at least 1"),
    ("retrieve_topk", {"block_M": 64, "threads": 128}, {"K": 128, "D": 16}, {"num_stages": 1}, {"K": 129}, "topk must"),
]  # fmt: skip


@pytest.mark.parametrize("program, fields, changes, wrong_fields, wrong_changes, words", EDGES)
def test_a_refusal_has_its_exact_edge(program, fields, changes, wrong_fields, wrong_changes, words):
    make, problem = config.config_of(program), config.problem_of(program, PAPER)
    assert config.why_illegal(program, config.problem_of(program, replace(PAPER, **changes)), make(**fields)) is None
    problem = config.problem_of(program, replace(PAPER, **wrong_changes))
    assert words in config.why_illegal(program, problem, make(**wrong_fields))


@dataclass(frozen=True)
class Toy(Config):
    """A config that takes what it is told to."""

    threads: int = 128
    words: int = 0
    smem: int = 0
    widest: int = 0
    blocks: int = 0
    producer: bool = False
    moves_registers: bool = False

    def smem_bytes(self, p):
        return self.smem

    def accumulators(self, p):
        return self.words

    def largest(self, p):
        return self.widest

    def refusal(self, p):
        return None


def fitting(registers: int, smem: int, threads: int) -> int:
    return static.ctas_per_sm(registers, smem, threads, cost.DEVICES["h200"])


@pytest.mark.parametrize("threads", (32, 64, 96, 128, 256, 384))
@pytest.mark.parametrize("producer", (False, True))
def test_registers_at_launch_are_the_most_that_fit(threads, producer):
    """Against the occupancy of what ptxas reports."""
    c = Toy(threads=threads, producer=producer)
    total = threads + 128 * producer
    assert c.total_threads() == total
    for n in range(1, min(8, 2048 // total) + 1):
        each = launch_registers(c, n)
        assert fitting(each, 0, total) >= n and (each == 255 or fitting(each + 8, 0, total) < n)
        assert registers_left(c, n) == each
        moving = replace(c, moves_registers=True)
        if producer and each >= moving.producer_registers:
            left, whole = registers_left(moving, n), each * total - 128 * moving.producer_registers
            assert left % 8 == 0 and left * threads <= whole and (left == 240 or (left + 8) * threads > whole)


def test_an_sm_holds_as_many_ctas_as_registers_and_shared_memory_allow():
    """At most 8; by the registers needed, rounded up to 8, as a program with them would be resident."""
    for threads, words, smem in itertools.product((64, 128, 256), range(0, 200, 7), (0, 20_000, 74_240, 114_000)):
        c = Toy(threads=threads, words=words * threads, smem=smem)
        needed = registers_needed(c, PAPER)
        assert needed == words + 52
        expected = min(8, fitting(needed, smem + 128, threads)) if needed <= 255 else 0
        assert blocks_per_sm(c, PAPER) == expected, c
        assert blocks_per_sm(replace(c, blocks=2), PAPER) == min(2, expected)


def test_what_an_sm_lacks_is_refused_from_the_first_byte_and_register_on():
    assert refused(Toy(smem=232320), PAPER) is None
    assert refused(Toy(smem=232321), PAPER) == "shared memory must be at most 232320 bytes, got 232321"
    assert refused(Toy(words=128 * 203), PAPER) is None
    assert refused(Toy(words=128 * 204), PAPER) == "registers must be at most 255 a thread, got about 256"
    assert refused(Toy(threads=384), PAPER) is None and refused(Toy(threads=48), PAPER).endswith("got 48")
    assert refused(Toy(threads=416), PAPER) == "threads must be 32 to 384 in whole warps, got 416"
    moving = Toy(threads=384, producer=True, moves_registers=True)  # 128 registers at launch
    assert refused(replace(moving, widest=384 * 98), PAPER) is None
    assert refused(replace(moving, widest=384 * 99), PAPER).startswith("registers must be at most 160 a thread")
    assert refused(Toy(blocks=7), PAPER) is None
    assert refused(Toy(blocks=8), PAPER) == "blocks must be 0 or less than the 8 that fit, got 8"


def test_the_spaces_are_as_published_in_order_of_preference():
    """The static table has the configs of each case and program as a plan without a table would try them."""
    published = {}
    with (ROOT / "bench/results/static/h200.csv").open() as file:
        for row in csv.DictReader(file):
            published.setdefault((row["case"], row["program"]), []).append(row["config"])
    assert len(published) > 60
    for (case, program), configs in published.items():
        problem = config.problem_of(program, cases.case(case).problem)
        assert [config.describe(c) for c in config.space(program, problem)] == configs, (case, program)


# Changes of the paper's problem, and the values of the fields of the configs that are left, or that its size asks for.
SPACES = [
    ("hsa_fwd_token", {"D": 16, "S": 16}, [(32, 2), (32, 1)]),
    ("hsa_fwd_token", {"D": 256, "S": 128}, [(128, 1), (64, 1), (32, 1)]),
    ("hsa_decode_split", {"D": 16, "S": 16, "K": 8}, [(32, 2, 1), (32, 1, 1), (32, 2, 8), (32, 1, 8)]),
    ("hsa_decode_split", {"D": 256, "S": 128, "K": 1}, [(128, 1, 1), (64, 1, 1), (32, 1, 1)]),
    ("hsa_fwd_union", {"D": 256, "S": 64}, [(128, 2, 0, 0), (64, 2, 0, 0)]),
    ("hsa_bwd_dkdv_chunk", {"D": 48, "S": 16}, [(64, 64), (128, 64), (32, 64)]),
    ("hsa_combine", {"HQ": 128, "D": 256}, [(256, 1)]),
    ("pairs_count", {"K": 300}, [(1, 256)]),
    ("pairs_place", {"K": 16}, [(8, 64)]),
    ("pairs_place", {"K": 100}, [(8, 128)]),
    ("pairs_place", {"K": 300}, [(8, 256)]),
    ("retrieve_topk", {"D": 256}, [(64, 64, 128, 2)]),
    ("retrieve_topk", {"D": 512}, [(64, 64, 128, 1)]),
    ("retrieve_dlandmarks", {"D": 1024}, [(16, 128)]),
    ("retrieve_split", {"T": 1, "N": 1 << 16}, [(256, 128, 3), (128, 128, 3), (1024, 128, 3)]),
    ("retrieve_split", {"T": 1, "N": 512}, [(128, 128, 3), (256, 128, 3), (1024, 128, 3)]),
]


@pytest.mark.parametrize("program, changes, values", SPACES)
def test_a_problem_off_the_usual_finds_what_fits(program, changes, values):
    """One stage where two do not fit, a lone warp for narrow tiles; the longest ranges that keep the GPU busy."""
    found = config.space(program, config.problem_of(program, replace(PAPER, **changes)))
    assert [astuple(c) for c in found] == values


# What the tuner tries of a program on the paper's problem, by field.
TRIED = {
    "hsa_fwd_token": {"threads": {64, 128}, "num_stages": {1, 2, 3, 4}},
    "hsa_fwd_union": {
        "block_M": {64, 128, 192},
        "num_stages": {1, 2, 3, 4},
        "q_registers": {0, 1},
        "blocks": {0, 1, 2},
    },
    "hsa_fwd_union_sm90a": {"block_M": {128, 192}, "num_stages": {1, 2, 3, 4}, "q_registers": {0, 1}, "blocks": {0}},
    "hsa_fwd_chunk_sm90a": {"num_stages": {1, 2, 3, 4}, "reduce_add": {0, 1}},
    "hsa_fwd_chunk": {"block_M": {64, 128, 192}, "threads": {128, 256}, "reduce_add": {0, 1}},
    "hsa_bwd_chunk": {"block_M": {64, 128, 192}, "threads": {128, 256}, "reduce_add": {0, 1}},
    "hsa_bwd_chunk_sm90a": {"num_stages": {1, 2, 3}, "reduce_add": {0, 1}},
    "hsa_bwd_dkdv_chunk": {"block_M": {64, 128, 192, 256}, "threads": {128, 256}},
    "hsa_combine": {"num_stages": {4, 8}, "threads": {128, 256}},
    "hsa_decode_split": {"threads": {64, 128}, "num_stages": {1, 2, 3, 4}, "num_splits": {1, 8, 64}},
    "union_index": {"block_M": {64, 128, 192}, "threads": {128}},
    "retrieve_split": {"block_N": {128, 256, 1024}, "threads": {128}},
    "retrieve_topk": {"block_M": {64, 128}, "block_N": {64}, "threads": {128, 256}},
}


@pytest.mark.parametrize("program", TRIED)
def test_the_tuner_tries_every_value_of_a_field(program):
    short = program in ("hsa_bwd_chunk", "hsa_bwd_dkdv_chunk")  # whose largest tiles need chunks of 32
    found = config.candidates(program, config.problem_of(program, replace(PAPER, D=64, S=32 if short else 64)))
    assert {name: {getattr(c, name) for c in found} for name in TRIED[program]} == TRIED[program]


def test_the_cpu_target_has_the_tile_that_its_problem_needs():
    """No more rows than a token has, in 16s; both programs of the decode where there is something to split."""
    for G in (1, 16, 40):
        p = replace(cases.on_cpu(PAPER), HQ=G, H=1)
        for program in ("hsa_fwd_chunk", "hsa_bwd_chunk", "hsa_bwd_dkdv_chunk", "selected_bwd_chunk"):
            assert config.default(program, p).block_M == max(16, G)
        for program in ("hsa_fwd_union", "selected_fwd_union", "union_index"):
            assert config.default(program, p).block_M == 64
    splits = {
        (T, K): config.default("hsa_decode_split", replace(cases.on_cpu(PAPER), T=T, K=K)).num_splits
        for T, K in itertools.product((1, 2), (1, 2))
    }
    assert splits == {(1, 1): 1, (1, 2): 2, (2, 1): 1, (2, 2): 1}
    for K, places in ((1, 32), (32, 32), (33, 64), (128, 128)):
        assert config.default("retrieve_split", replace(cases.on_cpu(PAPER), K=K).retrieval()).block_N == places
