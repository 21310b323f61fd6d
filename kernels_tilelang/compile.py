"""The one door that compiles: program + problem + config + target -> kernel. Targets: sm_90a and the CPU."""

import functools
import inspect
import signal
from collections.abc import Callable
from contextlib import contextmanager

from hsa_tl.kernels_tilelang.config import builder, make_importable
from hsa_tl.kernels_tilelang.config_base import blocks_per_sm

make_importable()

import tilelang  # noqa: E402
from tilelang import tvm  # noqa: E402

from hsa_tl.kernels_tilelang.cpu_target import cpu_program  # noqa: E402

SM_90A = {"kind": "cuda", "arch": "sm_90a"}
# Tiles are whole chunks and slots are checked in the program, so no access needs a guard, which would cost the copies
# their asynchrony. Fast math: exp2 and division to 2 ulp of float32, subnormals to 0; 16-bit rounding comes next.
PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.enable_fast_math": True}

# (IR, artifact) -> what runs a program compiled for sm_90a on CPU tensors, where a tool has put itself here.
emulator: Callable | None = None

_KERNELS: dict = {}

tilelang.set_log_level("WARNING")


@contextmanager
def _interruptible():
    """Leaves SIGINT as Python had it: TileLang's prover makes it restart what it interrupts, so that a caller who waits
    for its workers would never wake for it.
    """
    try:
        yield
    finally:
        signal.siginterrupt(signal.SIGINT, True)


def build(program: str, problem, config) -> tvm.tirx.PrimFunc:
    """The program's IR for a problem's static dims."""
    blocks = max(1, blocks_per_sm(config, problem))
    ir = builder(program)(**_static_dims(program, problem), min_blocks=blocks, config=config)
    return ir.with_attr("global_symbol", program)


def _pass_configs(config) -> dict:
    return PASS_CONFIGS | ({"tl.disable_thread_storage_sync": True} if config.own_barriers else {})


def _static_dims(program: str, problem) -> dict:
    """Those that the program's builder takes."""
    wanted = inspect.signature(builder(program)).parameters
    return {name: value for name, value in problem.static_key().items() if name in wanted}


@functools.lru_cache(maxsize=4096)
def _key(program: str, problem, config) -> tuple:
    return (program, problem.device_type, config, *_static_dims(program, problem).values())


@functools.lru_cache(maxsize=8)
def lower(program: str, problem, config):
    """The artifact for sm_90a: CUDA source and device module. Needs neither a GPU nor nvcc."""
    return lower_ir(build(program, problem, config), _pass_configs(config))


def lower_ir(ir: tvm.tirx.PrimFunc, pass_configs: dict = PASS_CONFIGS):
    """As `lower`, of IR built already."""
    target = tvm.target.Target(SM_90A)
    with _interruptible(), tvm.transform.PassContext(opt_level=3, config=pass_configs), target:
        return tilelang.lower(ir, target=target)


def compile_ir(ir: tvm.tirx.PrimFunc, device_type: str, pass_configs: dict = PASS_CONFIGS):
    """A callable kernel for a device type; for "cuda", the emulator's where there is one."""
    if emulator and device_type == "cuda":
        return emulator(ir, lower_ir(ir, pass_configs))
    with _interruptible():
        if device_type == "cpu":
            return tilelang.compile(cpu_program(ir), target="c", execution_backend="cython")
        return tilelang.compile(ir, target=SM_90A, execution_backend="tvm_ffi", pass_configs=pass_configs)


def kernel(program: str, problem, config):
    """A callable kernel for the problem's device; compiled once for each static key and config, any B, T, N and H."""
    key = (*_key(program, problem, config), emulator if problem.device_type == "cuda" else None)
    if key not in _KERNELS:
        _KERNELS[key] = compile_ir(build(program, problem, config), problem.device_type, _pass_configs(config))
    return _KERNELS[key]
