"""RoPE beyond the length that it was trained at: position interpolation, NTK-aware scaling and YaRN, without training.

With s = length / trained length, D = head_dim, and f[d] = theta ** (-2 d / D) the trained frequencies:

    pi      f[d] / s                                             Chen et al., 2023
    ntk     f[d] of the base theta * s ** (D / (D - 2))          the highest stays, the lowest is divided by s
    yarn    f[d] * (g[d] + (1 - g[d]) / s), and scores times (0.1 ln s + 1) ** 2          Peng et al., 2023

where g[d] rises from 0 to 1 between 1 and 32 turns of a pair within the trained length.
"""

import math
from dataclasses import replace

from hsa_tl.model.config import ModelConfig
from hsa_tl.validation import require

SCALINGS = ("pi", "ntk", "yarn")
SLOW, FAST = 1, 32  # turns


def extended(config: ModelConfig, kind: str, length: int, trained_length: int) -> ModelConfig:
    """The configuration of full attention that reads so many tokens; no longer than trained, it is as it was.

    ValueError: another kind, another attention, or frequencies that are no base's.
    """
    require(kind in SCALINGS, "kind", f"be one of {', '.join(SCALINGS)}", repr(kind))
    require(config.attention == "full", "config", "have attention 'full'", repr(config.attention))
    require(not config.rope_frequencies, "config", "have the frequencies of its rope_theta", config.rope_frequencies)
    if length <= trained_length:
        return config
    s, D, base = length / trained_length, config.head_dim, config.rope_theta
    if kind == "ntk":
        base *= s ** (D / max(1, D - 2))
    frequencies = [base ** (-2 * d / D) for d in range(D // 2)]
    if kind == "pi":
        frequencies = [f / s for f in frequencies]
    if kind != "yarn":
        return replace(config, rope_frequencies=tuple(frequencies))
    turns = [trained_length * f / (2 * math.pi) for f in frequencies]
    kept = [min(1.0, max(0.0, (n - SLOW) / (FAST - SLOW))) for n in turns]
    frequencies = tuple(f * (g + (1 - g) / s) for f, g in zip(frequencies, kept, strict=True))
    return replace(config, rope_frequencies=frequencies, score_scale=config.score_scale * (0.1 * math.log(s) + 1) ** 2)
