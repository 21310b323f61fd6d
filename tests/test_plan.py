"""The plan of a call: what it predicts and picks, in which order, always the same; and how config= overrides it."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hsa_tl import cases, hsa_attention, selection_overlap
from hsa_tl.autotune import cost, plan
from hsa_tl.impl import tilelang
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import union_chunks
from hsa_tl.problem import Problem
from hsa_tl.testing import make_selection

PAPER = cases.case("paper-d128").problem
H200 = cost.DEVICES["h200"]
ALIKE, SCATTERED = 1.0, 0.0


def choose(direction, problem=PAPER, overlap=plan.OVERLAP, config=None, **options):
    named = json.dumps((config or {}) | {"overlap": overlap})
    return plan.choose(direction, problem, named, **{"device": "h200"} | options)


def names(*args, **options) -> tuple[str, ...]:
    return tuple(name for name, _ in choose(*args, **options).programs)


def test_the_union_is_exact_where_the_selection_is_random_and_linear_where_chunks_are_many():
    """At the middle of the sequence, where a token sees N / 2 chunks."""
    indices = make_selection(1, PAPER.T, 1, PAPER.K, PAPER.S, kind="random", seed=0)
    middle = indices[:, PAPER.T // 2 - 512 : PAPER.T // 2 + 512]
    overlap = selection_overlap(middle)
    assert overlap == pytest.approx(PAPER.K / (PAPER.N / 2), rel=0.05)
    for tokens in (4, 8, 12):
        tiles = middle[0, :, 0].unfold(0, tokens, tokens).flatten(1)
        counted = sum(len(row[row >= 0].unique()) for row in tiles) / len(tiles)
        assert union_chunks(PAPER, tokens, overlap) * PAPER.K == pytest.approx(counted, rel=0.05)
        assert union_chunks(PAPER, tokens, 1.0) == 1
        long = cases.at_length(PAPER, 1 << 26)
        assert union_chunks(long, tokens, 0.8) == pytest.approx(1 + 0.2 * (tokens - 1), rel=0.01)
        assert union_chunks(replace(PAPER, K=PAPER.N), tokens, 0.0) == 1, "all of them"


def test_alike_selections_take_the_union_tile():
    for T in (4096, 16384, 1 << 20):
        assert names("forward", cases.at_length(PAPER, T), ALIKE) == ("hsa_fwd_union_sm90a",)
    assert names("forward") == ("hsa_fwd_union_sm90a",), "what trained models show"


def test_scattered_selections_of_long_contexts_take_the_chunk_programs():
    for T in (1 << 17, 1 << 20):
        assert names("forward", cases.at_length(PAPER, T), SCATTERED) == ("hsa_fwd_chunk_sm90a",)
        assert names("backward", cases.at_length(PAPER, T), SCATTERED) == ("hsa_bwd_chunk_sm90a",)


def test_a_shape_without_a_strategy_falls_to_one_that_has_configs():
    assert names("backward", replace(PAPER, D=256)) == ("hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk")
    with pytest.raises(NotImplementedError, match=r"hsa_fwd_token or .* or hsa_fwd_chunk has no config for"):
        choose("forward", replace(PAPER, D=40))


@pytest.mark.parametrize("direction", ("forward", "backward", "selected_backward"))
def test_deterministic_never_takes_reduce_add(direction):
    slow = replace(H200, hbm=1e11, l2_bytes=1e12, l2=1e12, reduce=1e14)  # where reduce-add would win
    problem = cases.at_length(PAPER, 1 << 17)
    for deterministic in (False, True):
        made = plan.predicted(plan.strategies(direction), problem, SCATTERED, deterministic, slow)
        assert any(getattr(c, "reduce_add", 0) for _, c in made.programs) != deterministic


def test_deterministic_reaches_the_forward(monkeypatch):
    """hsa_attention(deterministic=True) may not run what adds atomically, in either direction."""
    asked = []
    monkeypatch.setattr(tilelang.plan, "choose", lambda *x, run=plan.choose: asked.append(x) or run(*x))
    q = torch.zeros(1, 16, 2, 16, requires_grad=True)
    kv, weights = torch.zeros(1, 16, 1, 16), torch.ones(1, 16, 1, 1)
    indices = torch.zeros(1, 16, 1, 1, dtype=torch.int32)
    out = hsa_attention(q, kv, kv, weights, indices, chunk_size=16, impl="tilelang", deterministic=True)
    out.sum().backward()
    assert [(x[0], x[3]) for x in asked] == [("forward", True), ("backward", True)]


def test_prediction_counts_a_gpu_that_is_not_full():
    """One CTA a chunk: 64 of them leave half of 132 SMs idle. Where more split a chunk they fill it."""
    for program, least, most in (("hsa_bwd_dkdv_chunk", 1.8, 8.3), ("hsa_bwd_chunk", 1, 1.3)):
        (config, *_) = configs.space(program, PAPER)
        few, many = (cost.planned_ns(config, cases.at_length(PAPER, T), H200, 0.5) for T in (4096, 1 << 17))
        assert least * many < few < most * many, program


def test_three_thousand_calls_in_mixed_order_get_the_same_plans(monkeypatch):
    """What was called before says nothing; and only the first of a class does more than a look-up."""
    random.seed(0)
    bases = [cases.case(name).problem for name in ("paper-d128", "k16-d64", "g4")]
    calls = [
        (direction, cases.at_length(base, T), json.dumps({"overlap": overlap}), deterministic, "h200")
        for direction in plan.DIRECTIONS
        for base in bases
        for T in (4096, 5000, 1 << 17)
        for overlap in (0.0, 0.9)
        for deterministic in (False, True)
    ]
    plan.clear()
    first = {call: plan.choose(*call) for call in reversed(calls)}
    plan.clear()
    classes = len({(d, p.bucketed(), *rest) for d, p, *rest in calls})
    for call in random.choices(calls, k=3000):
        assert plan.choose(*call) == first[call]
    assert plan._choose.cache_info().misses == classes
    monkeypatch.setattr(cost, "planned_ns", None)
    assert all(plan.choose(*call) is plan.choose(*call) for call in calls)


def test_config_names_the_strategy():
    cpu = cases.on_cpu(PAPER)
    chosen = choose("forward", cpu, config={"hsa_fwd_union": {"block_M": 128}})
    assert [(name, c.block_M) for name, c in chosen.programs] == [("hsa_fwd_union", 128)] and chosen.origin == "caller"
    assert names("forward", config={"hsa_fwd_token": {}}) == ("hsa_fwd_token",)
    (token, threads), (other, _) = choose("backward", config={"hsa_bwd_dq_token": {"threads": 64}}).programs
    assert (token, threads.threads, other) == ("hsa_bwd_dq_token", 64, "hsa_bwd_dkdv_chunk")


def test_the_cpu_target_runs_the_first_strategy():
    for direction in plan.DIRECTIONS:
        assert names(direction, cases.on_cpu(PAPER)) == plan.strategies(direction)[0]


@pytest.mark.parametrize(
    "config, words",
    [
        ({"nonsense": {}}, "config must name programs among hsa_fwd_token"),
        ({"hsa_fwd_token": {}, "hsa_fwd_union": {}}, "config must name one strategy for the forward"),
        ({"hsa_fwd_chunk": {"reduce_add": 1}}, "config must have reduce_add=0 with deterministic=True, got 1"),
        ({"hsa_fwd_token": {"warps": 4}}, r"must have fields among threads, num_stages, got \['warps'\]"),
        ({"hsa_fwd_token": {"threads": 96}}, "config of hsa_fwd_token must suit"),
    ],
)
def test_a_bad_config_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        choose("forward", config=config, deterministic=True)


GPUS = {
    0: ("NVIDIA H100 80GB HBM3", 132, "h100"),
    1: ("NVIDIA H200", 132, "h200"),
    2: ("NVIDIA H100 PCIe", 114, "h100"),
    3: ("NVIDIA GH200 480GB", 132, None),
    4: ("NVIDIA H20", 78, None),
}


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: GPUS[index or 0][0])
    properties = {i: SimpleNamespace(name=name, multi_processor_count=sms) for i, (name, sms, _) in GPUS.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: properties[index or 0])
    cost.device_here.cache_clear(), plan.clear()
    yield
    cost.device_here.cache_clear(), plan.clear()


@pytest.mark.parametrize("index", GPUS)
def test_the_device_is_the_tensors_and_known_by_its_whole_name(gpus, index, recwarn):
    """A GH200 is no H200, an H20 no H100: they say what they borrow. The SMs are counted."""
    name, sms, known = GPUS[index]
    assert cost.device_name(index) == known
    device = cost.device_here(index)
    assert (device.name, device.sms) == (known or "h100", sms)
    said = [str(w.message) for w in recwarn]
    assert said == ([] if known else [
        f"{name} has no constants of its own in hsa_tl/autotune/devices: programs are chosen by those of h100 "
        f"with {sms} SMs"
    ])  # fmt: skip
    plan.choose("forward", replace(PAPER, device_index=index))
    assert plan._choose.cache_info().currsize == 1


def test_decode_fills_the_sms_that_there_are(gpus):
    from hsa_tl.impl.tilelang_decode import chosen_config

    problem = Problem(B=1, T=1, N=1 << 14, HQ=16, H=1, D=128, S=64, K=512)
    few, many = (chosen_config(replace(problem, device_index=i), "hsa_decode_split") for i in (4, 0))
    assert (few.num_splits, many.num_splits) == (256, 512)
