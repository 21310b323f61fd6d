"""The chunk encoder and the HSA layer (paper, section 2 and figure 3), on the public operator.

Shape suffixes, of the other layers too: B batch, T tokens, C channels, P past and new tokens, N chunks, S chunk size,
A query heads, H key/value heads, G = A / H, D head dim, R retrieval heads, E retrieval dim, K selected chunks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl import fusion_weights, top_p_chunks
from hsa_tl.model.attention import positions, rotate
from hsa_tl.model.chunk_memory import ChunkMemory, Memory
from hsa_tl.model.config import FUSIONS
from hsa_tl.model.mlp import RMSNorm, SwiGLU
from hsa_tl.validation import require, require_chunk_size, require_int, require_shape, require_tensor

# At first. AdamW moves it by at most the learning rate a step: from near 0 it would stay there (docs/long-context.md).
RECENCY = 4.0


def _require_sizes(**sizes: int | None) -> None:
    for name, n in sizes.items():
        if n is not None:
            require_int(name, n, 1)


def _require_hidden(x_BTC: torch.Tensor, dim: int) -> None:
    require_tensor("x_BTC", x_BTC, 3)
    require_shape("x_BTC", x_BTC, ("B", "T >= 1", dim), "as hidden states")


class EncoderBlock(nn.Module):
    """Bidirectional attention and SwiGLU over [B, T, C], all tokens seeing all."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = RMSNorm(dim), RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = SwiGLU(dim, mlp_dim)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x_BTC)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_BTC = x_BTC + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class ChunkEncoder(nn.Module):
    """Where landmarks come from: bidirectional blocks within each chunk of S tokens and its [CLS].

    The tokens give keys and values, [CLS] gives the chunk's landmark. No chunk sees another, but the last tokens before
    it where `overlap` says so; these give nothing themselves.

    Args:
        dim (int): C, of the hidden states.
        kv_heads (int): H.
        head_dim (int): D.
        retrieval_dim (int): D_r.
        chunk_size (int): S.
        heads (int): of the blocks' attention. Default: 4.
        retrieval_heads (int): R. Default: kv_heads.
        layers (int): blocks. Default: 1.
        mlp_dim (int): of the blocks. Default: dim.
        rope_theta (float): base of RoPE on the keys. Default: None, no positions.
        std (float): of the initial [CLS] and of the positions within a chunk. Default: 0.02.
        landmark_norm (bool): see `ModelConfig`. Default: True.
        overlap (int): see `ModelConfig.encoder_overlap`. Default: 0.

    Example:
        >>> memory = ChunkEncoder(32, kv_heads=1, head_dim=16, retrieval_dim=8, chunk_size=16)(torch.randn(2, 40, 32))
        >>> memory.k.shape, memory.landmarks.shape
        (torch.Size([2, 48, 1, 16]), torch.Size([2, 3, 1, 8]))
    """

    def __init__(
        self, dim: int, kv_heads: int, head_dim: int, retrieval_dim: int, chunk_size: int, *, heads: int = 4,
        retrieval_heads: int | None = None, layers: int = 1, mlp_dim: int | None = None,
        rope_theta: float | None = None, std: float = 0.02, landmark_norm: bool = True, overlap: int = 0,
    ):  # fmt: skip
        super().__init__()
        sizes = {"dim": dim, "kv_heads": kv_heads, "head_dim": head_dim, "retrieval_dim": retrieval_dim, "heads": heads}
        _require_sizes(**sizes, retrieval_heads=retrieval_heads)
        require_chunk_size(chunk_size)
        require_int("overlap", overlap, 0)
        require(dim % heads == 0, "dim", f"be a multiple of heads = {heads}", dim)
        self.chunk_size, self.overlap, self.kv_heads, self.rope_theta = chunk_size, overlap, kv_heads, rope_theta
        self.retrieval_heads = kv_heads if retrieval_heads is None else retrieval_heads
        self.cls_C = nn.Parameter(torch.randn(dim) * std)
        self.position_SC = nn.Parameter(torch.randn(overlap + chunk_size + 1, dim) * std)
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, mlp_dim or dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.landmark = nn.Linear(dim, self.retrieval_heads * retrieval_dim, bias=False)
        self.k_norm = RMSNorm(head_dim)
        self.landmark_norm = RMSNorm(retrieval_dim) if landmark_norm else None

    def forward(
        self, x_BTC: torch.Tensor, start: int | torch.Tensor = 0, past_BPC: torch.Tensor | None = None
    ) -> ChunkMemory:
        """Encodes the chunks of hidden states.

        Args:
            x_BTC (Tensor [B, T, C]): hidden states that begin at a chunk's first token. A last chunk shorter than S is
                padded; no token may retrieve it before it is whole.
            start (int or Tensor [B]): absolute position of the first token, for keys with RoPE. Default: 0.
            past_BPC (Tensor [B, overlap, C]): hidden states before x. Default: None, zeros.

        Returns:
            ChunkMemory: of N = ceil(T / S) chunks.
        """
        _require_hidden(x_BTC, len(self.cls_C))
        B, T, C = x_BTC.shape
        S, P = self.chunk_size, self.overlap
        N = (T + S - 1) // S
        if past_BPC is not None:
            require_tensor("past_BPC", past_BPC, 3)
            require_shape("past_BPC", past_BPC, (B, P, C), "what the first chunk overlaps")
            x_BTC = torch.cat([past_BPC, x_BTC], 1)
        x = F.pad(x_BTC, (0, 0, P if past_BPC is None else 0, N * S - T))
        x = x.unfold(1, P + S, S).transpose(2, 3).flatten(0, 1)  # [B * N, P + S, C]
        x = torch.cat([x, self.cls_C.expand(B * N, 1, C)], 1) + self.position_SC
        for block in self.blocks:
            x = block(x)
        cls, x = x[:, -1], self.norm(x[:, P:])
        k, v = self.kv(x[:, :S]).unflatten(-1, (2, self.kv_heads, -1)).unflatten(0, (B, N)).flatten(1, 2).unbind(2)
        k = rotate(self.k_norm(k), positions(start, k), self.rope_theta)
        landmarks = self.landmark(x[:, S] if self.landmark_norm else cls)
        landmarks = landmarks.unflatten(-1, (self.retrieval_heads, -1)).unflatten(0, (B, N))
        if self.landmark_norm:
            landmarks = self.landmark_norm(landmarks)
        return ChunkMemory(k.to(v.dtype), v, landmarks.to(v.dtype))


