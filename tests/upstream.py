"""What the tests of TileLang's own faults share: running a program in the emulator, and the programs here."""

import functools
import importlib.util
from pathlib import Path

import torch
from tilelang import tvm

from hsa_tl import cases
from hsa_tl.kernels_tilelang import compile, config

BF16 = "bfloat16"
N = 64  # rows and columns of a tile
PROBLEM = cases.case("paper-d128").problem


def run(program: tvm.tirx.PrimFunc, *tensors: torch.Tensor) -> str:
    """Runs a program in the emulator; its CUDA source."""
    kernel = compile.compile_ir(program, "cuda")
    kernel(*tensors)
    return kernel.source


def cuda_source(program: tvm.tirx.PrimFunc) -> str:
    return compile.lower_ir(program).kernel_source


@functools.cache
def ours() -> dict[str, str]:
    """The Python source of every program and macro by file name."""
    (folder,) = importlib.util.find_spec("hsa_tl.kernels_tilelang").submodule_search_locations
    return {str(p.relative_to(folder)): p.read_text() for p in Path(folder).rglob("*.py")}


def our_programs() -> list[tuple[str, tvm.tirx.PrimFunc]]:
    """Each program's IR with its first config."""
    problems = {name: config.problem_of(name, PROBLEM) for name in config.PROGRAMS}
    return [(name, compile.build(name, p, config.space(name, p)[0])) for name, p in problems.items()]
