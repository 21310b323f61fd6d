"""What a pair costs: device constants, bytes by level, and the prediction from SASS. Constants marked [A] are assumed.

A pair is one (token, key/value head, selected chunk); ns_per_pair is for the whole GPU. The roofline is the least time
that FLOPs and bytes allow; the prediction adds issue slots, special functions, shared memory and latency, read from
the innermost loop of the assembled program. It finds cliffs; it is not a measurement.
"""

import re
from dataclasses import dataclass

from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem


@dataclass(frozen=True)
class Device:
    """Constants of one GPU; rates a second, bytes unless named otherwise."""

    name: str
    hbm: float
    l2: float = 7.0e12  # [A] working figure for tile reads
    reduce: float = 2.0e12  # [A] float32 reduce-add into L2
    l2_bytes: float = 40e6  # [A] working set that still hits
    sms: int = 132
    clock: float = 1.755e9
    tensor_flops_clock: float = 4096  # dense 16-bit, an SM and clock
    mma_sync: float = 0.62  # [A] share of the wgmma rate
    special_clock: int = 16  # exp2 an SM and clock
    smem_clock: int = 128  # bytes an SM and clock
    smem: int = 228 * 1024
    registers: int = 65536

    @property
    def ns_for_each_clock(self) -> float:
        """Nanoseconds of the whole GPU for one clock of one SM."""
        return 1e9 / (self.sms * self.clock)


DEVICES = {d.name: d for d in (Device("h100", 3.0e12), Device("h200", 4.3e12), Device("h800", 3.0e12))}


def memory_ns(config: Config, problem: Problem, device: Device) -> dict[str, float]:
    """ns for each pair that its bytes take at each level."""
    rates = {"l2": device.l2, "hbm": device.hbm, "reduce": device.reduce}
    return {level: moved / rates[level] * 1e9 for level, moved in config.pair_bytes(problem).items()}


def roofline(config: Config, problem: Problem, device: Device) -> tuple[float, str]:
    """Least ns for each pair and what sets it, at full wgmma rate and perfect overlap."""
    flops = problem.pair_flops(config.DIRECTION)
    bounds = {"tensor": flops / device.tensor_flops_clock * device.ns_for_each_clock}
    bounds |= memory_ns(config, problem, device)
    limiter = max(bounds, key=bounds.get)
    return bounds[limiter], limiter


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*?);")
SHORT_LOOP_BYTES = 0x200  # barrier retries, not work


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


def loop_work(loop, device: Device) -> dict[str, float]:
    """What one warp executes in one pass of a loop."""
    f = dict.fromkeys(("issue", "hgmma_clocks", "hmma", "special", "smem_clocks", "barriers", "waits", "loads"), 0.0)
    f["flops"] = 0.0
    for _, op, operands in loop:
        base = op.split(".")[0]
        f["issue"] += 1
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op)
        if shape:
            m, n, k = map(int, shape.groups())
            f["flops"] += 2 * m * n * k
            f["hgmma_clocks"] += 2 * m * n * k / device.tensor_flops_clock
            from_shared = re.match(r"\s*R\d+, gdesc", operands) is not None
            f["smem_clocks"] += (n * k + (m * k if from_shared else 0)) * 2 / device.smem_clock / 4  # a warp's quarter
        elif base == "HMMA":
            f["hmma"] += 1
            f["flops"] += 4096
        elif base == "MUFU":
            f["special"] += 32
        elif base in ("LDSM", "STSM", "LDS", "STS"):
            f["smem_clocks"] += 4 if re.search(r"x4|\.4|128", op) else 2 if re.search(r"64|x2|\.2", op) else 1
        elif base == "BAR":
            f["barriers"] += 1
        elif base == "WARPGROUP" and "DEPBAR" in op:
            f["waits"] += 1
        elif base == "LDG":
            f["loads"] += 1
    return f


# [A] clocks of latency that a warp cannot hide behind its own work
BARRIER_CLOCKS, WGMMA_WAIT_CLOCKS, INSTRUCTION_CLOCKS, GLOBAL_LOAD_CLOCKS = 30, 90, 2, 700


def predict(config: Config, problem: Problem, ctas: int, sass, device: Device) -> tuple[float, str]:
    """ns for each pair and the limiter, from the loop that holds the matrix products and the bytes a pair moves."""
    memory = memory_ns(config, problem, device)
    if config.tensor_core() is None:
        return max(memory.values()), max(memory, key=memory.get)
    loops = [loop_work(loop, device) for holding in ("HGMMA", "HMMA") for loop in inner_loops(sass, holding)]
    # Without a loop around its products, the whole program is one pass.
    loops = loops or [loop_work(sass, device)]
    f = max(loops, key=lambda x: x["flops"])
    if not f["flops"]:
        raise ValueError("no matrix products in the SASS")
    warps = config.threads // 32
    groups = warps / 4
    share = config.loop_share(problem)
    flops = f["flops"] * (groups if f["hgmma_clocks"] else warps) * share
    tile_flops = problem.pair_flops(config.DIRECTION) / problem.G * config.rows(problem)
    pairs = flops / tile_flops * config.pairs(problem)  # the compiler may have unrolled the loop
    tensor = f["hgmma_clocks"] * groups * share + f["hmma"] * warps * 4096 / device.tensor_flops_clock / device.mma_sync
    serial = f["issue"] * INSTRUCTION_CLOCKS + f["barriers"] * BARRIER_CLOCKS + f["waits"] * WGMMA_WAIT_CLOCKS
    serial += GLOBAL_LOAD_CLOCKS if f["loads"] else 0
    clocks = {
        "issue": f["issue"] * warps / 4,
        "tensor": tensor,
        "special": f["special"] * warps / device.special_clock,
        "smem": f["smem_clocks"] * warps,
        "latency": max(serial, tensor) / ctas,
    }
    bounds = {name: value / pairs * device.ns_for_each_clock for name, value in clocks.items()}
    bounds |= memory
    top = sorted(bounds, key=bounds.get, reverse=True)[:3]
    return sum(bounds[name] ** 4 for name in top) ** 0.25, top[0]  # near ties cost extra
