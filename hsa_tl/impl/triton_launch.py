"""How the Triton kernels, which are plain functions, are launched: compiled for CUDA, interpreted for CPU tensors."""

import functools
import threading
import types
from pathlib import Path

import torch

from hsa_tl.files import writable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A new length must not compile again, not even when it becomes divisible by 16 or 1.
LENGTHS = ("T", "N", "splits")

# The interpreter replaces functions of triton.language for the whole process while it runs, and keeps the current
# program in a global: two launches at once would compute each other's addresses, and one that compiles would see them.
_ONE_LAUNCH = threading.RLock()


def unavailable(problem) -> str | None:
    """Why no Triton kernel can run `problem` here, whatever it computes; None if one can."""
    if triton is None:
        return "triton is not installed"
    if problem.device_type == "cpu":
        return None if problem.dtype == torch.float32 else "the interpreter runs float32 only"
    if problem.device_type != "cuda":
        return f"it runs on cuda and cpu tensors, not on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return "it runs bfloat16, float16 and float32"
    if not torch.cuda.is_available():
        return "no CUDA device is present"
    if torch.cuda.get_device_capability(problem.device_index) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def piece(function):
    """Makes a function one that kernels may call."""
    return triton.jit(function) if triton else function


@functools.cache
def form(kernel, interpreted: bool):
    """A kernel to launch: interpreted for CPU tensors, compiled for CUDA, both in one process."""
    if not interpreted:
        if (folder := str(writable(Path(triton.knobs.cache.dir), "TRITON_CACHE_DIR"))) != triton.knobs.cache.dir:
            triton.knobs.cache.dir = folder
        names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
        return triton.jit(kernel, do_not_specialize=[x for x in names if x in LENGTHS])
    from triton.runtime.interpreter import InterpretedFunction

    # On a copy with its own globals: the interpreter adds its names to the globals of what it rewrites. It runs the
    # kernel as Python, so a piece is the plain function there.
    jitted = triton.runtime.jit.JITFunction
    names = {name: x.fn if isinstance(x, jitted) else x for name, x in kernel.__globals__.items()}
    copy = types.FunctionType(kernel.__code__, names, kernel.__name__)
    copy.__annotations__ = kernel.__annotations__
    return InterpretedFunction(copy)


def launch(kernel, grid, *args, **constants):
    interpreted = args[0].device.type == "cpu" or triton.knobs.runtime.interpret
    with _ONE_LAUNCH, torch.cuda.device_of(args[0]):
        form(kernel, interpreted)[grid](*args, **constants, enable_fp_fusion=True)
