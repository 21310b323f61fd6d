"""`hsa-tl bench roofline`: what this device reaches at best, measured: a matrix product, a copy of memory."""

import torch

from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.problem import Problem

COPIED_BYTES = 1 << 30


class Roofline(Suite):
    """T is the side of the square matrices, in the problem's dtype; a copy moves COPIED_BYTES whatever T."""

    name = "roofline"
    modes = ("rate",)
    default_modes = modes
    cpu_lengths, cuda_lengths = "2k", "8k"

    def known(self):
        return ("matmul", "copy")

    def default(self, device_type):
        return self.known()

    def kernel(self, name):
        return "roofline"

    def unavailable(self, name, problem, mode):
        return None

    def gate_problem(self, problem):
        return self.problem(problem, 256)

    def gate(self, name, problem):
        inputs = self.inputs(problem, "random")
        actual = self.call(name, problem, inputs, "rate")()
        if name == "copy":
            return None if torch.equal(actual, inputs[2]) else "the copy differs"
        a, b = inputs[:2]
        return next(iter(complaints("product", actual, expect(torch.matmul, a, b, out=a.dtype))), None)

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

    def label(self, p):
        return p.dtype_name
