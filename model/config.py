"""The model's configuration: one frozen dataclass, its presets and its baselines."""

import math
from dataclasses import dataclass, fields, replace
from numbers import Real

from hsa_tl.validation import IMPLS, require

ATTENTIONS = ("hsa", "nsa", "moba", "swa", "full", "linear", "selected")
SELECTIONS = ("mass", "mean", "landmark")
BIASES = ("q", "k", "v", "out")
EPS = 2.0**-23  # float32's: torch.nn.RMSNorm's default is the type's own, in bfloat16 nearly 0.008
UNLEARNED = ("uniform", "detached", "one_softmax")  # of HSA with a part taken out: nothing teaches retrieval
FUSIONS = ("softmax", "softmax1", "stick_breaking", "joint", "mass", *UNLEARNED)
VALUE_RESIDUALS = ("none", "resformer", "svformer")


def require_ints(values: object, **least: int) -> None:
    """ValueError: a field of values that is no int, or less than its least."""
    for name, low in least.items():
        value = getattr(values, name)
        require(type(value) is int and value >= low, name, f"be an int of at least {low}", repr(value))


def require_rules(values: object, *rules: tuple[str, bool, str]) -> None:
    """ValueError: the first rule (field, whether it holds, what it says) that does not hold."""
    for name, ok, rule in rules:
        require(ok, name, rule, repr(getattr(values, name)))


def is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


