"""HSA-UltraLong (paper, figure 3): a lower decoder, one chunk memory, an upper decoder that reads it.

    embed -> lower layers -> encode -> upper layers (the first of each group with HSA) -> head

Shape suffixes: as in hsa_tl.model.hsa; V vocabulary.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsa_tl.model.attention import SelfAttention
from hsa_tl.model.cache import Cache
from hsa_tl.model.chunk_memory import BatchMemory, ChunkMemory, Memory
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.generate import Generation
from hsa_tl.model.hsa import ChunkEncoder, HSALayer
from hsa_tl.model.linear import LinearAttention
from hsa_tl.model.mlp import MoE, RMSNorm, ShortConv, SwiGLU
from hsa_tl.model.moba import MixtureOfBlockAttention
from hsa_tl.model.nsa import NativeSparseAttention
from hsa_tl.model.selected import Rule, SelectedAttention
from hsa_tl.validation import require, require_float, require_int, require_integers, require_shape, require_tensor

HEAD_ROWS = 4096  # rows of logits that the loss holds at once


class ModelOutput(NamedTuple):
    """What `Model.forward` returns.

    Args:
        logits (Tensor [B, T, V]): of all positions or of the last `logits_to_keep`; None where none were asked for.
        loss (Tensor, scalar): None without labels.
        cache (Cache): the one that was given, or None.
    """

    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    cache: object | None = None


class Layer(nn.Module):
    """Attention (over a window, with what reads further beside it) and a feed-forward layer, both on the residual."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c, kind = config, config.kinds[index]
        rope = dict.fromkeys(c.rope, c.rope_frequencies or c.rope_theta)
        heads = c.dim, c.heads, c.kv_heads, c.head_dim
        window, theta = (None, rope.get(kind)) if kind in ("full", "moba") else (c.window, rope.get("swa"))
        if kind in ("hsa", "nsa"):
            window, theta = c.hsa_window or window, theta if c.hsa_window_rope else None
        exclude = window if c.exclude_window else 0
        residual = c.value_residual if index else "none"
        options = {"value_residual": residual, "eps": c.norm_eps, "qk_norm": c.qk_norm, "biases": c.biases}
        own = {"window": window, "rope_theta": theta}
        chosen = {"chunk_size": c.chunk_size, "topk": c.topk, "impl": "auto" if c.impl == "dense" else c.impl}
        if kind == "selected":
            exact = tuple(x % c.kv_heads for x in c.exact_heads if x // c.kv_heads == index)
            self.attention = SelectedAttention(*heads, Rule.of(c, index), c.selection, c.anchors, exact, **options)
        elif kind == "moba":
            self.attention = MixtureOfBlockAttention(*heads, **own, **chosen, **options)
        elif kind == "linear":
            self.attention = LinearAttention(*heads, window=window, rope_theta=rope.get("linear"), **options)
        elif kind == "nsa":
            far = {"exclude_window": exclude, "far_theta": rope.get("nsa")}
            self.attention = NativeSparseAttention(*heads, **own, **chosen, **far, **options)
        else:
            own |= {"score_scale": c.score_scale, "log_length": c.log_length} if kind == "full" else {}
            self.attention = SelfAttention(*heads, **own, **options)
        self.joint = kind == "hsa" and c.fusion == "joint"
        self.hsa = None
        if kind == "hsa":
            self.hsa = HSALayer(
                *heads, c.retrieval_dim, topk=c.topk, exclude_window=exclude,
                fusion=c.fusion, retrieval_heads=c.retrieval_heads, rope_theta=rope.get("hsa"), impl=c.impl,
                selection_overlap=c.selection_overlap, recency=c.recency, topp=c.topp,
                mass_power=c.mass_power,
            )  # fmt: skip
        self.mlp_norm = RMSNorm(c.dim, eps=c.norm_eps)
        if c.experts and index >= c.dense_layers:
            self.mlp = MoE(c.dim, c.experts, c.experts_per_token, c.expert_dim, c.shared_experts)
        else:
            self.mlp = SwiGLU(c.dim, c.mlp_dim)
        # How many tokens before its own a token looks back on, besides the chunk memory.
        self.reach = window - 1 if kind in ("swa", "hsa") else 1 << 40

    def forward(
        self, x_BTC: torch.Tensor, memory: Memory | None = None, first_v_BTHD: torch.Tensor | None = None,
        start: int | torch.Tensor = 0, cache=None, keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """x [B, T, C] and this layer's values [B, T, H, D]. cache: of its attention. keep: x of the last so many
        positions only.
        """
        heads_BTAD, lse_BTA, v_BTHD = self.attention.attend(x_BTC, start, cache, first_v_BTHD, self.joint, keep)
        more = 0
        if keep is not None and keep < x_BTC.shape[1]:
            start, x_BTC = start + x_BTC.shape[1] - keep, x_BTC[:, -keep:]
        if self.hsa is not None:
            more, window_BTA = self.hsa.mix(x_BTC, memory, start, lse_BTA)
            if window_BTA is not None:
                heads_BTAD = heads_BTAD * window_BTA[..., None].to(heads_BTAD.dtype)
        x = x_BTC + self.attention.out(heads_BTAD.flatten(2)) + more
        return x + self.mlp(self.mlp_norm(x)), v_BTHD


class Model(Generation, nn.Module):
    """The language model of a `ModelConfig`: sliding windows, one chunk memory, HSA layers that read it.

    The stages are methods, so that inference can run them on segments: `embed`, `lower`, `encode`, `upper`, `head`.
    start: the absolute position of the first token given, an int, or int32 [B] for sequences of different lengths.
    caches: one for each layer of the stage (see Layer), or None. tokenizer: what hsa_tl.model.load puts there.

    Args:
        config (ModelConfig): dims and options.

    Example:
        >>> model = Model(preset("tiny")).eval()
        >>> model(torch.zeros(1, 40, dtype=torch.int64)).logits.shape
        torch.Size([1, 40, 320])
    """

    checkpoint = staticmethod(partial(checkpoint, use_reentrant=False))  # of a layer, with activation_checkpointing

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.conv = ShortConv(c.dim, c.conv) if c.conv else None
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.encoder = None
        if c.attention == "hsa":
            self.encoder = ChunkEncoder(
                c.dim, c.kv_heads, c.head_dim, c.retrieval_dim, c.chunk_size, heads=c.encoder_heads,
                retrieval_heads=c.retrieval_heads, layers=c.encoder_layers, mlp_dim=c.encoder_mlp_dim,
                rope_theta=(c.rope_frequencies or c.rope_theta) if "hsa" in c.rope else None, std=c.embedding_std,
                landmark_norm=c.landmark_norm, overlap=c.encoder_overlap,
            )  # fmt: skip
        self.norm = RMSNorm(c.dim, eps=c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tied:
            self.output.weight = self.embedding.weight
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Linear layers keep PyTorch's variance of 1 / (3 fan_in); what adds to the residual stream shrinks with depth.

        A query starts equal to the landmark projection: a token then retrieves chunks whose [CLS] it resembles.
        """
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("out.weight", "down.weight", "down_EFC")):
                parameter.mul_((2 / self.config.layers) ** 0.5)
            if name.endswith("q_slc.weight"):
                parameter.copy_(self.encoder.landmark.weight)

    def num_parameters(self, active: bool = False) -> int:
        """Of all parameters, or of those that a token uses: without the experts that it does not choose."""
        total = sum(p.numel() for p in self.parameters())
        for m in self.modules():
            if active and isinstance(m, MoE):
                total -= (m.up_ECF.numel() + m.down_EFC.numel()) * (m.experts - m.experts_per_token) // m.experts
        return total

    def update_balance(self, rate: float = 1e-3) -> None:
        """Call after each optimizer step: moves every mixture's bias towards a uniform load (MoE.update_balance)."""
        for m in self.modules():
            if isinstance(m, MoE):
                m.update_balance(rate)

    def embed(self, input_ids: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T] tokens, or their embeddings [B, T, C], -> [B, T, C]. past [B, conv - 1, C]: embeddings before them."""
        x_BTC = input_ids if input_ids.is_floating_point() else self.embedding(input_ids)
        return x_BTC if self.conv is None else self.conv(x_BTC, past)

    def _run(self, layers, caches, x_BTC, memory, first_v_BTHD, start, keep=None, states=None):
        for i, (layer, cache) in enumerate(zip(layers, caches or [None] * len(layers), strict=True)):
            run, tail = layer, None
            if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
                run = partial(self.checkpoint, layer)
            if keep is not None:  # what the layers above look back on stays
                tail = keep + sum(x.reach for x in layers[i + 1 :])
                drop = max(0, x_BTC.shape[1] - tail - layer.reach)
                x_BTC, start = x_BTC[:, drop:], start + drop
                first_v_BTHD = None if first_v_BTHD is None else first_v_BTHD[:, -x_BTC.shape[1] :]
                tail = min(tail, x_BTC.shape[1])
            T = x_BTC.shape[1]
            x_BTC, v = run(x_BTC, memory, first_v_BTHD, start, cache, tail)
            start = start + T - x_BTC.shape[1]
            first_v_BTHD = v if first_v_BTHD is None else first_v_BTHD
            if states is not None:
                states.append(x_BTC)
        return x_BTC, first_v_BTHD

    def lower(self, x_BTC: torch.Tensor, start=0, caches=None, states=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, T, C] and the first layer's values [B, T, H, D] (which `value_residual` needs above)."""
        return self._run(self.layers[: self.config.lower_layers], caches, x_BTC, None, None, start, states=states)

    def encode(self, h_BTC: torch.Tensor, start=0, past_BPC: torch.Tensor | None = None) -> ChunkMemory | None:
        """The chunk memory of hidden states that begin at a chunk's first token; None if nothing reads one. past:
        encoder_overlap hidden states before them, 0 before the first token of all."""
        return None if self.encoder is None else self.encoder(h_BTC, start, past_BPC)

    def upper(
        self, h_BTC: torch.Tensor, memory: Memory | None, first_v_BTHD: torch.Tensor, start=0, caches=None,
        keep: int | None = None, states: list | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [B, T, C]; keep: of the last so many positions, and nothing else is computed."""
        layers = self.layers[self.config.lower_layers :]
        return self._run(layers, caches, h_BTC, memory, first_v_BTHD, start, keep, states)[0]

    def hidden(
        self, inputs: torch.Tensor, cache: Cache | None = None, keep: int | None = None, lengths=None,
        states: list | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [B, T, C] before the head, of tokens [B, T] or embeddings [B, T, C].

        keep: of the last so many positions, see `forward` for lengths and cache. states: a list, without keep; it gets
        the embedded tokens and what every layer returns.
        """
        if cache is not None:
            return cache.advance(self, inputs, lengths, keep, states)
        x_BTC = self.embed(inputs)
        if states is not None:
            states.append(x_BTC)
        h_BTC, first_v_BTHD = self.lower(x_BTC, states=states)
        memory, start = self.encode(h_BTC), 0
        if memory is not None and self.training and (d := self.config.distractors):
            start = d * memory.k.shape[1]
            memory = BatchMemory(memory, d)
        return self.upper(h_BTC, memory, first_v_BTHD, start, keep=keep, states=states)

    def head(self, h_BTC: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of hidden states [B, T, C]."""
        return self.output(self.norm(h_BTC))

    def new_cache(self, batch_size: int, **options) -> Cache:
        """An empty cache, on the model's device and of its dtype (or autocast's).

        Args:
            batch_size (int): B, sequences of any lengths.
            options: of `hsa_tl.model.cache.Cache`: capacity, undo (tokens that `Cache.crop` can take back, by default
                128; with linear layers, whose states know no way back, none), device, and PagedMemory's offload,
                cache_pages, two_level, directory and budget; with attention "selected" only budget, an int or one for
                each layer.

        Returns:
            Cache: for `forward` and `generate`; `crop` takes tokens back, `save` writes it.
        """
        return Cache(self, batch_size, **options)

    def load_cache(self, path: Path | str, **options) -> Cache:
        """The cache that `Cache.save` wrote.

        Args:
            path (str or Path): the file.
            options: as for `new_cache`, but undo and budget, which are as saved.

        Returns:
            Cache: it goes on where the saved one stood.

        Raises:
            ValueError: a file that is no cache, damaged, or of another model; undo or budget.
            OSError: it cannot be read.
        """
        return Cache.load(self, path, **options)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, cache: Cache | None = None,
        logits_to_keep: int | None = None, lengths: torch.Tensor | list[int] | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Logits, and the loss of labels.

        Args:
            input_ids (Tensor [B, T], any integers): tokens; with a cache, the next ones of its sequences. Or their
                embeddings [B, T, C].
            labels (Tensor [B, T], any integers): -100 is ignored. They are shifted here: labels[:, t] is predicted at
                t - 1. Default: None.
            cache (Cache): what `new_cache` returned; it is updated, and nothing has a gradient. Default: None.
            logits_to_keep (int): only the last so many positions have logits. 0: none, and the head runs at labelled
                positions only, a block of rows at a time. Default: None, all.
            lengths (Tensor or list [B]): with a cache only, how many tokens each row holds, padded on the right;
                logits_to_keep then counts each row's own tokens, and logits of no token are unspecified. Default: T.

        Returns:
            ModelOutput: logits [B, T, V], the mean cross-entropy `loss` in nats, and the cache.

        Raises:
            ValueError, TypeError: tokens or labels that are no integers, out of range (checked on a CPU, and wherever
                HSA_TL_VALIDATE=1) or of another shape; lengths without a cache.
        """
        embedded = isinstance(input_ids, torch.Tensor) and input_ids.is_floating_point() and input_ids.ndim == 3
        input_ids, labels = self.validated(input_ids, labels, "input_ids", 3 if embedded else 2, cache is None)
        if logits_to_keep is not None:
            require_int("logits_to_keep", logits_to_keep, 0)
        require(cache is not None or lengths is None, "lengths", "come with a cache", lengths)
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(input_ids, labels, cache, logits_to_keep, lengths)
        keep = 1 if logits_to_keep == 0 and cache is None else logits_to_keep
        if labels is not None:
            # Eager, the upper decoder runs from the first label on; compiled, everywhere: shapes must be static.
            keep = None
            if logits_to_keep == 0 and cache is None and not torch.compiler.is_compiling():
                any_T = (labels[:, 1:] != -100).any(0)
                keep = len(any_T) + 1 - int(any_T.byte().argmax()) if any_T.any() else labels.shape[1]
        h_BTC = self.hidden(input_ids, cache, keep, lengths)
        logits = loss = None
        if logits_to_keep != 0:
            logits = self.head(h_BTC if logits_to_keep is None else h_BTC[:, -logits_to_keep:])
        if labels is not None:
            targets = labels[:, -h_BTC.shape[1] :][:, 1:]
            if logits_to_keep is None:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
            else:
                loss = self.loss_sum(h_BTC[:, :-1], targets) / (targets != -100).sum()
        return ModelOutput(logits, loss, cache)

    def validated(self, inputs, labels=None, name: str = "input_ids", ndim: int = 2, some: bool = True):
        """Tokens of ndim 2 or embeddings of 3, and labels; integers as int64. some: of at least one token."""
        require_tensor(name, inputs, ndim)
        if ndim == 3:
            require_float(name, inputs)
            require_shape(name, inputs, ("B", "T", self.config.dim), "as embeddings")
        else:
            inputs = require_integers(name, inputs, 0, self.config.vocab_size)
        require(not some or inputs.shape[1] > 0, name, "hold at least one token", "none")
        if labels is not None:
            require_tensor("labels", labels, 2, inputs)
            require_shape("labels", labels, tuple(inputs.shape[:2]), f"like {name}")
            labels = require_integers("labels", labels, 0, self.config.vocab_size, ignored=-100)
        return inputs, labels

    def loss_sum(self, h_BTC: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """The sum of cross-entropies (float32 scalar) of hidden states at targets that are not -100."""
        h, targets = h_BTC.flatten(0, 1), targets_BT.flatten()
        if not torch.compiler.is_compiling():  # the number of labels is no static shape
            labelled = (targets != -100).nonzero()[:, 0]
            h, targets = h[labelled], targets[labelled]
        blocks = zip(h.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        loss = lambda x, y: F.cross_entropy(self.head(x).float(), y, reduction="sum")  # noqa: E731
        return sum(checkpoint(loss, x, y, use_reentrant=False) for x, y in blocks)
