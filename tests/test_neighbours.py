"""Spinning neighbours: they are there, rows say so, and they never outlive who started them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsa_tl import cases
from hsa_tl.bench.attention import Attention
from hsa_tl.bench.sweep import Sweep
from hsa_tl.bench.timing import neighbours

CASE = dataclasses.replace(
    cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 128, HQ=2, D=16, S=16, K=2)
)


PARENT = """
import time
from hsa_tl.bench.timing import neighbours
with neighbours(2) as pids:
    print(*pids, flush=True)
    time.sleep(600)
"""


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_they_spin_and_end():
    with neighbours(2) as pids:
        assert len(set(pids)) == 2
        for pid in pids:
            wait_for(lambda pid=pid: cpu_ticks(pid) > 10)
    assert all(map(is_gone, pids))


def test_they_end_with_an_error():
    with pytest.raises(ValueError, match="mine"), neighbours(1) as pids:
        raise ValueError("mine")
    assert is_gone(pids[0])


def test_they_die_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(is_gone, pids))
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: all(map(is_gone, pids)))


def test_rows_say_so_and_stand_beside_quiet_ones(tmp_path):
    def sweep(busy):
        options = {"out_dir": tmp_path, "threads": 1, "min_repeats": 1, "seconds": 0.0}
        rows = Sweep(Attention(), CASE, [64], ["forward"], ["hsa-reference"], busy=busy, **options).run()
        return next(r for r in rows if r.metric == "time")

    quiet, one, two = map(sweep, (0, 1, 2))
    assert "neighbour" not in quiet.device + quiet.note
    assert one.device == f"{quiet.device}, 1 busy neighbour" and "1 busy neighbour" in one.note
    assert "2 busy neighbours" in two.note
    assert (tmp_path / "bench.csv").read_text().count(",time,") == 3


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="busy must be at least 0, got -1"):
        Sweep(Attention(), CASE, [64], busy=-1)
