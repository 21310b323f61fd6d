"""Runs the CUDA source of a program without a GPU: every thread, copy and tensor-core instruction, and their order.

The CPU target proves a program's tiles; this proves what TileLang makes of them for sm_90a. The generated source is
compiled for the host against hopper.h and run one CTA after another, in bfloat16 or float16. Faults are
reported as compute-sanitizer would on a GPU, and more: races (by vector clocks, so whether or not they show), reads of
what nothing wrote, accesses out of bounds or misaligned, missing fences of the asynchronous proxy and of mbarriers,
waits for stores that promise less than is taken, deadlocks, divergent warp instructions, barriers that two groups
share, wgmma accumulators read too early. Timing is not emulated.

    with attached():
        hsa_attention(...)  # CPU tensors in bfloat16 or float16, impl="tilelang"
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from tilelang import tvm
from tvm import tirx

from hsa_tl.files import cache_folder
from hsa_tl.kernels_tilelang import compile

FOLDER = Path(__file__).parent
COMPILER = ("g++", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-w")
MAP_TYPES = {6: 2, 7: 4, 9: 2}  # CUtensorMapDataType: float16, float32, bfloat16 -> bytes
MARGIN = 4096  # bytes between buffers, which no access may touch
PAGE = 256
REGISTERS = 65536  # of an SM


class Fault(RuntimeError):
    """What a program did that it must not."""


@contextlib.contextmanager
def attached():
    """CPU tensors run what is compiled for Hopper."""
    before, compile.emulator = compile.emulator, Emulated
    try:
        yield
    finally:
        compile.emulator = before


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p), ("dims", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5), ("rank", ctypes.c_uint32), ("swizzle", ctypes.c_uint32),
    ]  # fmt: skip


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        try:
            run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("the emulator needs g++ on PATH") from None
        if run.returncode:
            raise RuntimeError(f"the host's compiler refused the program: {run.stderr[:2000]}")
        made.rename(target)


def _included(text: str) -> str:
    """The emulator's headers that a C++ source includes, one behind the other."""
    headers = [(FOLDER / name).read_text() for name in re.findall(r'#include "(\w+\.h)"', text)]
    return "".join(header + _included(header) for header in headers)


def _object(text: str, *flags: str) -> Path:
    """The object file of a C++ source; compiled anew if it, what it includes or the flags change."""
    target = _cached("\0".join((text, _included(text), *COMPILER, *flags)), ".o")
    if not target.is_file():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.cu"
            source.write_text(text)
            _compile([*COMPILER, f"-I{FOLDER}", *flags, "-x", "c++", "-c", str(source)], target)
    return target


def _cached(text: str, suffix: str) -> Path:
    return cache_folder() / "emulator" / f"{hashlib.sha256(text.encode()).hexdigest()}{suffix}"


def host_source(source: str) -> str:
    """Generated CUDA source of one kernel as C++, with the entry that the emulator calls."""
    source = re.sub(r"#include <(tl_templates|math_constants|cuda).*", "", source)
    source = re.sub(r"extern __shared__ .*\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)hopper::dynamic_shared;", source)
    if unknown := [x for x in re.findall(r"__shared__ .*", source) if not re.search(r" uint64_t \w+_mem\[\d+\];", x)]:
        raise NotImplementedError(f"the emulator knows static shared memory of mbarriers only, got {unknown[0]}")
    name, parameters = signature(source)
    arguments = ", ".join(f"*({kind}*)parameters[{i}]" for i, (kind, _) in enumerate(parameters))
    return (
        f'#include "hopper.h"\nnamespace hopper {{ extern char* dynamic_shared; }}\n#line 1 "kernel.cu"\n{source}\n'
        'extern "C" __attribute__((no_sanitize("thread"))) void hopper_entry(char** const* parameters) {\n'
        f"  {name}({arguments});\n}}\n"
    )


