"""Bitonic networks over rows of int64 keys in shared memory, for programs that place their own barriers.

A thread takes 8 keys of a row into registers and does up to three steps of the network between two barriers, so shared
memory moves a third of what it would step by step. `at` spreads the keys over the banks: neither the keys of one access
that are neighbours nor those that are a power of two apart share one.
"""

import tilelang.language as T

RADIX = 8  # keys of a thread
BARRIER = 3  # of the threads that compute


def at(row, j):
    """Where key j of a row stands. A local takes it before it indexes: of a local, lowering proves nothing."""
    return j ^ (j // RADIX % RADIX) ^ (row % 2 * RADIX)


def comparators(step, turn=0):
    """(low, high, falls) of a step among a thread's keys; those at positions with the bit `turn` fall."""
    return [(x, x + step, bool(x & turn)) for x in range(RADIX) if not x & step]


@T.macro
def exchange(held, pairs, falls):
    for low, high, turned in pairs:
        a, b = held[low], held[high]
        held[low] = T.Select(a > b, a, b) if falls != turned else T.Select(a < b, a, b)
        held[high] = a ^ b ^ held[low]


@T.macro
def descend(keys, held, spot, top, runs, falls, threads):
    """The network's steps 2^top .. 1, top >= 2, over each row of keys [rows, P]. held: 8 int64 of a thread.

    runs: runs of 2 << top keys turn in direction, and with top = 2 they are first made from single keys.
    """
    rows, P = keys.shape
    for i in T.serial(top // 3 + 1):
        # The thread's keys are 1 << e apart; the last pass may have fewer than three steps left.
        e = T.max(top - 3 * i - 2, 0)
        for m, c in T.Parallel(rows, P // RADIX):
            first = ((c >> e) << (e + 3)) + (c & ((1 << e) - 1))
            turn = T.int64(0) - T.cast((c >> (top - 2)) & 1, "int64") if runs else T.int64(0)  # ~x sorts the other way
            for x in list(range(RADIX)):
                spot[x] = at(m, first + (x << e))
                held[x] = keys[m, spot[x]] ^ turn
            if runs:  # noqa: SIM102  (top is known to the program, runs to Python)
                if top == 2:
                    exchange(held, comparators(1, 2), falls)
                    exchange(held, comparators(2, 4), falls)
                    exchange(held, comparators(1, 4), falls)
            if top - 3 * i >= 2:
                exchange(held, comparators(4), falls)
            if top - 3 * i >= 1:
                exchange(held, comparators(2), falls)
            exchange(held, comparators(1), falls)
            for x in list(range(RADIX)):
                keys[m, spot[x]] = held[x] ^ turn
        T.sync_threads(BARRIER, threads)


@T.macro
def sort_rows(keys, held, spot, levels, falls, threads):
    """Sorts each row of keys [rows, 1 << levels], levels >= 4. All threads have passed a barrier before."""
    for i in T.serial(levels - 2):
        descend(keys, held, spot, i + 2, True, falls, threads)


@T.macro
def keep_best(best, fresh, held, spot, levels, threads):
    """best [rows, 1 << levels], ascending, and fresh: the greatest of each row of both, ascending, in best."""
    rows, P = best.shape
    sort_rows(fresh, held, spot, levels, True, threads)
    for m, j in T.Parallel(rows, P):
        best[m, j] = T.max(best[m, j], fresh[m, j])
    T.sync_threads(BARRIER, threads)
    descend(best, held, spot, levels - 1, False, False, threads)


@T.macro
def halve_rows(keys, held, spot, levels, threads):
    """keys [rows, 1 << levels], rows a power of two, each ascending: row 0 becomes the greatest of all, ascending."""
    rows, P = keys.shape
    for half in [rows >> (x + 1) for x in range(rows.bit_length() - 1)]:
        for m, j in T.Parallel(half, P):
            spot[0] = at(m, j)
            spot[1] = at(m + half, P - 1 - j)
            keys[m, spot[0]] = T.max(keys[m, spot[0]], keys[m + half, spot[1]])
        T.sync_threads(BARRIER, threads)
        descend(keys, held, spot, levels - 1, False, False, threads)
