"""Bitonic networks over rows of int64 keys in shared memory, for programs that place their own barriers.

A thread takes 8 keys of a row into registers and does up to three steps of the network between two barriers, so shared
memory moves a third of what it would step by step. `at` spreads the keys over the banks: neither the keys of one access
that are neighbours nor those that are a power of two apart share one.
"""

import tilelang.language as T

RADIX = 8  # keys of a thread
MIN_KEYS = 16  # of a row
BARRIER = 3  # of the threads that compute


def at(row, j):
    """Where key j of a row stands."""
    return j ^ (j // RADIX % RADIX) ^ (row % 2 * RADIX)


def _comparators(steps, turn=0):
    """(low, high, falls) among a thread's keys; those at positions with the bit `turn` fall."""
    return [(x, x + s, bool(x & turn)) for s in steps for x in range(RADIX) if not x & s]


def _descent(top):
    """Steps 2^top .. 1 by passes: (distance between the thread's keys, its comparators)."""
    distances = [1 << i for i in range(top, -1, -1)]
    for i in range(0, len(distances), 3):
        steps = distances[i : i + 3]
        apart = steps[-1] if len(steps) == 3 else 1
        yield apart, _comparators([d // apart for d in steps])


def sort_passes(P):
    """(apart, comparators, run) of each pass that sorts P keys; bit `run` of its position turns a thread's order."""
    levels = P.bit_length() - 1
    runs = _comparators([1], 2) + _comparators([2, 1], 4) + _comparators([4, 2, 1])  # of 2, 4 and 8 keys
    rest = [(apart, found, i + 1) for i in range(3, levels) for apart, found in _descent(i)]
    return [(apart, found, run if run < levels else None) for apart, found, run in [(1, runs, 3), *rest]]


def merge_passes(P):
    """As sort_passes, for P keys that first rise and then fall, or the other way round."""
    return [(apart, found, None) for apart, found in _descent(P.bit_length() - 2)]


@T.macro
def _exchange(held, low, high, falls):
    a, b = held[low], held[high]
    held[low] = T.Select(a > b, a, b) if falls else T.Select(a < b, a, b)
    held[high] = a ^ b ^ held[low]


@T.macro
def _run_pass(keys, held, apart, comparators, run, falls, threads):
    rows, P = keys.shape
    for m, c in T.Parallel(rows, P // RADIX):
        first = c // apart * (apart * RADIX) + c % apart
        turn = T.cast(0 - (first >> run) % 2, "int64") if run is not None else T.int64(0)  # ~x sorts the other way
        for x in list(range(RADIX)):
            held[x] = keys[m, at(m, first + x * apart)] ^ turn
        for low, high, other in comparators:
            _exchange(held, low, high, falls != other)
        for x in list(range(RADIX)):
            keys[m, at(m, first + x * apart)] = held[x] ^ turn
    T.sync_threads(BARRIER, threads)


@T.macro
def sort_rows(keys, held, falls, threads):
    """Sorts each row of keys [rows, P]. held: 8 int64 of a thread. All threads have passed a barrier before."""
    for apart, comparators, run in sort_passes(int(keys.shape[1])):
        _run_pass(keys, held, apart, comparators, run, falls, threads)


@T.macro
def keep_best(best, fresh, held, threads):
    """best [rows, P], ascending, and fresh: the P greatest of each row of both, ascending, in best."""
    rows, P = best.shape
    sort_rows(fresh, held, True, threads)
    for m, j in T.Parallel(rows, P):
        best[m, j] = T.max(best[m, j], fresh[m, j])
    T.sync_threads(BARRIER, threads)
    for apart, comparators, run in merge_passes(int(P)):
        _run_pass(best, held, apart, comparators, run, False, threads)
