"""Programs that do one thing only, at the rate the machine allows: what `hsa-tl bench micro` times."""

import tilelang.language as T

BLOCK = 64  # rows of a tile


def read_tiles(D: int, dtype: str, rounds: int, tma: bool, stages: int = 3):
    """Each CTA reads tiles [BLOCK, D] in its own order, `stages` in flight, and adds up one row of each."""
    tiles, ctas = T.dynamic("tiles, ctas")

    @T.prim_func
    def read_tiles(
        x: T.Tensor((tiles, BLOCK, D), dtype),
        order: T.Tensor((ctas, rounds), "int32"),
        out: T.Tensor((ctas, D), "float32"),
    ):
        with T.Kernel(ctas, threads=128) as i:
            tile = T.alloc_shared([BLOCK, D], dtype)
            total = T.alloc_fragment([D], "float32")
            T.clear(total)
            for r in T.Pipelined(rounds, num_stages=stages):
                T.copy(x[order[i, r], 0:BLOCK, 0:D], tile, disable_tma=not tma)
                for d in T.Parallel(D):
                    total[d] = total[d] + T.cast(tile[r % BLOCK, d], "float32")
            for d in T.Parallel(D):
                out[i, d] = total[d]

    return read_tiles


def add_tiles(D: int, rounds: int):
    """Each CTA adds a tile of ones to tiles [BLOCK, D] float32 in its own order, by reduce-add."""
    tiles, ctas = T.dynamic("tiles, ctas")

    @T.prim_func
    def add_tiles(order: T.Tensor((ctas, rounds), "int32"), out: T.Tensor((tiles, BLOCK, D), "float32")):
        with T.Kernel(ctas, threads=128) as i:
            ones = T.alloc_fragment([BLOCK, D], "float32")
            T.fill(ones, 1.0)
            for r in T.serial(rounds):
                for m, d in T.Parallel(BLOCK, D):
                    T.atomic_add(out[order[i, r], m, d], ones[m, d])

    return add_tiles


def multiply(D: int, dtype: str, rounds: int, threads: int):
    """Each CTA multiplies one pair of tiles, [BLOCK, D] by [D, BLOCK], again and again: wgmma from 128 threads on."""
    ctas = T.dynamic("ctas")

    @T.prim_func
    def multiply(
        a: T.Tensor((BLOCK, D), dtype), b: T.Tensor((BLOCK, D), dtype), out: T.Tensor((ctas, BLOCK, BLOCK), "float32")
    ):
        with T.Kernel(ctas, threads=threads) as i:
            a_shared, b_shared = T.alloc_shared([BLOCK, D], dtype), T.alloc_shared([BLOCK, D], dtype)
            acc = T.alloc_fragment([BLOCK, BLOCK], "float32")
            T.copy(a, a_shared)
            T.copy(b, b_shared)
            T.clear(acc)
            for _ in T.serial(rounds):
                T.gemm(a_shared, b_shared, acc, transpose_B=True)
            T.copy(acc, out[i, 0:BLOCK, 0:BLOCK])

    return multiply
