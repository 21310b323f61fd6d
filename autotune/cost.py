"""What a pair costs: bytes by level, work in the inner loop, and the prediction with a device's constants.

A pair is one (token, key/value head, selected chunk); ns_per_pair is for the whole GPU. The roofline is the least time
that FLOPs and bytes allow; the prediction adds issue slots, special functions, shared memory and latency, read from
the innermost loop of the assembled program. It finds cliffs; it is not a measurement. The constants stand in
devices/<name>.json with their unit and source; autotune.calibrate fits those that are assumed to measurements.
"""

import functools
import json
import math
import re
import warnings
from dataclasses import dataclass, replace
from importlib import resources

import torch

from hsa_tl.kernels_tilelang.config_base import Config, blocks_per_sm
from hsa_tl.problem import Problem

FREE = ("assumed", "fitted")  # how the sources of constants begin that measurements may change


@dataclass(frozen=True)
class Device:
    """Constants of one GPU; rates a second, bytes unless named otherwise."""

    name: str
    hbm: float
    l2: float  # tile reads
    reduce: float  # float32 reduce-add, of sums that the L2 cache cannot hold
    l2_bytes: float  # working set that still hits
    sms: int
    clock: float
    tensor_flops_clock: float  # dense 16-bit, an SM and clock
    mma_sync: float  # share of the wgmma rate
    special_clock: float  # exp2 an SM and clock
    smem_clock: float  # bytes an SM and clock
    smem: int
    registers: int
    barrier_clocks: float  # latencies that a warp cannot hide behind its own work
    wgmma_wait_clocks: float
    instruction_clocks: float
    load_clocks: float
    free: tuple[str, ...] = ()  # names of the constants that are not known

    @property
    def ns_for_each_clock(self) -> float:
        """Nanoseconds of the whole GPU for one clock of one SM."""
        return 1e9 / (self.sms * self.clock)


def constants(name: str) -> dict[str, dict]:
    """Of the constants file that the package ships: its own, and those of the device that it names as its base."""
    file = json.loads((resources.files("hsa_tl.autotune") / "devices" / f"{name}.json").read_text())
    return (constants(file["base"]) if "base" in file else {}) | file["constants"]


def make_device(name: str, constants: dict[str, dict]) -> Device:
    free = tuple(name for name, c in constants.items() if c["source"].startswith(FREE))
    return Device(name, **{name: c["value"] for name, c in constants.items()}, free=free)


DEVICES = {name: make_device(name, constants(name)) for name in ("h100", "h200", "h800")}
UNKNOWN = "h100"  # whose constants an unknown GPU borrows


def device_name(index: int | None = None) -> str | None:
    """Which of DEVICES the GPU is by the words of its name, None for none of them or without a GPU."""
    if not torch.cuda.is_available():
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(index).lower())
    return next((name for name in DEVICES if name in words), None)


@functools.cache
def device_here(index: int | None = None) -> Device:
    """The constants of the GPU, with as many SMs as it has; one that is none of DEVICES borrows UNKNOWN's and says so.

    Without a GPU UNKNOWN's, for the emulator.
    """
    if not torch.cuda.is_available():
        return DEVICES[UNKNOWN]
    properties, name = torch.cuda.get_device_properties(index), device_name(index)
    if name is None:
        warnings.warn(
            f"{properties.name} has no constants of its own in hsa_tl/autotune/devices: programs are chosen by those "
            f"of {UNKNOWN} with {properties.multi_processor_count} SMs", stacklevel=2,
        )  # fmt: skip
    return replace(DEVICES[name or UNKNOWN], name=name or UNKNOWN, sms=properties.multi_processor_count)