@dataclass(frozen=True)
class ModelConfig:
    """Dims and options of a `Model`. `dataclasses.replace` changes them, and every change is validated.

    Attention is what the model is. "hsa": sliding windows everywhere, and the layer that leads each upper group has HSA
    beside its window. "nsa": NSA with a window, a gated branch of it, in the place of both (`hsa_tl.model.nsa`).
    "moba": MoBA there (`hsa_tl.model.moba`). "swa": sliding windows only. "full": causal attention over everything
    (BaseLM). "linear": linear attention only (`hsa_tl.model.linear`). "selected": every layer has one softmax over its
    window, the first tokens and chosen chunks of its own keys, as a pretrained model has it that `hsa-tl convert` made
    (`hsa_tl.model.selected`). No parameter's shape depends on window, topk, topp, exclude_window, fusion, mass_power,
    distractors, rope, sinks, selection or hsa_layers, so that a checkpoint goes from one training stage to the next.
    The defaults are the preset "tiny".

    Args:
        vocab_size (int): V. Default: 320.
        dim (int): C, of the hidden states. Default: 128.
        layers (int): the first half lies below the chunk memory. Default: 2.
        groups (int): of upper layers; the first layer of each has HSA. Default: 1.
        heads (int): HQ. Default: 4.
        kv_heads (int): H. Default: 1.
        head_dim (int): D. Default: 32.
        mlp_dim (int): width of a feed-forward layer. Default: 256.
        attention (str): "hsa", "nsa", "moba", "swa", "full", "linear" or "selected". Default: "hsa".
        linear (bool): whether only the layers that lead upper groups have that attention, and the others linear
            attention instead of windows; not with "selected". Default: False.
        window (int): tokens that a sliding window spans, its own included; behind so many a linear layer has forgotten
            all but 1/e at least. Default: 32.
        hsa_window (int): of the window beside HSA or NSA, at most `window`; 0 for the same. Default: 0.
        hsa_window_rope (bool): whether that window has positions where "swa" has. Default: True.
        rope (tuple of str): kinds of attention with RoPE; the others have no positions. Default: ("swa", "full").
        rope_theta (float): base of RoPE. Default: 10000.
        rope_frequencies (tuple of float): of RoPE's D / 2 pairs instead of the base's. Default: (), the base's.
        norm_eps (float): of every norm but those of HSA and its encoder. Default: 1.2e-7, float32's own.
        qk_norm (bool): whether queries and keys of windows, of "full" and of "selected" are normed. Default: True.
        biases (tuple of str): which of the same attentions' projections have a bias: q, k, v, out. Default: ().
        sinks (int): of "selected", first tokens that every token sees. Default: 0.
        selection (str): of "selected", "mass" takes the chunks of greatest attention, computed exactly, "landmark"
            those of which `anchors` guess it, "mean" those whose mean key fits best. Default: "mass".
        far_positions (int): of "selected", positions that all keys behind the window share, however many they are, see
            `hsa_tl.model.selected`; 0: they have none. Default: 0.
        anchors (int): M of each key/value head, see `hsa_tl.model.selected.Landmarks`. Default: 0, none.
        hsa_layers (int): of "selected", layers that choose chunks, evenly spread, the last one among them; the others
            see window and sinks. Default: 0, all.
        exact_heads (tuple of int): with selection "landmark", key/value heads, counted through all layers, that choose
            by the mass nevertheless. Default: ().
        score_scale (float): of the scores of "full". Default: 1.0.
        log_length (int): the scores of a query of "full" that sees n keys are times log(n) / log(log_length), so that
            more keys do not flatten its softmax; 0 for not. Default: 0.
        value_residual (str): "resformer" mixes values with the first layer's, "svformer" takes the first layer's.
            Default: "none".
        chunk_size (int): S, one of 16, 32, 64, 128. Default: 16.
        topk (int or "all"): K, chunks that a token retrieves; at least 3 for "nsa"; for "selected"
            also 0. Default: 8.
        topp (float): of these a token reads the fewest that hold this share of the weight, see
            `hsa_tl.top_p_chunks`; of HSA. Default: 1.0, all.
        exclude_window (bool): retrieve no chunk that lies whole in the window. Default: False.
        fusion (str): a kind of `hsa_tl.fusion_weights`; "mass", the softmax of a chunk's retrieval score and its own
            keys' log-sum-exp, so that a chunk of which the query likes no key loses, however well its landmark fits:
            for haystacks of like chunks, at up to twice the cost; or, to compare, one that teaches retrieval nothing:
            "uniform" weights, "detached" scores, "one_softmax" over the keys of all chosen chunks. Default: "softmax".
        mass_power (float): with fusion "mass", to which the weights are raised before they sum to 1: the more chunks
            are read, the more it takes for the right one to outweigh all others. Default: 1.0, one softmax over all
            keys, a score a bonus of its keys.
        distractors (int): of HSA in training, so many other sequences of the batch whose chunks each sequence sees
            before its own, so that it learns to choose among as many chunks as a longer context has; not with
            positions in HSA, since theirs would be its own's. Default: 0.
        retrieval_heads (int): R; each serves kv_heads / retrieval_heads key/value heads. Default: 1.
        retrieval_dim (int): D_r. Default: 128.
        landmark_norm (bool): whether landmarks, and the [CLS] that gives them, are normed. A norm is safe with 16-bit
            types, but shrinks what tells chunks apart by what all have in common. Default: True.
        encoder_layers (int): of the chunk encoder. Default: 1.
        encoder_heads (int): of the chunk encoder. Default: 4.
        encoder_mlp_dim (int): of the chunk encoder. Default: 256.
        encoder_overlap (int): tokens before a chunk, fewer than chunk_size, that its encoder reads too: a fact that a
            border cuts then stands whole in the second chunk. Default: 0, none.
        conv (int): width of the causal convolution on the embeddings, 0 for none. Default: 4.
        tied (bool): whether the output head is the embedding. Default: False.
        embedding_std (float): of the initial embeddings. Default: 0.1.
        experts (int): of each mixture of experts, 0 for dense layers only. Default: 0.
        experts_per_token (int): that a token chooses. Default: 4.
        expert_dim (int): width of an expert. Default: 512.
        shared_experts (int): that every token takes. Default: 1.
        dense_layers (int): first layers without a mixture. Default: 1.
        activation_checkpointing (bool): whether layers are computed again in the backward. Default: False.
        impl (str): of the operators; "dense" as in `HSALayer`. Default: "auto".
        selection_overlap (float): of neighbouring tokens, by which programs are chosen. Default: 0.9.
        recency (int): the span of a preference for near chunks, at least 2: of HSA learned, as in `HSALayer`; of
            "selected" as great as it begins there. Default: None.

    Raises:
        ValueError: names the field, the rule and the value.

    Example:
        >>> replace(preset("tiny"), topk=4, window=64).kinds
        ('swa', 'hsa')
    """

    vocab_size: int = 320
    dim: int = 128
    layers: int = 2
    groups: int = 1
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 32
    mlp_dim: int = 256
    attention: str = "hsa"
    linear: bool = False
    window: int = 32
    hsa_window: int = 0
    hsa_window_rope: bool = True
    rope: tuple[str, ...] = ("swa", "full")
    rope_theta: float = 10000.0
    rope_frequencies: tuple[float, ...] = ()
    norm_eps: float = EPS
    qk_norm: bool = True
    biases: tuple[str, ...] = ()
    sinks: int = 0
    selection: str = "mass"
    far_positions: int = 0
    anchors: int = 0
    hsa_layers: int = 0
    exact_heads: tuple[int, ...] = ()
    score_scale: float = 1.0
    log_length: int = 0
    value_residual: str = "none"
    chunk_size: int = 16
    topk: int | str = 8
    topp: float = 1.0
    exclude_window: bool = False
    fusion: str = "softmax"
    mass_power: float = 1.0
    distractors: int = 0
    retrieval_heads: int = 1
    retrieval_dim: int = 128
    landmark_norm: bool = True
    encoder_layers: int = 1
    encoder_heads: int = 4
    encoder_mlp_dim: int = 256
    encoder_overlap: int = 0
    conv: int = 4
    tied: bool = False
    embedding_std: float = 0.1
    experts: int = 0
    experts_per_token: int = 4
    expert_dim: int = 512
    shared_experts: int = 1
    dense_layers: int = 1
    activation_checkpointing: bool = False
    impl: str = "auto"
    selection_overlap: float = 0.9
    recency: int | None = None

    def __post_init__(self):
        for name in ("rope", "rope_frequencies", "biases", "exact_heads"):
            if isinstance(value := getattr(self, name), list):  # JSON and YAML have no tuples
                object.__setattr__(self, name, tuple(value))
        ints = (f.name for f in fields(self) if f.type is int)
        require_ints(self, **{name: 0 if name in MAY_BE_ZERO else 1 for name in ints})
        for f in fields(self):
            value = getattr(self, f.name)
            number = is_number(value) and math.isfinite(value)
            require(f.type is not float or number, f.name, "be a finite number", repr(value))
            require(f.type is not bool or isinstance(value, bool), f.name, "be True or False", repr(value))
        counts = type(self.topk) is int and self.topk >= (0 if self.attention == "selected" else 1)
        every = self.layers * self.kv_heads
        exact = isinstance(self.exact_heads, tuple) and set(self.exact_heads) <= set(range(every))
        require_rules(
            self,
            ("heads", self.heads % self.kv_heads == 0, f"be a multiple of kv_heads = {self.kv_heads}"),
            ("head_dim", self.head_dim % 2 == 0, "be even"),
            ("dim", self.dim % self.encoder_heads == 0, f"be a multiple of encoder_heads = {self.encoder_heads}"),
            ("layers", self.layers >= 2, "be at least 2"),
            ("groups", self.groups <= self.layers - self.layers // 2, "be at most the number of upper layers"),
            ("attention", self.attention in ATTENTIONS, f"be one of {', '.join(ATTENTIONS)}"),
            ("linear", not self.linear or self.attention != "selected", "be False with attention selected"),
            ("hsa_window", self.hsa_window <= self.window, f"be at most window = {self.window}"),
            ("rope", isinstance(self.rope, tuple) and set(self.rope) <= set(ATTENTIONS), "be a tuple of attentions"),
            ("rope_frequencies", len(self.rope_frequencies) in (0, half := self.head_dim // 2), f"hold {half} or none"),
            ("rope_theta", self.rope_theta > 0, "be positive"),
            ("norm_eps", 0 <= self.norm_eps < 1, "lie in [0, 1)"),
            ("biases", isinstance(self.biases, tuple) and set(self.biases) <= set(BIASES), "hold q, k, v or out"),
            ("selection", self.selection in SELECTIONS, f"be one of {', '.join(SELECTIONS)}"),
            ("hsa_layers", self.hsa_layers <= self.layers, f"be at most layers = {self.layers}"),
            ("anchors", self.anchors or self.selection != "landmark", "be positive for selection landmark"),
            ("exact_heads", exact, f"be a tuple of numbers below layers * kv_heads = {every}"),
            ("score_scale", self.score_scale == 1 or self.attention == "full", "be 1 without attention full"),
            ("log_length", self.log_length != 1, "be 0 or at least 2"),
            ("log_length", not self.log_length or self.attention == "full", "be 0 without attention full"),
            ("value_residual", self.value_residual in VALUE_RESIDUALS, f"be one of {', '.join(VALUE_RESIDUALS)}"),
            ("fusion", self.fusion in FUSIONS, f"be one of {', '.join(FUSIONS)}"),
            ("chunk_size", self.chunk_size in (16, 32, 64, 128), "be 16, 32, 64 or 128"),
            ("mass_power", self.mass_power > 0, "be positive"),
            ("mass_power", self.mass_power == 1 or self.fusion == "mass", 'be 1 without fusion "mass"'),
            ("encoder_overlap", self.encoder_overlap < self.chunk_size, f"be below chunk_size = {self.chunk_size}"),
            ("topk", self.topk == "all" or counts, 'be a positive int or "all", or 0 for "selected"'),
            ("topk", self.attention != "nsa" or self.topk not in (1, 2), "be at least 3 with attention nsa"),
            ("topp", 0 < self.topp <= 1, "lie in (0, 1]"),
            ("distractors", not self.distractors or "hsa" not in self.rope, 'be 0 where "hsa" is in rope'),
            ("retrieval_heads", self.kv_heads % self.retrieval_heads == 0, f"divide kv_heads = {self.kv_heads}"),
            ("impl", self.impl in (*IMPLS, "dense"), f"be one of {', '.join(IMPLS)}, dense"),
            ("impl", self.impl != "dense" or self.topk == "all", 'not be "dense" unless topk is "all"'),
            ("recency", self.recency is None or (type(self.recency) is int and self.recency > 1), "be an int above 1"),
            ("selection_overlap", 0 <= self.selection_overlap <= 1, "lie in [0, 1]"),
            ("experts_per_token", not self.experts or self.experts_per_token <= self.experts, "be at most experts"),
        )

    @property
    def lower_layers(self) -> int:
        """Layers below the chunk memory."""
        return self.layers // 2

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each layer: "full", "swa", "linear", "selected", "moba", or "hsa" and "nsa", which have a window too."""
        if self.attention in ("full", "swa", "linear", "selected") and not self.linear:
            return (self.attention,) * self.layers
        lower, upper = self.lower_layers, self.layers - self.lower_layers
        leads = {lower + g * upper // self.groups for g in range(self.groups)}
        return tuple(self.attention if i in leads else "linear" if self.linear else "swa" for i in range(self.layers))

    def chooses(self, layer: int) -> bool:
        """Whether a layer of "selected" sees chosen chunks."""
        n = self.hsa_layers or self.layers
        return (layer + 1) * n // self.layers > layer * n // self.layers


MAY_BE_ZERO = (
    "hsa_window", "log_length", "sinks", "anchors", "hsa_layers", "far_positions", "distractors", "encoder_overlap",
    "conv", "experts", "shared_experts", "dense_layers",
)  # fmt: skip

LARGE = {"conv": 0, "embedding_std": 0.02}
# dense-0.5b and moe-8b-a1b have the paper's sizes; the paper does not give their dims.
PRESETS = {
    "tiny": ModelConfig(),
    "small": ModelConfig(
        vocab_size=32000, dim=512, layers=8, groups=2, heads=16, kv_heads=1, head_dim=64, mlp_dim=1536, window=512,
        chunk_size=64, topk=16, encoder_heads=8, encoder_mlp_dim=1536, tied=True, embedding_std=0.02,
    ),
    "dense-0.5b": ModelConfig(
        vocab_size=128256, dim=1024, layers=22, groups=2, heads=16, kv_heads=1, head_dim=64, mlp_dim=3072, window=4096,
        chunk_size=64, topk=64, encoder_heads=16, encoder_mlp_dim=3072, **LARGE,
    ),
    "moe-8b-a1b": ModelConfig(
        vocab_size=128256, dim=2048, layers=36, groups=2, heads=16, kv_heads=1, head_dim=128, mlp_dim=5120, window=4096,
        chunk_size=64, topk=64, encoder_heads=16, encoder_mlp_dim=5120, experts=64, **LARGE,
    ),
}  # fmt: skip
PRESETS["trm-moe"] = replace(
    PRESETS["moe-8b-a1b"], attention="full", experts=32, experts_per_token=2, expert_dim=1024
)  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The named configuration.

    "dense-0.5b" and "moe-8b-a1b" have the paper's parameter counts; the paper does not give their dims. "trm-moe" is
    the latter's baseline, full attention with fewer and wider experts.

    Args:
        name (str): "tiny", "small", "dense-0.5b", "moe-8b-a1b" or "trm-moe".

    Returns:
        ModelConfig: to use, or to change by `dataclasses.replace`.

    Raises:
        ValueError: another name; the message lists them.
    """
    require(name in PRESETS, "preset", f"be one of {', '.join(PRESETS)}", repr(name))
    return PRESETS[name]


def baseline(config: ModelConfig, attention: str) -> ModelConfig:
    """The same model with another attention.

    Args:
        config (ModelConfig): the model.
        attention (str): "full" (BaseLM), "swa", "linear", or "nsa" or "moba" with the same windows and top-k.

    Returns:
        ModelConfig: config with that attention.

    Raises:
        ValueError: another attention.
    """
    return replace(config, attention=attention)
