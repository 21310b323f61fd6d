"""One timer: providers interleaved in one process, warm-up, quantiles; and the peak of extra memory."""

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

L2_FLUSH_BYTES = 256 << 20  # larger than any L2


class Timing(NamedTuple):
    """Quantiles of the repeats in milliseconds."""

    p20: float
    p50: float
    p80: float
    repeats: int


def quantiles(times_ms: list[float]) -> Timing:
    p20, p50, p80 = torch.tensor(times_ms, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(float(p20), float(p50), float(p80), len(times_ms))


def _time_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _time_cuda(function: Callable[[], object], flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The flush also keeps the GPU busy while the launches queue up behind it.
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
    warmup: int = 1,
    min_repeats: int = 3,
    max_repeats: int = 50,
    seconds: float = 3.0,
    deadline: float | None = None,
) -> dict[str, Timing]:
    """Times each function; rounds visit all of them in turn, so that a slow spell of the machine hits all alike.

    Every other round goes backwards, so that none always follows the same one.
    A function repeats until `seconds` are spent on it or max_repeats are done, min_repeats at least; past `deadline`
    (time.monotonic) after one repeat. On CUDA between events after an L2 flush, else by the wall clock.
    """
    if torch.device(device).type == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        once = lambda f: _time_cuda(f, flush)  # noqa: E731
    else:
        once = _time_cpu
    for _ in range(warmup):
        for f in functions.values():
            once(f)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(max_repeats):
        late = deadline is not None and time.monotonic() > deadline
        pending = [
            name
            for name, spent in times.items()
            if not spent or (not late and (len(spent) < min_repeats or sum(spent) < seconds * 1e3))
        ]
        if not pending:
            break
        for name in pending if i % 2 == 0 else reversed(pending):
            times[name].append(once(functions[name]))
    return {name: quantiles(spent) for name, spent in times.items()}


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


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
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    base = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return max(0, _status_kib("VmHWM") - base) * 1024