class HSALayer(nn.Module):
    """Retrieve, weigh, attend: queries with QK-norm and no positional encoding over a chunk memory that layers share.

    Norms bound both logits, so a learned scale multiplies each: attention's by 4 at first, retrieval's by 8.

    Args:
        dim (int): C, of the hidden states.
        heads (int): HQ.
        kv_heads (int): H.
        head_dim (int): D.
        retrieval_dim (int): D_r.
        topk (int or "all"): K; "all" takes every chunk there is, without a selection. Default: 64.
        exclude_window (int): see `hsa_tl.retrieve_chunks`. Default: 0.
        fusion (str): a kind of `hsa_tl.fusion_weights`, or as in `ModelConfig`. Default: "softmax".
        retrieval_heads (int): R; each retrieves for its share of the key/value heads. Default: kv_heads.
        rope_theta (float): base of RoPE on the queries. Default: None, no positions.
        impl (str): of the operators, retrieval's too. "dense", for topk="all", takes masked products over every chunk
            of a ChunkMemory, fast for some hundred tokens; operators read another memory. Default: "auto".
        selection_overlap (float): see `hsa_tl.selection_overlap`. Default: 0.9.
        recency (int): recency_span of `hsa_tl.retrieve_chunks`, whose recency is then learned for each retrieval head,
            from 4 on. Default: None, there is none.
        topp (float): see `hsa_tl.top_p_chunks`. Default: 1.0, all chosen chunks are read.
        mass_power (float): see `ModelConfig`. Default: 1.0.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, retrieval_dim: int, *, topk: int | str = 64,
        exclude_window: int = 0, fusion: str = "softmax", retrieval_heads: int | None = None,
        rope_theta: float | None = None, impl: str = "auto", selection_overlap: float = 0.9,
        recency: int | None = None, topp: float = 1.0, mass_power: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "retrieval_dim": retrieval_dim}
        _require_sizes(**sizes, retrieval_heads=retrieval_heads, topk=None if topk == "all" else topk)
        require(heads % kv_heads == 0, "heads", f"be a multiple of kv_heads = {kv_heads}", heads)
        require(kv_heads % (retrieval_heads or 1) == 0, "retrieval_heads", f"divide {kv_heads}", retrieval_heads)
        require_int("exclude_window", exclude_window, 0)
        if recency is not None:
            require_int("recency", recency, 2)
        require(0 < topp <= 1, "topp", "lie in (0, 1]", topp)
        require(mass_power > 0, "mass_power", "be positive", mass_power)
        require(mass_power == 1 or fusion == "mass", "mass_power", 'be 1 without fusion "mass"', mass_power)
        require(impl != "dense" or topk == "all", "impl", 'not be "dense" unless topk is "all"', repr(impl))
        require(fusion in FUSIONS, "fusion", f"be one of {', '.join(FUSIONS)}", repr(fusion))
        self.heads, self.kv_heads = heads, kv_heads
        self.retrieval_heads = kv_heads if retrieval_heads is None else retrieval_heads
        self.topk, self.exclude_window, self.fusion = topk, exclude_window, fusion
        self.rope_theta, self.impl, self.selection_overlap = rope_theta, impl, selection_overlap
        self.recency_span, self.topp, self.mass_power = recency, topp, mass_power
        self.norm = RMSNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.q_slc = nn.Linear(dim, self.retrieval_heads * retrieval_dim, bias=False)
        self.q_norm, self.q_slc_norm = RMSNorm(head_dim), RMSNorm(retrieval_dim)
        self.log_scale = nn.Parameter(torch.tensor([math.log(4.0)]))
        self.log_slc_scale = nn.Parameter(torch.tensor([math.log(8.0)]))
        self.recency_R = None  # a softplus keeps it positive
        if recency is not None:
            start = math.log(math.expm1(RECENCY))
            self.recency_R = nn.Parameter(torch.full((self.retrieval_heads,), start))
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def queries(self, x_BTC: torch.Tensor, start: int | torch.Tensor = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Of attention [B, T, A, D] and of retrieval [B, T, R, E]."""
        x = self.norm(x_BTC)
        q, q_slc = self.q(x), self.q_slc(x)
        dtype = q.dtype
        q_BTAD = self.q_norm(q.unflatten(-1, (self.heads, -1))) * self.log_scale.exp()
        q_BTRE = self.q_slc_norm(q_slc.unflatten(-1, (self.retrieval_heads, -1))) * self.log_slc_scale.exp()
        return rotate(q_BTAD, positions(start, x), self.rope_theta).to(dtype), q_BTRE.to(dtype)

    def mix(
        self, x_BTC: torch.Tensor, memory: Memory, start: int | torch.Tensor = 0, lse_BTA: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """forward, and the weight [B, T, A] that fusion "joint" leaves to the window of log-sum-exp lse."""
        _require_hidden(x_BTC, self.q.in_features)
        q_BTAD, q_BTRE = self.queries(x_BTC, start)
        impl = "auto" if self.impl == "dense" else self.impl
        options: dict = {"exclude_window": self.exclude_window}
        if self.recency_R is not None:
            options |= {"recency": F.softplus(self.recency_R), "recency_span": self.recency_span}
        if self.topk == "all":
            scores_BTRK = memory.scores(q_BTRE, start, **options)
            every = torch.arange(scores_BTRK.shape[-1], dtype=torch.int32, device=x_BTC.device)
            indices_BTRK = torch.where(scores_BTRK == -torch.inf, -1, every)
        else:
            scores_BTRK, indices_BTRK = memory.retrieve(q_BTRE, start, self.topk, impl=impl, **options)
        scores_BTRK, indices_BTRK = top_p_chunks(scores_BTRK, indices_BTRK, self.topp)
        share = self.kv_heads // self.retrieval_heads
        indices_BTHK = indices_BTRK.repeat_interleave(share, 2) if share > 1 else indices_BTRK
        dense = self.impl == "dense" and isinstance(memory, ChunkMemory) and self.fusion != "one_softmax"
        window_BTA = weights = None
        if self.fusion == "joint":
            weights, window_BTA = fusion_weights(scores_BTRK, "joint", lse_BTA)  # [B, T, A, K]
        elif self.fusion == "mass":
            masses_BTAK = memory.masses_all(q_BTAD) if dense else memory.masses(q_BTAD, indices_BTHK, impl=impl)
            scores_BTAK = scores_BTRK.repeat_interleave(self.heads // self.retrieval_heads, 2)
            weights = fusion_weights(self.mass_power * (scores_BTAK + masses_BTAK))
        elif self.fusion == "uniform":
            weights = fusion_weights(torch.zeros_like(scores_BTRK).masked_fill(indices_BTRK < 0, -torch.inf))
        elif self.fusion == "detached":
            weights = fusion_weights(scores_BTRK.detach())
        elif self.fusion != "one_softmax":
            weights = fusion_weights(scores_BTRK, self.fusion)
        if dense:
            return self.out(memory.attend_all(q_BTAD, weights).flatten(2)), window_BTA
        if weights is not None and weights.shape[2] < self.kv_heads:
            weights = weights.repeat_interleave(share, 2)
        out_BTAD = memory.attend(q_BTAD, weights, indices_BTHK, impl=impl, overlap=self.selection_overlap)
        return self.out(out_BTAD.flatten(2)), window_BTA

    def forward(self, x_BTC: torch.Tensor, memory: Memory, start: int | torch.Tensor = 0) -> torch.Tensor:
        """What the layer adds to the residual stream. A token with no visible chunk gets exactly 0.

        Args:
            x_BTC (Tensor [B, T, C]): hidden states.
            memory (ChunkMemory or PagedMemory): the chunks.
            start (int, or Tensor [B] int32 for a PagedMemory): absolute position of the first token. Default: 0.

        Returns:
            Tensor [B, T, C].

        Raises:
            ValueError: fusion "joint", which shares its weights with the window of a Model's layer.
        """
        require(self.fusion != "joint", "fusion", 'not be "joint" without the window of a Model\'s layer', "'joint'")
        return self.mix(x_BTC, memory, start)[0]
