"""Workers: the same bits for any number of them, whoever calls, and no more than the cores there are."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import calls, seeds, without_weights

from hsa_tl import (
    build_pairs,
    cases,
    decode_retrieval,
    hsa_attention,
    hsa_decode,
    landmark_bounds,
    near,
    retrieval,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
    workers,
)
from hsa_tl.impl import reference, reference_decode
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.testing import run_with_gradients


@pytest.fixture
def use(monkeypatch):
    """use(n) lets operators have n workers, whatever the machine has."""
    before = torch.get_num_threads()
    monkeypatch.setattr(workers, "cores", lambda: 8)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks even of small tensors."""
    monkeypatch.setitem(reference._BLOCK_ELEMENTS, "cpu", 200)
    monkeypatch.setitem(reference_decode._BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(reference, "_LEAST_MATRIX", 0)
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 100)
    monkeypatch.setattr(near, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(decode_retrieval, "_RANGE_ELEMENTS", 1)


def spread(items, work, **options):
    """workers.each, as an operator calls it."""
    workers.call(workers.each, items, work, **options)


def check_any_number(use, function):
    """function() gives the same bits with 1, 2, 3 and 4 workers."""
    use(1)
    want = function()
    for n in (2, 3, 4):
        use(n)
        for a, b in zip(want, function(), strict=True):
            assert torch.equal(a, b), n


def test_attention(use, small_blocks):
    @hypothesis.given(calls, st.sampled_from((1.0, 30.0)))
    def holds(call, root):
        check_any_number(use, lambda: run_with_gradients(hsa_attention, call, chunk_size=16).values())
        call = without_weights(call._replace(q=root * call.q))  # large scores are merged by their maxima
        check_any_number(use, lambda: run_with_gradients(selected_attention, call, chunk_size=16).values())

    holds()


@st.composite
def marks(draw, max_chunks):
    """q_slc [B, T, R, 8] and landmarks [B, N, R, 8] of small whole numbers: many ties."""
    B, T, R, N = (draw(st.integers(1, high)) for high in (2, 50, 2, max_chunks))
    g = torch.Generator().manual_seed(draw(seeds))
    return tuple(torch.randint(-2, 3, (B, n, R, 8), generator=g).float() for n in (T, N))


@pytest.mark.parametrize("recency", (False, True))
def test_retrieval(use, small_blocks, recency):
    @hypothesis.given(marks(9), st.integers(1, 5), seeds)
    def holds(tensors, topk, seed):
        def run():
            leaves, options = [x.requires_grad_() for x in tensors], {}
            if recency:
                leaves.append(torch.ones(tensors[0].shape[2], requires_grad=True))
                options = {"recency": leaves[2], "recency_span": 4}
            scores, indices = retrieve_chunks(*leaves[:2], topk, chunk_size=16, q_start=100, **options)
            gradient = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))
            return scores.detach(), indices, *torch.autograd.grad(scores, leaves, gradient)

        check_any_number(use, run)

    holds()


@pytest.mark.parametrize("two_level", (False, True))
def test_retrieval_of_decode(use, small_blocks, two_level):
    @hypothesis.given(marks(300), st.integers(1, 5))
    @hypothesis.settings(max_examples=15)
    def holds(tensors, topk):
        q, landmarks = tensors[0][:, :3], tensors[1]
        lengths = torch.full((len(q),), 16 * landmarks.shape[1] - 2, dtype=torch.int32)
        bounds = landmark_bounds(landmarks) if two_level else None
        check_any_number(use, lambda: retrieve_decode(q, landmarks, lengths, topk, chunk_size=16, bounds=bounds))

    holds()


def test_decode(use, small_blocks):
    B, T, H, K, pages = 2, 3, 2, 3, 7
    q, weights = torch.randn(B, T, 4, 16), torch.randn(B, T, H, K)
    k, v = torch.randn(2, pages, 16, H, 16)
    indices = torch.randint(-1, 5, (B, T, H, K), dtype=torch.int32)
    table = torch.randint(0, pages, (B, 5), dtype=torch.int32)
    check_any_number(use, lambda: [hsa_decode(q, k, v, weights, indices, table)])
    check_any_number(use, lambda: selected_decode(q, k, v, indices, table))