def memory_ns(config: Config, problem: Problem, device: Device, read: float = 1.0) -> dict[str, float]:
    """ns for each pair that its bytes take at each level, when chunks are read `read` times the best case.

    Keys and values that the L2 cache cannot hold come from HBM.
    """
    p, moved = problem, config.pair_bytes(problem)
    if reads := config.chunk_reads(p):
        missed = 1 - min(1.0, device.l2_bytes / max(1, p.B * p.N * p.H * p.chunk_bytes()))
        moved["l2"] = moved.get("l2", 0.0) + (read - 1) * reads * p.chunk_bytes()
        moved["hbm"] = moved.get("hbm", 0.0) + read * missed * reads * p.chunk_bytes()
    rates = {"l2": device.l2, "hbm": device.hbm, "reduce": device.reduce}
    return {level: amount / rates[level] * 1e9 for level, amount in moved.items()}


def roofline(config: Config, problem: Problem, device: Device) -> tuple[float, str]:
    """Least ns for each pair and what sets it, at full wgmma rate and perfect overlap."""
    flops = problem.pair_flops(config.DIRECTION)
    bounds = {"tensor": flops / device.tensor_flops_clock * device.ns_for_each_clock}
    bounds |= memory_ns(config, problem, device)
    limiter = max(bounds, key=bounds.get)
    return bounds[limiter], limiter


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*?);")
SHORT_LOOP_BYTES = 0x200  # barrier retries, not work
LDS_BYTES = 128  # a warp reads from shared memory with each of the narrowest loads


