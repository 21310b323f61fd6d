"""The models of `hsa-tl lengths`: HSA, HSA with a part taken out, and what it is held against.

All are `tiny` with changes, of as many parameters as HSA within 3 %: instead of its chunk encoder the others have a
third layer or, by which NSA found more needles, wider ones. Embedding, convolution, window and training data are equal.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hsa_tl.model import Model, ModelConfig, baseline


def deeper(config: ModelConfig) -> dict[str, int]:
    """Changes by which full attention has as many parameters as HSA: a layer for its chunk encoder, and the MLP's width
    that makes up for the rest. ValueError: no width does."""

    def parameters(config: ModelConfig) -> int:
        with torch.device("meta"):
            return Model(config).num_parameters()

    layers, widths = config.layers + 1, (8, 16)
    narrow, wide = (parameters(replace(baseline(config, "full"), layers=layers, mlp_dim=n)) for n in widths)
    steps = round((parameters(config) - narrow) / (wide - narrow))
    if steps < 0:
        raise ValueError(f"a layer more must fit into {parameters(config)} parameters, got {narrow} with narrow MLPs")
    return {"layers": layers, "mlp_dim": 8 * (steps + 1)}


THREE_LAYERS = {"layers": 3, "mlp_dim": 344}  # what deeper says of `tiny`
NSA = {"attention": "nsa", "mlp_dim": 456}
TRAINED = 256  # tokens of the longest stage of needle-tiny


@dataclass(frozen=True)
class Contender:
    """changes: of the recipe's model. topk: trained with the top-k that it is asked with, where the recipe's stages
    have every chunk. weights_of: whose weights it asks, by default its own. scaling: of hsa_tl.model.rope, at lengths
    beyond training. seeds: of the fair table."""

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    topk: bool = False
    weights_of: str | None = None
    scaling: str | None = None
    seeds: int = 5


MODELS = {
    "hsa": Contender("HSA"),
    "full-rope": Contender("full attention, RoPE", {"attention": "full", **THREE_LAYERS}),
    "full-pi": Contender("full attention, RoPE by position interpolation", weights_of="full-rope", scaling="pi"),
    "full-ntk": Contender("full attention, RoPE by NTK", weights_of="full-rope", scaling="ntk"),
    "full-yarn": Contender("full attention, RoPE by YaRN", weights_of="full-rope", scaling="yarn"),
    "full-nope": Contender("full attention, NoPE", {"attention": "full", "rope": [], **THREE_LAYERS}),
    "full-nope-log": Contender(
        "full attention, NoPE, log n", {"attention": "full", "rope": [], "log_length": TRAINED, **THREE_LAYERS}
    ),
    "swa": Contender("sliding window only", {"attention": "swa", **THREE_LAYERS}),
    "nsa": Contender("NSA, NoPE", NSA, topk=True),
    "nsa-rope": Contender("NSA, RoPE", NSA | {"rope": ["swa", "nsa"]}, topk=True),
    "moba": Contender("MoBA, NoPE", {"attention": "moba", **THREE_LAYERS}, topk=True),
    "moba-rope": Contender("MoBA, RoPE", {"attention": "moba", "rope": ["swa", "moba"], **THREE_LAYERS}, topk=True),
    "hsa-topk": Contender("HSA, top-k in training", topk=True, seeds=3),
    "hsa-rope": Contender("HSA, RoPE", {"rope": ["swa", "hsa"]}, seeds=3),
    "hsa-linear": Contender("HSA over linear attention, HyPE", {"linear": True, "rope": ["linear"]}, seeds=3),
    "hsa-one-softmax": Contender("HSA, one softmax over all chosen keys", {"fusion": "one_softmax"}, seeds=3),
    "hsa-uniform": Contender("HSA, uniform weights", {"fusion": "uniform"}, seeds=3),
    "hsa-detached": Contender("HSA, weights that teach retrieval nothing", {"fusion": "detached"}, seeds=3),
}
