"""How the Triton kernels, which are plain functions, are launched: compiled for CUDA, interpreted for CPU tensors."""

import functools
import types

import torch

try:
    import triton
except ImportError:
    triton = None

# A new length must not compile again, not even when it becomes divisible by 16 or 1.
LENGTHS = ("T", "N", "splits", "past", "past_rest", "outside", "outside_rest")


@functools.cache
def form(kernel, interpreted: bool):
    """A kernel to launch: interpreted for CPU tensors, compiled for CUDA, both in one process."""
    if not interpreted:
        names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
        return triton.jit(kernel, do_not_specialize=[x for x in names if x in LENGTHS])
    from triton.runtime.interpreter import InterpretedFunction

    # On a copy with its own globals: the interpreter adds its names to the globals of what it rewrites.
    copy = types.FunctionType(kernel.__code__, dict(kernel.__globals__), kernel.__name__)
    copy.__annotations__ = kernel.__annotations__
    return InterpretedFunction(copy)


def launch(kernel, grid, *args, **constants):
    interpreted = args[0].device.type == "cpu" or triton.knobs.runtime.interpret
    with torch.cuda.device_of(args[0]):
        form(kernel, interpreted)[grid](*args, **constants, enable_fp_fusion=True)
