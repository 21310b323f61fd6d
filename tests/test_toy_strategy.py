"""The toy strategy of CONTRIBUTING.md, built from the text that stands there: a file and a line register a program."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from strategies import Dims, make_call

from hsa_tl import cases, hsa_attention
from hsa_tl.autotune import cost, plan
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.testing import assert_attention

TOY = "hsa_fwd_toy"
PAPER = cases.case("paper-d64").problem


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registered as the diff says, in a module outside the package."""
    (diff,) = re.findall(
        r"```diff\n(.*?)```", (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    registered, program = diff.split("+++ b/kernels_tilelang/hsa_fwd_toy.py\n")
    name, launcher = re.search(r'\+    "(\w+)": "(\w+)",', registered).groups()
    file = tmp_path / f"{name}.py"
    file.write_text("".join(line[1:] + "\n" for line in program.splitlines()))
    spec = importlib.util.spec_from_file_location(f"hsa_tl.kernels_tilelang.{name}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(config.PROGRAMS, name, launcher)
    plan.strategies.cache_clear(), plan.clear()
    yield
    plan.strategies.cache_clear(), plan.clear()


def test_it_runs_by_name(toy):
    """Through the operator, with empty slots, duplicates, padded rows, and a short last chunk."""
    call = make_call(Dims(T=20, T_kv=41, per_head=True))
    out = hsa_attention(*call[:5], chunk_size=16, impl="tilelang", config={TOY: {}})
    assert_attention({"out": out}, call, chunk_size=16)


def test_plans_and_tuner_have_it(toy):
    assert (TOY,) in plan.strategies("forward") and TOY in config.tuned()
    (candidate,) = config.space(TOY, PAPER)
    assert candidate in config.candidates(TOY, PAPER)
    assert cost.planned_ns(candidate, PAPER, cost.DEVICES["h200"], 0.9) > 0
    assert plan.choose("forward", PAPER, '{"hsa_fwd_toy": {}}', device="h200").programs == ((TOY, candidate),)


def test_it_lowers_for_hopper(toy):
    assert TOY in compile.lower(TOY, PAPER, config.default(TOY, PAPER)).kernel_source


def test_it_is_gone():
    with pytest.raises(ValueError, match="config must name programs among hsa_fwd_token"):
        hsa_attention(*make_call(Dims())[:5], chunk_size=16, impl="tilelang", config={TOY: {}})
