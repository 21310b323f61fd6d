"""The rule that chooses the programs: what it measures, what it picks, and how config= overrides it."""

from dataclasses import replace

import pytest
import torch

from hsa_tl import cases
from hsa_tl.autotune import cost, strategy
from hsa_tl.testing import make_selection

PAPER = cases.case("paper-d128").problem
H200 = cost.DEVICES["h200"]
AGREE = {block_M: 1 / (block_M // 16) for block_M in strategy.BLOCKS}
SCATTERED = dict.fromkeys(strategy.BLOCKS, 1.0)


def _names(direction: str, problem, share, **options) -> tuple[str, ...]:
    return tuple(name for name, _ in strategy.choose(direction, problem, share, H200, **options))


def test_union_share_counts_distinct_chunks():
    """16 tokens in tiles of 4, 8 and 12: every tile is sampled, so the count is exact."""
    indices = torch.full((1, 16, 1, 3), -1, dtype=torch.int32)
    indices[0, :, 0, 0] = 5
    indices[0, :, 0, 1] = torch.arange(16)
    share = strategy.union_share(indices, 16, G=16)
    for block_M in strategy.BLOCKS:
        tile = block_M // 16
        tiles = [set(range(i, i + tile)) | {5} for i in range(16 - tile + 1)]
        assert share[block_M] == pytest.approx(sum(map(len, tiles)) / (2 * tile * len(tiles)))


def test_random_share_is_what_a_random_selection_has():
    indices = make_selection(1, PAPER.T, 1, PAPER.K, PAPER.S, kind="random", seed=0)
    middle = indices[:, PAPER.T // 2 - 512 : PAPER.T // 2 + 512]
    measured, expected = strategy.union_share(middle, PAPER.N, 16), strategy.random_share(PAPER)
    for block_M in strategy.BLOCKS:
        assert measured[block_M] == pytest.approx(expected[block_M], rel=0.05)


def test_agreement_takes_the_union_tile():
    for T in (4096, 16384, 1 << 20):
        assert _names("forward", cases.at_length(PAPER, T), AGREE) == ("hsa_fwd_union",)


def test_scattered_selections_of_long_contexts_take_the_chunk_programs():
    for T in (1 << 17, 1 << 20):
        assert _names("forward", cases.at_length(PAPER, T), SCATTERED) == ("hsa_fwd_chunk",)
        assert _names("backward", cases.at_length(PAPER, T), SCATTERED) == ("hsa_bwd_chunk",)


def test_the_more_tokens_agree_the_larger_the_tile():
    """Tiles of more tokens reread less, and pay for it when their union grows."""
    blocks = [strategy.choose("forward", PAPER, share, H200)[0] for share in (AGREE, {64: 0.3, 128: 0.3, 192: 0.3})]
    assert [name for name, _ in blocks] == ["hsa_fwd_union"] * 2
    assert blocks[0][1].block_M > blocks[1][1].block_M


def test_a_shape_without_a_strategy_falls_to_one_that_has_configs():
    wide = replace(PAPER, D=256)
    assert _names("backward", wide, SCATTERED) == ("hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk")


def test_deterministic_never_takes_reduce_add():
    slow_memory = replace(H200, hbm=1e11, reduce=1e14)  # where reduce-add would win
    for direction in ("forward", "backward"):
        (_, config), *_ = strategy.choose(direction, PAPER, SCATTERED, slow_memory)
        assert config.reduce_add == 1
        (_, config), *_ = strategy.choose(direction, PAPER, SCATTERED, slow_memory, deterministic=True)
        assert getattr(config, "reduce_add", 0) == 0


def test_deterministic_passes_over_a_tuned_row_with_reduce_add(monkeypatch):
    adding = {"specialised": 0, "block_M": 64, "threads": 128, "num_stages": 1, "reduce_add": 1}
    monkeypatch.setattr(strategy.table, "device_name", lambda: "h200")
    row = {"config": adding}
    monkeypatch.setattr(strategy.table, "lookup", lambda name, *_: row if name == "hsa_bwd_chunk" else None)
    share = {"union_share": SCATTERED}
    problem = cases.at_length(PAPER, 1 << 17)
    ((name, config),) = strategy.programs("backward", problem, INDICES, share)
    assert name == "hsa_bwd_chunk" and config.reduce_add == 1
    ((name, config),) = strategy.programs("backward", problem, INDICES, share, deterministic=True)
    assert name == "hsa_bwd_chunk" and config.reduce_add == 0


def test_expected_time_counts_a_gpu_that_is_not_full():
    """One CTA a chunk: 64 of them leave half of 132 SMs idle."""
    (config, *_) = strategy.configs.space("hsa_bwd_chunk", PAPER)
    few, many = (strategy.expected_ns(cases.at_length(PAPER, T), config, SCATTERED, H200) for T in (4096, 1 << 17))
    assert few > 1.8 * many


INDICES = torch.zeros(1, 1, 1, 1, dtype=torch.int32)


def test_config_names_the_strategy():
    chosen = strategy.programs("forward", cases.on_cpu(PAPER), INDICES, {"hsa_fwd_union": {"block_M": 128}})
    assert [(name, c.block_M) for name, c in chosen] == [("hsa_fwd_union", 128)]
    (named,) = strategy.programs("forward", PAPER, INDICES, {"hsa_fwd_token": {}})
    assert named == ("hsa_fwd_token", strategy.configs.space("hsa_fwd_token", PAPER)[0])
    two = strategy.programs("backward", PAPER, INDICES, {"hsa_bwd_dq_token": {"threads": 64}})
    assert [name for name, _ in two] == ["hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk"] and two[0][1].threads == 64


def test_config_gives_the_share():
    share = {"union_share": {str(block_M): value for block_M, value in AGREE.items()}}  # as JSON has it
    (chosen,) = strategy.programs("forward", PAPER, INDICES, share)
    assert chosen[0] == "hsa_fwd_union"


def test_without_a_gpu_the_first_strategy_runs():
    for direction, (first, *_) in strategy.STRATEGIES.items():
        chosen = strategy.programs(direction, cases.on_cpu(PAPER), INDICES, None)
        assert tuple(name for name, _ in chosen) == first


@pytest.mark.parametrize(
    "config, words",
    [
        ({"nonsense": {}}, "config must name programs among hsa_fwd_token"),
        ({"hsa_fwd_token": {}, "hsa_fwd_union": {}}, "config must name one strategy for the forward"),
        ({"hsa_fwd_chunk": {"reduce_add": 1}}, "config must have reduce_add=0 with deterministic=True, got 1"),
    ],
)
def test_a_bad_config_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        strategy.programs("forward", PAPER, INDICES, config, deterministic=True)
