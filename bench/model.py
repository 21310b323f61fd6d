"""`hsa-tl bench model`: a training step, a prefill and a generated token of the model, beside it with full attention.

The case is a preset of hsa_tl.model. "hsa" and its baselines ("full-attention", "swa") are one code and one config but
for `attention`, and so have no chunk encoder; "full-matched" has a layer for it, as many parameters as HSA. Weights and
tokens are random, which changes no cost but the selection's overlap.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import torch

from hsa_tl import cases
from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench.attention import scored_chunks
from hsa_tl.bench.contenders import deeper
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.cases import Case
from hsa_tl.model import Model, ModelConfig, baseline, preset
from hsa_tl.model.config import PRESETS
from hsa_tl.model.generate import prefill
from hsa_tl.problem import Problem

ATTENTIONS = {"hsa": "hsa", "full-attention": "full", "full-matched": "full", "swa": "swa"}
LEARNING_RATE = 1e-4
ROOM = 1024  # tokens that may be generated before the cache grows


@functools.cache
def config_of(name: str, config: ModelConfig) -> ModelConfig:
    """What the model of one of ATTENTIONS is. ValueError: full attention cannot have as many parameters."""
    other = baseline(config, ATTENTIONS[name])
    return dataclasses.replace(other, **deeper(config)) if name == "full-matched" else other


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
            self.models[name] = Model(config_of(name, self.config)).to(self.problem.device_type)
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
        return self.cast()(lambda: prefill(model, self.ids))

    def generate(self, name: str):
        """Every call appends one token."""
        model = self.model(name).eval()
        _, cache = self.cast()(prefill)(model, self.ids[:, :-1], room=ROOM)
        return self.cast()(lambda: model(self.ids[:, -1:], cache=cache, logits_to_keep=1).logits)


@functools.cache
def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of "output", "encoder" and each layer by its index; not the embeddings, which no product reads."""
    with torch.device("meta"):
        model = Model(config)
    out: dict[str, int] = {}
    for name, x in model.named_parameters():
        part = name.split(".")[1 if name.startswith("layers.") else 0]
        out[part] = out.get(part, 0) + math.prod(x.shape)
    out.pop("embedding")
    return out | {"output": config.dim * config.vocab_size}  # which may be the embeddings


def _window_pairs(T: int, window: int) -> int:
    """(token, key) pairs of T tokens that see `window` keys up to their own."""
    w = min(T, window)
    return T * w - w * (w - 1) // 2


class ModelBench(Suite):
    name = "model"
    providers: ClassVar = {n: f"{attention}_attention_model" for n, attention in ATTENTIONS.items()}
    modes = ("step", "read", "generate")
    cpu_lengths, cuda_lengths = "1k..32k", "4k..512k"
    default_case = "tiny"
    multiple_of_chunk = True

    def find_case(self, name):
        """The preset's attention. ValueError: no such preset, or one that has no fixed top-k."""
        c = preset(name)
        if not isinstance(c.topk, int):
            raise ValueError(f"preset must have an int topk, got {c.topk!r} in {name}")
        p = Problem(1, c.chunk_size, 1, c.heads, c.kv_heads, c.head_dim, c.chunk_size, c.topk)
        return Case(name, p, frozenset(), "a preset of the model")

    def config(self, p: Problem) -> ModelConfig:
        """The preset whose dims these are."""
        dims = (p.HQ, p.H, p.D, p.S, p.K)
        return next(c for c in PRESETS.values() if (c.heads, c.kv_heads, c.head_dim, c.chunk_size, c.topk) == dims)

    def unavailable(self, name, problem, mode):
        try:
            config_of(name, self.config(problem))
        except ValueError as error:
            return str(error)

    def gate_problem(self, problem):
        return cases.at_length(problem, 16 * problem.S)

    def gate(self, name, problem):
        """Loss, every gradient and the logits of a cached decode against one forward of the same model in float64."""
        p = problem
        pair = Pair(p, self.config(p))
        own = pair.model(name).eval()
        exact = Model(dataclasses.replace(own.config, impl="reference")).to(p.device_type).double().eval()
        exact.load_state_dict(own.state_dict())

        def results(model):
            logits, loss, _ = model(pair.ids, labels=pair.ids)
            named = list(model.named_parameters())
            gradients = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
            found = {"loss": loss.detach(), "logits": logits[:, -1:].detach()}
            return found | {n: g for (n, _), g in zip(named, gradients, strict=True) if g is not None}

        actual = pair.cast()(results)(own)
        actual["logits"] = pair.generate(name)()
        wanted = expect(lambda: results(exact), dtype=p.dtype)
        return [line for n, x in actual.items() for line in complaints(n, x, wanted[n])]

    def inputs(self, problem, selection):
        return Pair(problem, self.config(problem))

    def call(self, name, problem, inputs, mode):
        return getattr(inputs, mode)(name)

    def work(self, name, problem, mode):
        """Matrix products with parameters, and attention by kind of layer, of the tokens that each layer runs on."""
        p, c = problem, config_of(name, self.config(problem))
        upper, ends_in_windows = c.layers - c.lower_layers, c.attention in ("hsa", "swa")
        # A prefill's upper decoder runs on what its last token can look back to; see hsa_tl.model.cache.
        tail = min(p.T, upper * (c.window - 1) + 1) if mode == "read" and ends_in_windows else p.T
        flops = moved = 0
        for part, count in parameters(c).items():
            tokens = tail if part.isdecimal() and int(part) >= c.lower_layers else p.T
            tokens = 1 if mode == "generate" or (part == "output" and mode == "read") else tokens
            flops += (6 if mode == "step" else 2) * count * tokens
            moved += 4 * count
        per_pair = (14 if mode == "step" else 4) * p.HQ * p.D  # two products forward, five backward
        for i, kind in enumerate(c.kinds):
            tokens = 1 if mode == "generate" else tail if i >= c.lower_layers else p.T
            before, window = p.T - tokens, p.T if kind == "full" else c.window
            flops += per_pair * (_window_pairs(p.T, window) - _window_pairs(before, window))
            held = 2 * p.H * p.D * min(window, p.T)
            if kind == "hsa":
                first, all_ = (cases.at_length(p, n) for n in (before, p.T))
                flops += per_pair * p.S * (all_.pairs - first.pairs) // p.H
                scores = scored_chunks(all_) - scored_chunks(first)
                flops += 2 * c.retrieval_heads * c.retrieval_dim * scores
                held += p.N * c.retrieval_heads * c.retrieval_dim + 2 * p.H * p.D * p.S * min(p.K, p.N)
            moved += held * p.itemsize if mode == "generate" else 0
        # A token that ends a chunk is none of those timed, or too few of them to move the median.
        rare = mode == "generate" and c.attention == "hsa"
        note = f"the chunk encoder, which runs once in {p.S} tokens, is not in the median" if rare else ""
        # AdamW: two moments and the parameter, both ways.
        return Work(flops, moved * (7 if mode == "step" else 1), note=note)

    def label(self, p):
        c = self.config(p)
        return f"dim={c.dim} layers={c.layers} {self.dims.format(p=p)} window={c.window} {p.dtype_name}"
