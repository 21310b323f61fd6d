"""What this device reaches at best, measured by programs that do nothing else.

`hsa-tl bench roofline`: a matrix product, a copy of memory. `hsa-tl bench micro`: on Hopper, what the cost model's
constants stand for.
"""

import functools
from typing import ClassVar

import torch

from hsa_tl import cases
from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.impl.tilelang import targeted, unavailable
from hsa_tl.problem import Problem

COPIED_BYTES = 1 << 30
BLOCK = 64  # rows of a tile, as in kernels_tilelang/micro.py


class Roofline(Suite):
    """T is the side of the square matrices, in the problem's dtype; a copy moves COPIED_BYTES whatever T."""

    name = "roofline"
    providers: ClassVar = {"matmul": "roofline", "copy": "roofline"}
    modes = ("rate",)
    cpu_lengths, cuda_lengths = "2k", "8k"
    dims = ""

    def gate_problem(self, problem):
        return cases.at_length(problem, 256)

    def gate(self, name, problem):
        inputs = self.inputs(problem, "random")
        actual = self.call(name, problem, inputs, "rate")()
        if name == "copy":
            return [] if torch.equal(actual, inputs[2]) else ["the copy differs"]
        a, b = inputs[:2]
        return complaints("product", actual, expect(torch.matmul, a, b, out=a.dtype))

    def inputs(self, p: Problem, selection):
        g = torch.Generator().manual_seed(0)
        a, b = (torch.randn(p.T, p.T, generator=g).to(p.device_type, p.dtype) for _ in range(2))
        source = torch.ones(COPIED_BYTES // 2 // p.itemsize, dtype=p.dtype, device=p.device_type)
        return a, b, source, source.clone()

    def call(self, name, problem, inputs, mode):
        a, b, source, target = inputs
        return (lambda: a @ b) if name == "matmul" else (lambda: target.copy_(source))

    def work(self, name, p, mode):
        if name == "copy":
            return Work(0, COPIED_BYTES)
        return Work(2 * p.T**3, 3 * p.T**2 * p.itemsize)


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
    """l2-tma, l2-cp-async: reads of random tiles. reduce-add: float32 additions to random tiles. wgmma, mma-sync.

    T tokens are the working set of reads and additions: as many bytes as their keys and values at the case's D and
    dtype, H = 1. The products do not hang on T.
    """

    name = "micro"
    providers: ClassVar = dict.fromkeys(("l2-tma", "l2-cp-async", "reduce-add", "wgmma", "mma-sync"), "roofline")
    modes = ("rate",)
    cpu_lengths, cuda_lengths = "256", "4k,16k,32k,64k,128k,1m"
    dims = "D={p.D}"
    ctas, rounds = 132 * 8, 64  # a multiple of the SMs, some on each at a time

    def unavailable(self, name, problem, mode):
        if problem.device_type == "cpu" and targeted(problem) == problem:
            return "it measures a Hopper GPU"
        return unavailable(problem)

    def gate_problem(self, problem):
        return cases.at_length(problem, 4 * BLOCK)

    def inputs(self, p, selection):
        """Arguments of each program, the last of which it writes; made when first asked for."""

        @functools.cache
        def arguments(name: str) -> list[torch.Tensor]:
            g, device = torch.Generator().manual_seed(0), p.device_type
            if name in ("wgmma", "mma-sync"):
                a, b = (torch.randint(-2, 3, (BLOCK, p.D), generator=g).to(device, p.dtype) for _ in range(2))
                return [a, b, torch.empty(self.ctas, BLOCK, BLOCK, device=device)]
            tiles = max(1, 2 * p.T * p.itemsize // (4 if name == "reduce-add" else p.itemsize) // BLOCK)
            order = torch.randint(tiles, (self.ctas, self.rounds), generator=g, dtype=torch.int32).to(device)
            if name == "reduce-add":
                return [order, torch.zeros(tiles, BLOCK, p.D, device=device)]
            x = torch.randn(tiles, BLOCK, p.D, generator=g).to(device, p.dtype)
            return [x, order, torch.empty(self.ctas, p.D, device=device)]

        return arguments

    def call(self, name, problem, inputs, mode):
        kernel, arguments = kernel_of(name, problem.D, problem.dtype_name, self.rounds), inputs(name)

        def run():
            kernel(*arguments)
            return arguments[-1]

        return run

    def gate(self, name, problem):
        inputs = self.inputs(problem, "random")
        actual = self.call(name, problem, inputs, "rate")().cpu()
        first, second, *_ = (x.cpu() for x in inputs(name))
        if name.startswith("l2"):
            rows = first[second.long(), torch.arange(self.rounds) % BLOCK]
            wanted = expect(lambda x: x.sum(1), rows.double())
        elif name == "reduce-add":
            times = torch.bincount(first.flatten(), minlength=len(actual))[:, None, None].expand(actual.shape)
            wanted = expect(lambda x: x * 1, times.double())
        else:
            products = lambda a, b: (self.rounds * (a @ b.T)).expand(actual.shape)  # noqa: E731
            wanted = expect(products, first.double(), second.double())
        return complaints(name, actual, wanted)

    def work(self, name, p, mode):
        each = self.ctas * self.rounds * BLOCK * p.D
        if name in ("wgmma", "mma-sync"):
            return Work(2 * BLOCK * each, 0)
        return Work(0, each * (4 if name == "reduce-add" else p.itemsize))
