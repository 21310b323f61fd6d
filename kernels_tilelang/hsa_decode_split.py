"""out[t] = sum_k weights[t, k] * softmax(q[t] . K[page]^T * scale) V[page], page = page_table[indices[t, k]]: decode.

One CTA owns a token, a key/value head and one of num_splits ranges of its K slots: the G query heads are the rows,
padded to a multiple of 16. The pages of its slots stream through shared memory; the output stays in registers. Each
page's softmax is its own, so the ranges' outputs just add up: with one range the CTA stores the output itself, with
more a float32 partial that `hsa_decode_combine` sums.
An empty slot reads `spare`, the page of another slot of the range, with weight 0.
"""

from dataclasses import dataclass, replace

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import TokenConfig, first_legal, padded_rows
from hsa_tl.kernels_tilelang.macros import LOG2E, exp_rows, finish_rows, running_rows


def preferred_splits(p, sms: int = 132) -> int:
    """The least power of two that gives each SM two CTAs, or the most that leaves each CTA a slot."""
    splits = 1
    while 2 * splits <= p.K and splits * p.B * p.T * p.H < 2 * sms:
        splits *= 2
    return splits


def most_splits(p) -> int:
    """The largest power of two of at most K."""
    return 1 << (p.K.bit_length() - 1)


def split_counts(p) -> tuple[int, ...]:
    """Those worth having a program for, the preferred one first."""
    return tuple(dict.fromkeys((preferred_splits(p), 1, min(8, most_splits(p)), most_splits(p))))


@dataclass(frozen=True)
class DecodeSplitConfig(TokenConfig):
    num_splits: int = 1
    DIRECTION = "decode"

    def ctas(self, p):
        return p.B * p.H * p.T * self.num_splits

    def chunk_reads(self, p):
        return 0.0  # pair_bytes has them, from HBM

    def pair_bytes(self, p):
        out = p.itemsize if self.num_splits == 1 else 4 * self.num_splits
        moved = p.chunk_bytes() + p.G * p.D * (p.itemsize * self.num_splits + out) / p.K
        return {"l2": moved, "hbm": moved}  # no token shares a page with another

    def smem_bytes(self, p):
        return super().smem_bytes(p) + 4 * -(-p.K // self.num_splits)

    def refusal(self, p):
        if not 1 <= self.num_splits <= p.K:
            return f"num_splits must be 1 to K = {p.K}, got {self.num_splits}"
        return super().refusal(p)

    @classmethod
    def options(cls, p):
        first, *others = split_counts(p)
        usual = [cls(*x, first) for x in ((128, 2), (128, 3), (64, 2))] + [cls(128, 2, n) for n in others]
        # A lone warp and an unpipelined loop are for shapes that nothing better fits.
        rest = [cls(*x, n) for n in (first, *others) for x in ((128, 1), (64, 1), (32, 2), (32, 1))]
        return first_legal(p, usual, rest)

    def filling(self, p, sms: int) -> "DecodeSplitConfig":
        """With as many ranges of slots as fill a GPU of so many SMs."""
        return replace(self, num_splits=preferred_splits(p, sms))

    @classmethod
    def on_cpu(cls, p):
        return cls(num_splits=2 if p.T == 1 < p.K else 1)


def hsa_decode_split(*, G, D, S, K, heads_w, dtype, min_blocks, config: DecodeSplitConfig, weighs=True):
    """weighs False: selected_decode_split has no weights but one softmax over all chunks, and lse."""
    rows, splits = padded_rows(G), config.num_splits
    slots = -(-K // splits)  # of a CTA
    B, tokens, N, H, P = T.dynamic("B, tokens, N, H, P")

    @T.prim_func
    def hsa_decode_split(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k_pages: T.Tensor((P, S, H, D), dtype),
        v_pages: T.Tensor((P, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32") if weighs else None,
        indices: T.Tensor((B, tokens, H, K), "int32"),
        page_table: T.Tensor((B, N), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, splits, G, D), dtype if splits == 1 else "float32"),
        lse: None if weighs else T.Tensor((B, tokens, H, splits, G), "float32"),
    ):
        with T.Kernel(tokens * splits, H, B, threads=config.threads) as (i_x, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.disable_warp_group_reg_alloc()
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            p_shared = T.alloc_shared([rows, S], dtype)
            o_shared = T.alloc_shared([rows, D], out.dtype)
            page_shared = T.alloc_shared([slots], "int32")
            weights_shared = T.alloc_shared([heads_w, slots], "float32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max, row_last, row_sum, row_part = (T.alloc_fragment([rows], "float32") for _ in range(4))
            chosen = T.alloc_fragment([rows], "int32")
            spare = T.alloc_var("int32")

            i_t = i_x // splits
            first = i_x % splits * slots
            for i in T.Parallel(slots):  # -1: none. Every address is clamped: nothing is out of bounds
                chunk = indices[i_b, i_t, i_h, T.min(first + i, K - 1)]
                page = page_table[i_b, T.max(T.min(chunk, N - 1), 0)]
                valid = (first + i < K) & (chunk >= 0) & (chunk < N) & (page >= 0) & (page < P)
                page_shared[i] = T.if_then_else(valid, page, -1)
            T.sync_threads()
            spare = -1
            for i_k in T.serial(slots):
                spare = T.max(spare, page_shared[i_k])
            for r, d in T.Parallel(rows, D):
                q_shared[r, d] = T.if_then_else(r < G, q[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            if weighs:
                for r, i_k in T.Parallel(heads_w, slots):
                    weight = weights[i_b, i_t, i_h, r, T.min(first + i_k, K - 1)]
                    weights_shared[r, i_k] = T.if_then_else(page_shared[i_k] >= 0, weight, 0.0)
            # All threads fill the tiles above; automatic warp specialisation puts no barrier behind them.
            T.sync_threads()
            T.clear(acc_o)
            if not weighs:
                T.clear(row_sum)
                T.fill(row_max, -T.infinity("float32"))

            for i_k in T.Pipelined(slots, num_stages=config.num_stages):
                i_p = T.if_then_else(page_shared[i_k] >= 0, page_shared[i_k], T.max(spare, 0))
                T.copy(k_pages[i_p, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(q_shared, k_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                if weighs:
                    exp_rows(acc_s, row_max, row_sum, rows, S, scale * LOG2E, None)
                    for r in T.Parallel(rows):
                        row_sum[r] = weights_shared[T.min(r, heads_w - 1), i_k] / row_sum[r]
                    for r, s in T.Parallel(rows, S):
                        p_shared[r, s] = acc_s[r, s] * row_sum[r]
                else:
                    for r in T.Parallel(rows):
                        chosen[r] = T.if_then_else(page_shared[i_k] >= 0, 1, 0)
                    running_rows(
                        acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E, None
                    )
                    T.copy(acc_s, p_shared)
                T.copy(v_pages[i_p, :, i_h, :], v_shared)
                T.gemm(p_shared, v_shared, acc_o, policy=T.GemmWarpPolicy.FullCol)  # [rows, D]

            if not weighs:
                finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, o_shared)
            for r, d in T.Parallel(G, D):
                out[i_b, i_t, i_h, i_x % splits, r, d] = T.if_then_else(spare >= 0, o_shared[r, d], 0)
            if not weighs:
                for r in T.Parallel(rows):
                    if r < G:
                        lse[i_b, i_t, i_h, i_x % splits, r] = row_max[r]

    return hsa_decode_split
