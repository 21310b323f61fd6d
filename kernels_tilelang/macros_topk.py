"""Keys of the retrieval programs: a score and its chunk as one int64, and the K best of them ascending by chunk.

A score becomes an integer that sorts alike (NaN above all, as for torch); below it chunks count down from LAST, so that
of equal scores the lower chunk has the greater key. No two keys of a token are equal.
"""

import tilelang.language as T

from hsa_tl.kernels_tilelang.macros_sort import BARRIER, at, sort_rows

NONE = 1 - 2**31  # below the integer of every score
NAN = 2**31 - 1
LAST = 2**31 - 1  # in a key, chunks count down from here
EMPTY = NONE * 2**32  # key of no chunk
BEHIND = 2**63 - 1  # by chunk: sorts behind all


def ordered(s, dtype):
    """An integer that sorts like the float32 s, but -0 just below 0."""
    bits = T.reinterpret(s, "int32")
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # On the GPU a product's NaN is 0x7fffffff; the CPU, which alone runs float32, may give it a sign.
    return T.if_then_else(T.isnan(s), NAN, key) if dtype == "float32" else key


def key_of(score, chunk):
    """The key of an ordered score and its chunk."""
    return (T.cast(T.if_then_else(score == -1, 0, score), "int64") << 32) + (LAST - chunk)  # -0 equals 0


def score_of(key):
    """The ordered score of a key."""
    return T.cast(key >> 32, "int32")


@T.macro
def by_chunk(best, out, held, spot, levels, worst, threads):
    """out [rows, 1 << levels]: each row's keys of best, ascending, from place `worst` on, now ascending by chunk.

    The score and the chunk change places; what is no chunk comes last, as BEHIND.
    """
    rows, P = out.shape
    for m, n in T.Parallel(rows, P):
        spot[0] = at(m, n)
        held[0] = best[m, spot[0]]
        turned = (LAST - (held[0] % 2**32)) * 2**32 + ((held[0] >> 32) & 0xFFFFFFFF)
        out[m, spot[0]] = T.if_then_else((n < worst) | (held[0] == EMPTY), T.int64(BEHIND), turned)
    T.sync_threads(BARRIER, threads)
    sort_rows(out, held, spot, levels, False, threads)


def slot_score(found):
    """The float32 score of a key that `by_chunk` turned, -inf where there is none."""
    bits = T.cast(found & 0xFFFFFFFF, "int32")
    score = T.reinterpret(bits ^ ((bits >> 31) & 0x7FFFFFFF), "float32")
    return T.if_then_else(found == BEHIND, -T.infinity("float32"), score)


def slot_chunk(found):
    """The chunk of a key that `by_chunk` turned, -1 where there is none."""
    return T.if_then_else(found == BEHIND, -1, T.cast(found >> 32, "int32"))


def visible_chunks(position, chunk_size, window, held):
    """Chunks that a token may retrieve: whole ones in its past, not all inside its window, at most `held`."""
    outside = T.max((position - window) // chunk_size + 1, 0)
    return T.min(T.min(position // chunk_size, outside), held)
