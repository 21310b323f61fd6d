"""out[t] = sum_k weights[t, k] * softmax(q[t] . K[c]^T * scale) V[c], c = indices[t, k]: union-tile forward.

One CTA owns block_M // G neighbouring tokens of a key/value head: block_M rows. It walks the union of their chunks
once, each chunk streaming through shared memory, and the output stays in registers. A chunk's softmax is complete
within its tile, so the output is never rescaled; the weight over the row sum folds into P before the cast and is 0 for
a token that did not choose the chunk. When all choose every chunk this is dense attention without a running maximum.
union_index says what to walk: for each tile the ascending union, as often as one token chose a chunk, and for each
token its slots in ascending order. A row keeps a cursor into its own slots: they and the union ascend alike.
Keys and values must be finite: 0 * inf would reach the tokens of the tile that did not choose the chunk.
"""

from dataclasses import dataclass
from itertools import product

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import (
    PRODUCER_REGISTERS,
    SMEM_ALIGNMENT,
    Config,
    registers_left,
    row_bytes,
    union_chunks,
)
from hsa_tl.kernels_tilelang.macros import (
    LOG2E,
    exp_rows,
    finish_rows,
    load_slots,
    running_rows,
    union_chosen,
    union_weights,
)


@dataclass(frozen=True)
class FwdUnionConfig(Config):
    """A CTA owns block_M // G neighbouring tokens, a warpgroup 64 rows; num_stages chunks of their union in flight.

    q_registers: q stays in registers, since a wgmma of 64 keys with both operands in shared memory takes all of its
    bandwidth. blocks: CTAs of an SM, 0 for as many as fit.
    """

    block_M: int = 128
    num_stages: int = 2
    q_registers: int = 0
    blocks: int = 0
    DIRECTION = "forward"
    producer = True
    moves_registers = True
    OPTIONS = ((192, 2), (128, 2), (64, 2), (64, 3))
    RESERVE = ((128, 1), (64, 1))
    VARIANTS = tuple(product((192, 128, 64), (2, 3, 4, 1), (0, 1), (0, 1, 2)))

    @property
    def threads(self):
        return 2 * self.block_M

    def ctas(self, p):
        return p.B * p.H * -(-p.T // self.pairs(p))

    def pairs(self, p):
        return self.block_M // p.G  # when all tokens of the tile chose the chunk

    def again(self, p, overlap):
        read = union_chunks(p, self.pairs(p), overlap)
        return read, read

    def pair_bytes(self, p):
        moved = 2 * row_bytes(p) / p.K
        return {"l2": p.chunk_bytes() / self.pairs(p) + moved, "hbm": moved}

    def smem_bytes(self, p):
        tiles = self.block_M * p.D + 2 * self.num_stages * p.S * p.D
        slots = self.pairs(p) * p.K * 4 * (2 + (p.G if p.per_head else 1))
        return tiles * p.itemsize + slots + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * (p.D + p.S + p.D * p.itemsize // 4 * self.q_registers)

    def refusal(self, p):
        if self.block_M not in (64, 128, 192) or self.block_M < p.G:
            return f"block_M must be 64, 128 or 192 and at least G = {p.G}, got {self.block_M}"
        return None

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(64, p.G))


def hsa_fwd_union(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: FwdUnionConfig, weighs=True):
    """weighs False: selected_fwd_union has no weights but one softmax over all chunks, and lse."""
    rows = config.block_M
    tile = rows // G  # tokens; rows past tile * G are padding
    B, tokens, N, H, tiles = T.dynamic("B, tokens, N, H, tiles")

    @T.prim_func
    def hsa_fwd_union(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32") if weighs else None,
        indices: T.Tensor((B, tokens, H, K), "int32"),
        order: T.Tensor((B, tokens, H, K), "int32"),
        union_chunks: T.Tensor((B, tiles, H, tile * K), "int32"),
        union_groups: T.Tensor((B, tiles, H, tile * K), "int32"),  # read by hsa_fwd_union_sm90a
        union_len: T.Tensor((B, tiles, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: None if weighs else T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tiles, H, B, threads=config.threads) as (i_tile, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(registers_left(config, min_blocks))
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            union_shared = T.alloc_shared([tile * K], "int32")
            chunk_shared = T.alloc_shared([tile, K], "int32")
            weights_shared = T.alloc_shared([tile * heads_w, K], "float32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            p = T.alloc_fragment([rows, S], dtype)
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max, row_last, row_sum, row_part = (T.alloc_fragment([rows], "float32") for _ in range(4))
            chosen, cursor = (T.alloc_fragment([rows], "int32") for _ in range(2))

            for r, d in T.Parallel(rows, D):
                i_t = i_tile * tile + r // G
                inside = (r < tile * G) & (i_t < tokens)
                q_shared[r, d] = T.if_then_else(inside, q[i_b, T.min(i_t, tokens - 1), i_h, r % G, d], 0)
            for i_u in T.Parallel(tile * K):
                union_shared[i_u] = union_chunks[i_b, i_tile, i_h, i_u]
            load_slots(
                indices, weights if weighs else None, order, chunk_shared, weights_shared, i_tile * tile, tokens, tile,
                K, heads_w, i_h, i_b,
            )  # fmt: skip
            # All threads fill the tiles above; automatic warp specialisation puts no barrier behind them.
            T.sync_threads()
            if config.q_registers:
                q_local = T.alloc_fragment([rows, D], dtype)
                T.copy(q_shared, q_local)
            T.clear(acc_o)
            if not weighs:
                T.clear(row_sum)
                T.fill(row_max, -T.infinity("float32"))
            T.clear(cursor)

            for i_u in T.Pipelined(union_len[i_b, i_tile, i_h], num_stages=config.num_stages):
                i_c = union_chunks[i_b, i_tile, i_h, i_u]
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(
                    q_local if config.q_registers else q_shared, k_shared, acc_s, transpose_B=True,
                    policy=T.GemmWarpPolicy.FullRow,
                )  # [rows, S]  # fmt: skip
                if weighs:
                    exp_rows(acc_s, row_max, row_sum, rows, S, scale * LOG2E, chunk_len[i_c] if masked else None)
                    union_weights(
                        row_sum, cursor, union_shared[i_u], chunk_shared, weights_shared, 0, rows, G, tile, heads_w
                    )
                    for r, s in T.Parallel(rows, S):
                        p[r, s] = acc_s[r, s] * row_sum[r]
                else:
                    union_chosen(chosen, cursor, union_shared[i_u], chunk_shared, rows, G, tile)
                    running_rows(
                        acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E,
                        chunk_len[i_c] if masked else None,
                    )  # fmt: skip
                    T.copy(acc_s, p)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                T.gemm(p, v_shared, acc_o, policy=T.GemmWarpPolicy.FullRow)  # [rows, D]

            if not weighs:
                finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, q_shared)
            for r, d in T.Parallel(tile * G, D):
                if i_tile * tile + r // G < tokens:
                    out[i_b, i_tile * tile + r // G, i_h, r % G, d] = q_shared[r, d]
            if not weighs:
                for r in T.Parallel(tile * G):  # a guard r < tile * G would take TileLang's prover half a minute
                    if i_tile * tile + r // G < tokens:
                        lse[i_b, i_tile * tile + r // G, i_h, r % G] = row_max[r]

    return hsa_fwd_union
