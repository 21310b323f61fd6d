"""Processes that spin beside a measurement, as on a machine that others use too."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# Ends with the other end of its standard input, so also when the parent is killed.
_SPIN = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
print(flush=True)
while True:
    pass
"""


@contextlib.contextmanager
def neighbours(n: int) -> Iterator[list[int]]:
    """n spinning processes while the block runs; their ids."""
    command = [sys.executable, "-I", "-S", "-c", _SPIN]
    with contextlib.ExitStack() as stack:
        spinning = []
        for _ in range(n):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)  # at the end closes its input and waits
            process.stdout.readline()
            spinning.append(process.pid)
        yield spinning


def describe(n: int) -> str:
    """ "2 busy neighbours"; "" for none."""
    return f"{n} busy neighbour{'s' if n > 1 else ''}" if n else ""
