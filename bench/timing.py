"""One timer: providers interleaved in one process, quantiles; the peak of extra memory; neighbours that keep busy."""

import contextlib
import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hsa_tl.bench.record import field

L2_FLUSH_BYTES = 256 << 20  # larger than any L2
FLUSHES = 16  # about 1.4 ms, longer than a slow host takes to launch a call
MAX_REPEATS = 50
# Ends with the other end of its standard input, so also when the parent is killed.
SPIN = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
print(flush=True)
while True:
    pass
"""


class Timing(NamedTuple):
    """Quantiles of the repeats in milliseconds."""

    p20: float
    p50: float
    p80: float
    repeats: int


def _time_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _time_cuda(function: Callable[[], object], flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The flushes also keep the GPU busy while the launches queue up behind them: it is the device's time.
    for _ in range(FLUSHES):
        flush.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    min_repeats: int = 3,
    seconds: float = 3.0,
    deadline: float = float("inf"),
    failed: dict[str, Exception] | None = None,
) -> dict[str, Timing]:
    """Times each function; rounds visit all of them in turn, so that a slow spell of the machine hits all alike.

    Every other round goes backwards, so that none always follows the same one.
    A function repeats until `seconds` are spent on it or MAX_REPEATS are done, min_repeats at least; past `deadline`
    (time.monotonic) after one repeat. On CUDA between events after an L2 flush, else by the wall clock.
    failed: takes what a function raises, which then has no times; by default it ends all.
    """
    cuda = torch.device(device).type == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device) if cuda else None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(MAX_REPEATS):
        late = time.monotonic() > deadline
        pending = [
            name for name, spent in times.items()
            if not spent or (not late and (len(spent) < min_repeats or sum(spent) < seconds * 1e3))
        ]  # fmt: skip
        for name in pending if i % 2 == 0 else reversed(pending):
            try:
                times[name].append(_time_cuda(functions[name], flush) if cuda else _time_cpu(functions[name]))
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = error
                del times[name]
    return {name: Timing(*np.quantile(spent, (0.2, 0.5, 0.8)).tolist(), len(spent)) for name, spent in times.items()}


def _status_bytes(name: str) -> int:
    return 1024 * int(field("/proc/self/status", name).split()[0])


def peak_extra_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The peak of memory that one call adds to what was held before it, its result included.

    CUDA: the allocator's peak. CPU: the growth of the resident set's high-water mark, which Linux lets us reset.
    OSError: the kernel offers no such reset.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - base
    # Freed pages that malloc keeps would hide growth: hand them back first.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    base = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return max(0, _status_bytes("VmHWM") - base)


@contextlib.contextmanager
def neighbours(n: int) -> Iterator[list[int]]:
    """n processes that spin while the block runs, as on a machine that others use too; their ids."""
    with contextlib.ExitStack() as stack:
        spinning = []
        for _ in range(n):
            command = [sys.executable, "-I", "-S", "-c", SPIN]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)  # at the end closes its input and waits
            process.stdout.readline()
            spinning.append(process.pid)
        yield spinning