def parse_sass(text: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of each instruction that cuobjdump printed."""
    found = (INSTRUCTION.match(line) for line in text.splitlines())
    return [(int(m.group(1), 16), m.group(2), m.group(3)) for m in found if m]


def count(sass, prefix: str) -> int:
    """Instructions whose opcode begins with prefix."""
    return sum(op.startswith(prefix) for _, op, _ in sass)


def inner_loops(sass, holding: str = "") -> list[list]:
    """Instructions of each innermost loop, by backward branches; of the loops with an opcode that begins so."""
    spans, previous = [], ""
    for address, op, operands in sass:
        target = re.search(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else None
        # A branch right behind a branch is a barrier's retry trampoline.
        if target and not previous.startswith("BRA") and int(target.group(1), 16) + SHORT_LOOP_BYTES < address:
            spans.append((int(target.group(1), 16), address))
        previous = op
    spans = [s for s in spans if any(s[0] <= x[0] <= s[1] and x[1].startswith(holding) for x in sass)]
    inner = [s for s in spans if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in spans)]
    return [[x for x in sass if low <= x[0] <= high] for low, high in inner]


def loop_work(loop) -> dict[str, float]:
    """What one warp executes in one pass of a loop; of a wgmma, which four warps share, all of its FLOPs."""
    f = dict.fromkeys(("issue", "wgmma_flops", "mma_flops", "special", "smem_bytes", "barriers", "waits", "loads"), 0.0)
    each = {"HMMA": ("mma_flops", 4096), "MUFU": ("special", 32), "BAR": ("barriers", 1), "LDG": ("loads", 1)}
    for _, op, operands in loop:
        base = op.split(".")[0]
        f["issue"] += 1
        if base in each:
            name, amount = each[base]
            f[name] += amount
        elif shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
            m, n, k = map(int, shape.groups())
            f["wgmma_flops"] += 2 * m * n * k
            from_shared = re.match(r"\s*R\d+, gdesc", operands) is not None
            f["smem_bytes"] += (n * k + (m * k if from_shared else 0)) * 2 / 4  # a warp's quarter
        elif base in ("LDSM", "STSM", "LDS", "STS"):
            words = 4 if re.search(r"x4|\.4|128", op) else 2 if re.search(r"64|x2|\.2", op) else 1
            f["smem_bytes"] += LDS_BYTES * words
        elif base == "WARPGROUP" and "DEPBAR" in op:
            f["waits"] += 1
    return f


def pass_work(config: Config, problem: Problem, sass) -> dict[str, float] | None:
    """What a CTA does in a pass of the loop that holds the matrix products, and the pairs that it serves.

    None for a program without matrix products. issue_warp, barriers, waits and loads are a warp's, the rest the CTA's.
    """
    if config.tensor_core() is None:
        return None
    loops = [loop_work(loop) for holding in ("HGMMA", "HMMA") for loop in inner_loops(sass, holding)]
    # Without a loop around its products, the whole program is one pass.
    loops = loops or [loop_work(sass)]
    f = max(loops, key=lambda x: x["wgmma_flops"] + x["mma_flops"])
    if not f["wgmma_flops"] + f["mma_flops"]:
        raise ValueError("no matrix products in the SASS")
    warps = config.threads // 32
    wgmma, mma = f["wgmma_flops"] * warps / 4 * config.loop_share(problem), f["mma_flops"] * warps
    tile_flops = problem.row_flops(config.DIRECTION) * config.rows(problem)
    return {
        "pairs": (wgmma + mma) / tile_flops * config.pairs(problem),  # the compiler may have unrolled the loop
        "wgmma_flops": wgmma,
        **{name: f[name] * warps for name in ("issue", "mma_flops", "special", "smem_bytes")},
        "issue_warp": f["issue"],
        **{name: f[name] for name in ("barriers", "waits", "loads")},
        # Chunks that asynchronous copies bring while others are worked on; 0 where the loop loads for itself.
        "stages": 0 if f["loads"] else getattr(config, "num_stages", 0),
    }


READERS = (parse_sass, count, inner_loops, loop_work, pass_work)


def bounds(config: Config, problem: Problem, ctas: int, work: dict | None, device: Device, overlap=1.0) -> dict:
    """ns for each pair by what could set it. ctas: of an SM; work: pass_work's, None if nothing is assembled."""
    d, (read, multiplied) = device, config.again(problem, overlap)
    memory = memory_ns(config, problem, device, read)
    if work is None:
        rate = d.tensor_flops_clock * (d.mma_sync if config.tensor_core() == "hmma" else 1.0)
        flops = multiplied * problem.pair_flops(config.DIRECTION)
        return memory | ({"tensor": flops / rate * d.ns_for_each_clock} if flops else {})
    tensor = (work["wgmma_flops"] + work["mma_flops"] / d.mma_sync) / d.tensor_flops_clock
    serial = work["issue_warp"] * d.instruction_clocks + work["barriers"] * d.barrier_clocks
    serial += work["waits"] * d.wgmma_wait_clocks + (d.load_clocks if work["loads"] else 0)
    clocks = {
        "issue": work["issue"] / 4,
        "tensor": tensor,
        "special": work["special"] / d.special_clock,
        "smem": work["smem_bytes"] / d.smem_clock,
        "latency": max(serial, tensor) / ctas,
    }
    if work["stages"]:  # a stage is taken from the start of its copy to the end of its use
        clocks["copies"] = (d.load_clocks + max(serial, tensor)) / (work["stages"] * ctas)
    return memory | {k: multiplied * value / work["pairs"] * d.ns_for_each_clock for k, value in clocks.items()}


def predict(config: Config, problem: Problem, ctas: int, work: dict | None, device: Device, overlap=1.0):
    """(ns for each pair, the limiter): the greatest of the bounds, and more where others come near."""
    found = bounds(config, problem, ctas, work, device, overlap)
    top = sorted(found, key=found.get, reverse=True)[: 3 if work else 1]
    return sum(found[name] ** 4 for name in top) ** 0.25, top[0]


def planned_ns(config: Config, problem: Problem, device: Device, overlap: float) -> float:
    """What plans are chosen by: predict without an assembled program, on a GPU that the CTAs fill in whole waves.

    A strategy's index building and sums are in its program's pair_bytes.
    """
    ns, _ = predict(config, problem, 1, None, device, overlap)
    slots, ctas = device.sms * max(1, blocks_per_sm(config, problem)), max(1, config.ctas(problem))
    return ns * math.ceil(ctas / slots) * slots / ctas