def test_compiles(use, small_blocks):
    use(3)
    indices = torch.randint(-1, 3, (1, 40, 1, 2), dtype=torch.int32)
    call = [torch.randn(1, n, h, d) for n, h, d in ((40, 2, 16), (48, 1, 16), (48, 1, 16), (40, 1, 2))]
    compiled = torch.compile(hsa_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*call, indices, chunk_size=16), hsa_attention(*call, indices, chunk_size=16))


@pytest.mark.parametrize("n", (1, 2, 4))
def test_each(use, n):
    """Every item once, several at a time, finished in order and by one at a time; no worker runs far ahead."""
    use(n)
    finished, running, busy, most = [], {}, threading.Lock(), [0]
    together = threading.Barrier(n)

    def work(i):
        if i < n:
            together.wait(30)  # for ever, if fewer worked at once
        running.setdefault(threading.get_ident(), []).append(i)
        most[0] = max(most[0], i - len(finished))
        return i

    def finish(i):
        assert busy.acquire(blocking=False)
        finished.append(i)
        busy.release()

    spread(range(100), work, finish=finish)
    assert finished == list(range(100))
    assert len(running) == n and sorted(i for own in running.values() for i in own) == finished
    assert most[0] <= workers.AHEAD * n


def test_operations_in_workers_are_serial(use):
    use(3)
    found = set()

    def work(i):  # torch's own threads, OpenMP's and MKL's
        threads = re.findall(r"(?:get_num|max)_threads\(\) : (\d+)", torch.__config__.parallel_info())
        found.add((*threads, torch.is_grad_enabled()))

    spread(range(20), work)
    assert len(found) == 1 and set(found.pop()) == {"1", False}
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as other:  # a thread that starts after the workers
        assert other.submit(torch.get_num_threads).result() == 3


@pytest.mark.parametrize("where", ("work", "finish"))
def test_errors_reach_the_caller(use, where):
    use(3)

    def fail(i):
        if i == 7:
            raise ValueError("seven")
        return i

    with pytest.raises(ValueError, match="seven"):
        spread(range(1000), **({"work": fail} if where == "work" else {"work": lambda i: i, "finish": fail}))
    spread(range(10), lambda i: i)


@pytest.mark.parametrize("compiles", [False, True])
def test_an_interrupted_caller_stops_its_workers(use, compiles):
    use(2)
    worked, go_on = [], threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    if compiles:  # TileLang's prover changes what a signal does to a wait
        problem = config.problem_of("pairs_count", cases.case("paper-d64").problem)
        compile.lower("pairs_count", problem, config.space("pairs_count", problem)[0])

    def work(i):
        worked.append(i)
        if i == 0:
            main = threading.main_thread().ident
            while sys._current_frames()[main].f_code.co_name != "wait":  # a signal just before would wake it late
                time.sleep(0.01)
            time.sleep(0.3)
            signal.pthread_kill(main, signal.SIGINT)
        if not go_on.wait(30):
            raise TimeoutError

    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            spread(range(1000), work)
    finally:
        go_on.set()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 20
    spread(range(1), lambda i: i)
    assert len(worked) < 10


def test_callers_at_once(use, small_blocks):
    """More of them than workers."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 200, 1, 16) for _ in range(3)]
    indices = torch.randint(0, 4, (1, 200, 1, 3), dtype=torch.int32)
    weights = torch.randn(1, 200, 1, 3)
    use(3)

    def run(_):
        return hsa_attention(*tensors, weights, indices, chunk_size=16), build_pairs(indices, 13).pair

    want = run(0)
    with ThreadPoolExecutor(8) as callers:
        for got in callers.map(run, range(40)):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _in_child(queue, want):
    workers.cores = lambda: 3
    torch.set_num_threads(3)
    found = set()
    together = threading.Barrier(3)

    def work(i):
        together.wait(30)
        found.add(threading.get_ident())

    spread(range(3), work)
    q = torch.arange(640.0).view(1, 40, 1, 16) / 640
    got = hsa_attention(q, q, q, torch.ones(1, 40, 1, 1), torch.zeros(1, 40, 1, 1, dtype=torch.int32), chunk_size=16)
    queue.put((len(found), torch.equal(got, want)))


def test_after_a_fork(use):
    use(3)
    q = torch.arange(640.0).view(1, 40, 1, 16) / 640
    want = hsa_attention(q, q, q, torch.ones(1, 40, 1, 1), torch.zeros(1, 40, 1, 1, dtype=torch.int32), chunk_size=16)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, want), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get() == (3, True)


AT_THE_END = """
import atexit, threading, time, torch
from hsa_tl import build_pairs, workers
workers.cores = lambda: 2
torch.set_num_threads(2)
indices = torch.zeros(1, 9, 1, 2, dtype=torch.int32)

