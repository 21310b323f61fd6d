"""`hsa-tl bench micro`: what the cost model's constants stand for, each measured by a program that does nothing else.

T tokens are the working set of reads and additions: as many bytes as their keys and values at the case's D and dtype,
H = 1. The products do not hang on T.
"""

import functools

import torch

from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.impl.tilelang import targeted, unavailable
from hsa_tl.problem import Problem

CTAS = 132 * 8  # a multiple of the SMs, some on each at a time
ROUNDS = 64
BLOCK = 64  # rows of a tile, as in kernels_tilelang/micro.py


@functools.cache
def kernel_of(name: str, D: int, dtype: str, rounds: int):
    from hsa_tl.kernels_tilelang import compile, micro

    program, *fields = {
        "l2-tma": (micro.read_tiles, D, dtype, rounds, True),
        "l2-cp-async": (micro.read_tiles, D, dtype, rounds, False),
        "reduce-add": (micro.add_tiles, D, rounds),
        "wgmma": (micro.multiply, D, dtype, rounds, 128),
        "mma-sync": (micro.multiply, D, dtype, rounds, 64),
    }[name]
    return compile.compile_ir(program(*fields), "cuda")


class Micro(Suite):
    """l2-tma, l2-cp-async: reads of random tiles. reduce-add: float32 additions to random tiles. wgmma, mma-sync."""

    name = "micro"
    modes = ("rate",)
    default_modes = modes
    cpu_lengths, cuda_lengths = "256", "4k,16k,32k,64k,128k,1m"
    ctas, rounds = CTAS, ROUNDS

    def known(self):
        return ("l2-tma", "l2-cp-async", "reduce-add", "wgmma", "mma-sync")

    def default(self, device_type):
        return self.known()

    def kernel(self, name):
        return "roofline"

    def unavailable(self, name, problem, mode):
        if problem.device_type == "cpu" and targeted(problem) == problem:
            return "it measures a Hopper GPU"
        return unavailable(problem)

    def gate_problem(self, problem):
        return self.problem(problem, 4 * BLOCK)

    def tiles(self, name: str, p: Problem) -> int:
        """Tiles of the working set: keys and values of T tokens, or as many bytes of float32."""
        return max(1, 2 * p.T * p.itemsize // (4 if name == "reduce-add" else p.itemsize) // BLOCK)

    def inputs(self, p, selection):
        g = torch.Generator().manual_seed(0)
        made = {}
        for name in self.known():
            order = torch.randint(self.tiles(name, p), (self.ctas, self.rounds), generator=g, dtype=torch.int32)
            made[name] = [order.to(p.device_type)]
            if name.startswith("l2"):
                x = torch.randn(self.tiles(name, p), BLOCK, p.D, generator=g).to(p.device_type, p.dtype)
                made[name] = [x, *made[name], torch.empty(self.ctas, p.D, device=p.device_type)]
            elif name == "reduce-add":
                made[name].append(torch.zeros(self.tiles(name, p), BLOCK, p.D, device=p.device_type))
            else:
                a, b = (torch.randint(-2, 3, (BLOCK, p.D), generator=g).to(p.device_type, p.dtype) for _ in range(2))
                made[name] = [a, b, torch.empty(self.ctas, BLOCK, BLOCK, device=p.device_type)]
        return made

    def call(self, name, problem, inputs, mode):
        kernel, arguments = kernel_of(name, problem.D, problem.dtype_name, self.rounds), inputs[name]

        def run():
            kernel(*arguments)
            return arguments[-1]

        return run

    def gate(self, name, problem):
        inputs = self.inputs(problem, "random")
        actual = self.call(name, problem, inputs, "rate")().cpu()
        first, second, *_ = (x.cpu() for x in inputs[name])
        if name.startswith("l2"):
            rows = first[second.long(), torch.arange(self.rounds) % BLOCK]
            wanted = expect(lambda x: x.sum(1), rows.double())
        elif name == "reduce-add":
            times = torch.bincount(first.flatten(), minlength=len(actual))[:, None, None].expand(actual.shape)
            wanted = expect(lambda x: x * 1, times.double())
        else:
            wanted = expect(
                lambda a, b: (self.rounds * (a @ b.T)).expand(actual.shape), first.double(), second.double()
            )
        return next(iter(complaints(name, actual, wanted)), None)

    def work(self, name, p, mode):
        each = self.ctas * self.rounds * BLOCK * p.D
        if name in ("wgmma", "mma-sync"):
            return Work(2 * BLOCK * each, 0)
        return Work(0, each * (4 if name == "reduce-add" else p.itemsize))

    def label(self, p):
        return f"D={p.D} {p.dtype_name}"
