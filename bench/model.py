"""`hsa-tl bench model`: a training step, a prefill and a generated token of the model, beside it with full attention.

The case is a preset of hsa_tl.model. "hsa" and its baselines ("full-attention", "swa") are one code and one config but
for `attention`; weights and tokens are random, which changes no cost but the selection's overlap.
"""

import copy
import dataclasses
import functools
import math

import torch

from hsa_tl.bench.attention import flops_of
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.cases import Case
from hsa_tl.model import Model, ModelConfig, baseline, preset
from hsa_tl.model.config import PRESETS
from hsa_tl.problem import Problem
from hsa_tl.testing import assert_as_accurate_as

ATTENTIONS = {"hsa": "hsa", "full-attention": "full", "swa": "swa"}
LEARNING_RATE = 1e-4


def model_case(name: str) -> Case:
    """The preset's attention as a case. ValueError: no such preset, or one that has no fixed top-k."""
    c = preset(name)
    if not isinstance(c.topk, int):
        raise ValueError(f"preset must have an int topk, got {c.topk!r} in {name}")
    p = Problem(1, c.chunk_size, 1, c.heads, c.kv_heads, c.head_dim, c.chunk_size, c.topk)
    return Case(name, p, frozenset(), "a preset of the model")


class Pair:
    """Tokens of one length, and a model of each attention when it is first asked for."""

    def __init__(self, problem: Problem, config: ModelConfig):
        self.problem, self.config = problem, config
        self.models: dict[str, Model] = {}
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (1, problem.T), generator=g).to(problem.device_type)

    def model(self, name: str) -> Model:
        if name not in self.models:
            torch.manual_seed(0)
            self.models[name] = Model(baseline(self.config, ATTENTIONS[name])).to(self.problem.device_type)
        return self.models[name]

    def cast(self):
        """bfloat16 arithmetic on CUDA, float32 on a CPU; parameters are float32."""
        p = self.problem
        return torch.autocast(p.device_type, p.dtype, enabled=p.dtype != torch.float32)

    def step(self, name: str):
        model = self.model(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

        def run(ids=self.ids):
            optimizer.zero_grad(set_to_none=True)
            with self.cast():
                loss = model(ids, labels=ids, logits_to_keep=0).loss
            loss.backward()
            optimizer.step()

        run(self.ids[:, : 2 * self.problem.S])  # AdamW's state is there before memory is measured
        return run

    def read(self, name: str):
        model = self.model(name).eval()

        @torch.no_grad()
        def run():
            with self.cast():
                return model(self.ids, logits_to_keep=1).logits

        return run

    def generate(self, name: str):
        model = self.model(name).eval()

        @torch.no_grad()
        def run(ids=self.ids[:, -1:]):
            with self.cast():
                run.cache = model(ids, cache=run.cache, logits_to_keep=1).cache

        run.cache = model.new_cache(1)
        run(self.ids)  # the prompt; every call after it appends one token
        return run


@functools.cache
def parameters(config: ModelConfig) -> int:
    """Parameters but the embeddings, which no product reads."""
    with torch.device("meta"):
        model = Model(config)
    return sum(math.prod(x.shape) for n, x in model.named_parameters() if not n.startswith("embedding"))


class ModelBench(Suite):
    name = "model"
    modes = ("step", "read", "generate")
    default_modes = modes
    cpu_lengths, cuda_lengths = "1k..32k", "4k..512k"
    default_case = "tiny"
    multiple_of_chunk = True

    def known(self):
        return tuple(ATTENTIONS)

    def default(self, device_type):
        return self.known()

    def kernel(self, name):
        return f"{ATTENTIONS[name]}_attention_model"

    def find_case(self, name):
        return model_case(name)

    def config(self, p: Problem) -> ModelConfig:
        """The preset whose dims these are."""
        dims = (p.HQ, p.H, p.D, p.S, p.K)
        return next(c for c in PRESETS.values() if (c.heads, c.kv_heads, c.head_dim, c.chunk_size, c.topk) == dims)

    def unavailable(self, name, problem, mode):
        if mode == "generate" and not hasattr(Model, "new_cache"):
            return "hsa_tl.model.Model has no new_cache: it does not decode"
        return None

    def gate_problem(self, problem):
        return self.problem(problem, 16 * problem.S)

    def gate(self, name, problem):
        """Loss and every gradient against the same model in float64, by the reference operators."""
        p = problem
        pair = Pair(p, self.config(p))
        own = pair.model(name).eval()
        low = Model(dataclasses.replace(own.config, impl="reference")).to(p.device_type).eval()
        low.load_state_dict(own.state_dict())
        results = []
        for model, cast in ((own, pair.cast()), (low, pair.cast()), (copy.deepcopy(low).double(), pair.cast())):
            precise = next(model.parameters()).dtype == torch.float64
            with torch.autocast(p.device_type, enabled=False) if precise else cast:
                loss = model(pair.ids, labels=pair.ids).loss
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            values = [loss.detach(), *(x.flatten() for x in gradients if x is not None)]
            results.append((values[0], torch.cat(values[1:])))
        try:
            for what, actual, cheap, high in zip(("loss", "gradient"), *results, strict=True):
                assert_as_accurate_as(what, actual, cheap.to(actual.dtype), high)
        except AssertionError as error:
            return str(error)
        return None

    def inputs(self, problem, selection):
        return Pair(problem, self.config(problem))

    def call(self, name, problem, inputs, mode):
        return getattr(inputs, mode)(name)

    def work(self, name, problem, mode):
        """Matrix products with parameters, and attention by kind of layer."""
        c = baseline(self.config(problem), ATTENTIONS[name])
        count = parameters(c)
        tokens = 1 if mode == "generate" else problem.T
        directions = ("forward", "backward") if mode == "step" else ("forward",)
        flops = 2 * count * tokens * (3 if mode == "step" else 1)
        cache = 0
        for kind in c.kinds:
            window = problem.T if kind == "full" else min(c.window, problem.T)
            pairs = window if mode == "generate" else problem.T * window - window * (window - 1) // 2
            flops += sum({"forward": 4, "backward": 10}[d] * problem.HQ * problem.D * pairs for d in directions)
            cache += 2 * problem.H * problem.D * window * problem.itemsize
            if kind == "hsa" and mode == "generate":
                flops += 2 * problem.N * c.retrieval_heads * c.retrieval_dim
                flops += 4 * problem.HQ * problem.D * problem.S * min(problem.K, problem.N)
                cache += problem.N * c.retrieval_heads * c.retrieval_dim * problem.itemsize
            elif kind == "hsa":
                flops += sum(flops_of("hsa_with_retrieval", problem, d) for d in directions)
        moved = count * 4 * (7 if mode == "step" else 1)  # AdamW reads and writes two moments and the parameter
        return Work(flops, moved + (cache if mode == "generate" else 0))

    def label(self, p):
        c = self.config(p)
        dims = f"HQ={p.HQ} H={p.H} D={p.D} S={p.S} K={p.K}"
        return f"dim={c.dim} layers={c.layers} {dims} window={c.window} {p.dtype_name}"
