"""Blocks of work on the CPU, spread over a few threads that each compute alone.

A parallel region inside an operation waits, spinning, for its slowest thread, which on a busy machine may have no core
to run on; thousands of short ones wait for most of the time. So operators run in workers whose own operations are
serial, and take blocks of their work one by one: who is slow takes fewer. Which worker ran a block changes no bit.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

AHEAD = 4  # blocks, a worker, that may wait for an earlier one to be finished
_MAX_THREADS = 256  # of all callers at once; they start when they are needed


@functools.cache
def _quota(root: Path) -> float:
    """Cores' worth of time that the control groups of this process leave it; inf where there is no limit."""
    limit = math.inf
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return limit
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        # A container may see its own group as the top one, and be told its path outside.
        inside = top / path.lstrip("/")
        for folder in {top, inside, *(p for p in inside.parents if p.is_relative_to(top))}:
            try:
                if controllers:
                    files = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
                    quota, period = (file.read_text().strip() for file in files)
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota not in ("max", "-1"):
                    limit = min(limit, int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):
                continue
    return limit


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: of its affinity mask, within the quotas of its control groups."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(here, _quota(root))))


class _Job:
    """One call of an operator: how many workers it may have, and whether its caller gave it up."""

    def __init__(self, workers: int):
        self.workers, self.abandoned = workers, False

    def check(self) -> None:
        if self.abandoned:
            raise InterruptedError("the caller was interrupted")


_here = threading.local()  # .job: what this thread works for, and may spread
_starting = threading.Lock()


def _start() -> None:
    """Makes this thread's operations serial and leaves the default of other threads alone."""
    with _starting:
        default = torch.get_num_threads()
        torch.set_num_threads(1)  # also what threads will have that call torch later: so another one sets it back
        other = threading.Thread(target=torch.set_num_threads, args=(default,))
        other.start()
        other.join()
    torch.set_grad_enabled(False)


def _new_pool() -> None:
    global _pool, _starting
    _starting = threading.Lock()
    _pool = ThreadPoolExecutor(_MAX_THREADS, "hsa_tl", _start)


_new_pool()
os.register_at_fork(after_in_child=_new_pool)  # threads stay behind in the parent


def _submit(work: Callable) -> Future | None:
    """None: the interpreter ends and takes no more work into threads, but a thread of the program goes on."""
    try:
        return _pool.submit(work)
    except RuntimeError:
        return None


def call(function: Callable, *args, **kwargs):
    """function(*args, **kwargs) where operations on the CPU are serial and `each` spreads work; in no_grad mode.

    Over as many workers as the caller has threads, torch.get_num_threads(), no more than `cores()`. With one thread all
    of it runs in the caller's own; torch.profiler sees nothing of others.
    """
    if torch.get_num_threads() == 1:
        return function(*args, **kwargs)
    job = _Job(min(torch.get_num_threads(), cores()))

    def work():
        _here.job = job
        try:
            return function(*args, **kwargs)
        finally:
            _here.job = None

    if (submitted := _submit(work)) is None:
        return function(*args, **kwargs)
    try:
        return submitted.result()
    except BaseException:
        job.abandoned = True
        raise


class _Blocks:
    """Items to work on, taken in order by any worker and finished in order by one at a time."""

    def __init__(self, items: Sequence, work: Callable, finish: Callable, job: _Job):
        self.items, self.work, self.finish, self.job = items, work, finish, job
        self.taken = self.finished = 0
        self.waiting: dict[int, object] = {}  # results
        self.finishing = self.failed = False
        self.changed = threading.Condition()

    def take(self) -> int | None:
        with self.changed:
            while self.taken - self.finished >= AHEAD * self.job.workers and not self.failed:
                self.changed.wait()
            if self.failed or self.taken == len(self.items):
                return None
            self.taken += 1
            return self.taken - 1

    def put(self, i: int, result: object) -> None:
        with self.changed:
            self.waiting[i] = result
            if self.finishing:
                return
            self.finishing = True
        while not self.failed:
            with self.changed:
                if self.finished not in self.waiting:
                    self.finishing = False
                    return
                result = self.waiting.pop(self.finished)
            self.finish(result)
            with self.changed:
                self.finished += 1
                self.changed.notify_all()

    def run(self) -> None:
        try:
            while (i := self.take()) is not None:
                self.job.check()
                self.put(i, self.work(self.items[i]))
        except BaseException:
            with self.changed:
                self.failed = True
                self.changed.notify_all()
            raise


def each(
    items: Sequence,
    work: Callable[[object], object],
    finish: Callable[[object], None] = lambda result: None,
) -> None:
    """finish(work(item)) for every item, on as many workers as `call` allows.

    work runs for several items at once and must write to nothing that they share; finish runs for one at a time, in
    the order of the items.
    """
    job = getattr(_here, "job", None) or _Job(1)
    if min(job.workers, len(items)) < 2:
        for item in items:
            job.check()
            finish(work(item))
        return
    blocks = _Blocks(items, work, finish, job)
    submitted = [_submit(blocks.run) for _ in range(min(job.workers, len(items)) - 1)]
    helpers = [helper for helper in submitted if helper is not None]
    try:
        blocks.run()
    finally:
        # One that has not begun need not: nothing is left to take.
        running = [helper for helper in helpers if not helper.cancel()]
        for helper in running:
            helper.exception()
    for helper in running:
        helper.result()