def signature(source: str) -> tuple[str, list[tuple[str, str]]]:
    """A kernel's name and (type, name) of its parameters."""
    name, text = re.search(r"__global__ void (\w+)\((.*?)\);", source).groups()
    words = [re.sub(r"__restrict__|__grid_constant__|const ", "", x).split() for x in text.split(", ")]
    return name, [(" ".join(w[:-1]), w[-1]) for w in words]


@functools.cache
def _library(source: str) -> ctypes.CDLL:
    """The kernel compiled for the host, each of its memory accesses announced, and linked to the emulator."""
    objects = [_object(host_source(source), "-O1", "-g1", "-fsanitize=thread")]
    objects += [_object(p.read_text(), "-O2") for p in sorted(FOLDER.glob("*.cpp"))]
    path = _cached("".join(map(str, objects)), ".so")
    if not path.is_file():
        _compile(["g++", "-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects)], path)
    return ctypes.CDLL(str(path))


class Emulated:
    """A kernel as the module compile returns it, for CPU tensors; a fault raises `Fault`. Outputs are always written.

    HSA_TL_EMULATE_SEED=0 (the default) runs the threads in order and completes each copy as late as it can; any other
    seed shuffles both.
    """

    def __init__(self, ir: tirx.PrimFunc, artifact):
        self.ir = ir
        self.source = artifact.kernel_source
        (kernel,) = artifact.device_mod.functions.values()
        (host,) = artifact.host_mod.functions.values()
        self.extents = dict(kernel.attrs["thread_extent"])
        self.shared_bytes = int(kernel.attrs.get("dyn_shared_memory_buf", 0))
        maps = host.attrs.get("tma_descriptor_args", {})
        self.maps = {var.name: list(call) for var, call in maps.items()}
        bounds = re.search(r"__launch_bounds__\((\d+), (\d+)\)", self.source)
        threads, blocks = (int(x) for x in bounds.groups()) if bounds else (1024, 1)
        self.registers = min(255, REGISTERS // (threads * blocks)) // 8 * 8

    def __call__(self, *arguments):
        dims, tensors, scalars = {}, {}, {}
        for param, value in zip(self.ir.params, arguments, strict=True):
            if param not in self.ir.buffer_map:
                scalars[param.name] = value
                continue
            buffer = self.ir.buffer_map[param]
            tensors[buffer.name] = value
            if not value.is_contiguous() or str(value.dtype).removeprefix("torch.") != buffer.dtype:
                raise ValueError(f"{buffer.name} must be contiguous {buffer.dtype}")
            for extent, size in zip(buffer.shape, value.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    dims[extent.name] = size
        dims |= {k: v for k, v in scalars.items() if isinstance(v, int)}
        arena = _Arena(tensors)
        grid = [self.evaluate(self.extents.get(f"blockIdx.{axis}", 1), dims) for axis in "xyz"]
        threads = self.evaluate(self.extents["threadIdx.x"], dims)
        library = _library(self.source)
        values = [self.parameter(kind, name, arena, scalars | dims, dims) for kind, name in signature(self.source)[1]]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        text = ctypes.create_string_buffer(1 << 14)
        seed = ctypes.c_uint32(int(os.environ.get("HSA_TL_EMULATE_SEED", 0)))
        library.hopper_buffers((ctypes.c_size_t * len(arena.bounds))(*arena.bounds), len(arena.bounds) // 2)
        faults = library.hopper_launch(
            parameters, (ctypes.c_int * 3)(*grid), threads, ctypes.c_size_t(self.shared_bytes), self.registers,
            ctypes.c_void_p(arena.base), ctypes.c_size_t(arena.bytes), seed, text,
            ctypes.c_size_t(len(text)),
        )  # fmt: skip
        if faults:
            raise Fault(f"{faults} faults\n{self.located(library, text.value.decode())}")
        arena.copy_back()

    def located(self, library: ctypes.CDLL, text: str) -> str:
        """Fault messages with lines of the generated source in place of addresses."""
        addresses = [hex(int(x, 16) - 1) for x in re.findall(r"@([0-9a-f]+)", text)]
        command = ["addr2line", "-a", "-i", "-e", library._name, *addresses]
        told = subprocess.run(command, capture_output=True, text=True).stdout
        # For each address a line that begins with 0x, then its place and, from the inside out, those it is inlined in.
        places = (x.splitlines()[-1] for x in re.split(r"^0x", told, flags=re.MULTILINE)[1:])
        places = (x.rsplit("/", 1)[-1].split(" ")[0] for x in places)
        return re.sub(r"@[0-9a-f]+", lambda m: f"({next(places, '?')})", text)

    def evaluate(self, expression, dims: dict[str, int]) -> int:
        """An integer expression of the launch, at these dims."""
        if isinstance(expression, int):
            return expression
        found = {}
        tirx.stmt_functor.post_order_visit(
            expression,
            lambda x: found.setdefault(x, tirx.const(dims[x.name], x.dtype)) if isinstance(x, tirx.Var) else None,
        )
        value = tvm.arith.Analyzer().simplify(tirx.stmt_functor.substitute(expression, found))
        return int(value)

    def parameter(self, kind, name, arena, values, dims):
        if kind == "CUtensorMap":
            return self.tensor_map(name, arena, dims)
        if kind.endswith("*"):
            return ctypes.c_void_p(arena.address[name])
        return {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}[kind](values[name])

    def tensor_map(self, name, arena, dims) -> _TensorMap:
        """What cuTensorMapEncodeTiled would make of the host code's arguments, and refuses as it would."""
        _, _, kind, rank, data, *rest = self.maps[name]
        rank = int(rank)
        numbers = [self.evaluate(x, dims) for x in rest]
        shape, strides, box, steps = (numbers[i * rank : (i + 1) * rank] for i in range(4))
        interleave, swizzle = numbers[4 * rank : 4 * rank + 2]
        item = MAP_TYPES[int(kind)]
        strides[0] = item
        wrong = any(s % 16 for s in strides[1:]) or box[0] * item % 16 or max(box) > 256 or min(shape) < 1
        if wrong or interleave or set(steps) != {1} or (swizzle and box[0] * item > 16 << swizzle):
            raise Fault(f"cuTensorMapEncodeTiled refuses {name}: dims {shape}, strides {strides}, box {box}")
        pad = [0] * (5 - rank)
        return _TensorMap(
            arena.address[data.name], (ctypes.c_uint64 * 5)(*shape, *pad), (ctypes.c_uint64 * 5)(*strides, *pad),
            (ctypes.c_uint32 * 5)(*box, *pad), rank, swizzle,
        )  # fmt: skip


class _Arena:
    """Copies of the tensors, apart from each other."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors, self.bounds, places = tensors, [], {}
        end = MARGIN
        for x in tensors.values():
            if x.data_ptr() not in places:
                places[x.data_ptr()] = end
                self.bounds += [end, end + x.nbytes]
                end += -(-x.nbytes // PAGE) * PAGE + MARGIN
        self.memory = torch.zeros(end + PAGE, dtype=torch.uint8)
        skip = -self.memory.data_ptr() % PAGE
        self.base, self.bytes = self.memory.data_ptr() + skip, end
        self.places = {name: places[x.data_ptr()] for name, x in tensors.items()}
        self.address = {name: self.base + place for name, place in self.places.items()}
        self.parts = {
            name: self.memory[skip + place : skip + place + tensors[name].nbytes] for name, place in self.places.items()
        }
        for name, x in tensors.items():
            self.parts[name].copy_(x.view(-1).view(torch.uint8))

    def copy_back(self):
        for name, x in self.tensors.items():
            x.view(-1).view(torch.uint8).copy_(self.parts[name])