def work(i):
    time.sleep(0.5)
    return i

def spread(n):
    build_pairs(indices, 1)
    workers.call(workers.each, range(n), work, found.append)

found = []
atexit.register(lambda: print(sorted(found), build_pairs(indices, 1).offsets.tolist()))
threading.Thread(target=lambda: [spread(n) for n in (2, 3, 4)]).start()
"""


def test_threads_that_outlive_the_main_one():
    """A program's own threads run on when its last line is done; a pool's take no more work then."""
    run = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[0, 0, 0, 1, 1, 1, 2, 2, 3] [0, 18]\n", "")


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


V1 = "sys/fs/cgroup/cpu,cpuacct"
GROUPS = {
    "v2, none": (8, {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}),
    "v2": (2, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}),
    "v2, a share of a core": (1, {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "20000 100000"}),
    "v2, and a half": (3, {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "250000 100000"}),
    "v2, of a parent": (
        3,
        {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 1", "sys/fs/cgroup/a/cpu.max": "3 1"},
    ),
    "v2, seen from inside": (2, {"proc/self/cgroup": "0::/../x", "sys/fs/cgroup/cpu.max": "2 1"}),
    "v1": (4, {"proc/self/cgroup": "3:cpu,cpuacct:/d\n1:memory:/d", f"{V1}/d/cpu.cfs_quota_us": "400000",
               f"{V1}/d/cpu.cfs_period_us": "100000"}),
    "v1, seen from inside": (5, {"proc/self/cgroup": "3:cpu,cpuacct:/docker/d", f"{V1}/cpu.cfs_quota_us": "250000",
                                 f"{V1}/cpu.cfs_period_us": "50000"}),
    "v1, none": (8, {"proc/self/cgroup": "3:cpu,cpuacct:/", f"{V1}/cpu.cfs_quota_us": "-1",
                     f"{V1}/cpu.cfs_period_us": "100000"}),
    "v1 beside v2": (2, {"proc/self/cgroup": "3:cpu,cpuacct:/\n0::/", f"{V1}/cpu.cfs_quota_us": "2",
                         f"{V1}/cpu.cfs_period_us": "1"}),
    "more than there are": (8, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9900000 100000"}),
    "nonsense": (8, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "many"}),
    "no files": (8, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_cores(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    want, files = GROUPS[name]
    _write(tmp_path, files)
    assert workers.cores(tmp_path) == want


def test_cores_of_the_affinity_mask(tmp_path, monkeypatch):
    _write(tmp_path, GROUPS["v1"][1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert workers.cores(tmp_path) == 2


@pytest.mark.parametrize("threads, cores, want", [(4, 2, 2), (2, 4, 2), (1, 4, 1), (3, 1, 1)])
def test_workers_are_no_more_than_threads_and_cores(use, monkeypatch, threads, cores, want):
    use(threads)
    monkeypatch.setattr(workers, "cores", lambda: cores)
    running = set()
    spread(range(100), lambda i: running.add(threading.get_ident()))
    assert 1 <= len(running) <= want
    barrier = threading.Barrier(want)
    spread(range(want), lambda i: barrier.wait(30))


def test_the_gradient_of_one_heads_recency(use):
    """Of so many tokens that PyTorch would share out their sum."""
    dscores, indices = torch.randn(1, 100_000, 1, 2), torch.randint(-1, 9, (1, 100_000, 1, 2), dtype=torch.int32)
    check_any_number(use, lambda: [near.drecency(dscores, indices, None, torch.ones(1), 16, 16, 0)])
