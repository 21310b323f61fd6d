"""Fusion weights: named functions from retrieval scores to the weights of the chosen chunks (OPERATOR: w[t, k])."""

import torch

from hsa_tl.validation import FLOATS, require, require_float, require_tensor, shape_of


def _finite(x: torch.Tensor) -> torch.Tensor:
    """+inf as the largest number, so that it takes the whole weight, or shares it with others; the limit, not NaN."""
    return x.clamp(max=torch.finfo(x.dtype).max)


def _softmax(scores: torch.Tensor, *extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """exp(scores) and each exp(extra) over their common sum; -inf scores give 0, also when nothing is finite."""
    x = _finite(torch.cat([scores, *extra], -1) if extra else scores)
    none = x.amax(-1, keepdim=True) == -torch.inf  # their softmax, and its gradient, would be nan
    weights = x.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
    n = scores.shape[-1]
    # No split: autograd lets nobody change its results in place.
    return weights[..., :n], *(weights[..., i : i + 1] for i in range(n, weights.shape[-1]))


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = exp(s[k]) / sum_j exp(s[j]) over the filled slots; 0 where none is filled."""
    return _softmax(scores)[0]


def softmax1(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = exp(s[k]) / (exp(0) + sum_j exp(s[j])): a token may attend to nothing."""
    return _softmax(scores, torch.zeros_like(scores[..., :1]))[0]


def stick_breaking(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = sigmoid(s[k]) * prod_{j > k} (1 - sigmoid(s[j])): the nearest chunk (last slot) breaks the stick first."""
    filled = scores != -torch.inf
    s = _finite(torch.where(filled, scores, 0.0))
    log_take = torch.nn.functional.logsigmoid(s)
    log_leave = torch.where(filled, torch.nn.functional.logsigmoid(-s), 0.0)
    # Of the later slots alone: taking this one off a sum again would lose the others beside a high score.
    later = torch.nn.functional.pad(log_leave[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return torch.where(filled, torch.exp(log_take + later), 0.0)


def joint(scores: torch.Tensor, swa_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w[k] = exp(s[k]) / (exp(lse) + sum_j exp(s[j])) and the window's exp(lse) / (the same sum)."""
    weights, window = _softmax(scores, swa_lse[..., None])
    return weights, window[..., 0]


KINDS = {"softmax": softmax, "softmax1": softmax1, "stick_breaking": stick_breaking, "joint": joint}


def fusion_weights(
    scores: torch.Tensor, kind: str = "softmax", swa_lse: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Weights of the chosen chunks from their retrieval scores: 0 for an empty slot, all 0 for an empty row.

    Kinds, with s the scores of a row:

    - "softmax": exp(s_k) / sum_j exp(s_j), the paper's;
    - "softmax1": the same with an extra exp(0) in the denominator, so that a token may attend to nothing;
    - "stick_breaking": sigmoid(s_k) * prod_{j > k} (1 - sigmoid(s_j)), so that the nearest chunk takes first;
    - "joint": normalised together with the sliding window, whose log-sum-exp is `swa_lse`.

    Args:
        scores (Tensor [B, T, R, K]): retrieval scores, -inf in empty slots; 16-bit types are taken to float32.
        kind (str): one of the above. Default: "softmax".
        swa_lse (Tensor [B, T, R] or [B, T, HQ], HQ a multiple of R): for "joint" only, the natural log-sum-exp of
            the window's scaled scores. Default: None.

    Returns:
        Tensor [B, T, R, K], float32 or float64, differentiable. "joint" returns a pair: weights [B, T, R or HQ, K],
        and the weight that is left to the window [B, T, R or HQ].

    Raises:
        ValueError, TypeError: an unknown kind; `swa_lse` missing, superfluous or of another shape.

    Example:
        >>> fusion_weights(torch.tensor([[[[0.0, 0.0, -torch.inf]]]])).tolist()
        [[[[0.5, 0.5, 0.0]]]]
    """
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    require(scores.ndim and scores.shape[-1], "scores", "have a last dimension of at least one slot", shape_of(scores))
    require(scores.dtype in FLOATS, "scores", "have a floating dtype", scores.dtype)
    require(isinstance(kind, str) and kind in KINDS, "kind", f"be one of {', '.join(KINDS)}", repr(kind))
    rule, given = 'be given for kind="joint", and for no other', "None" if swa_lse is None else "one"
    require((swa_lse is not None) == (kind == "joint"), "swa_lse", rule, f"{given} with kind={kind!r}")
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if kind != "joint":
        return KINDS[kind](scores)
    require(scores.ndim > 1 and scores.shape[-2], "scores", 'have heads and slots for "joint"', shape_of(scores))
    require_tensor("swa_lse", swa_lse, scores.ndim - 1, scores)
    require_float("swa_lse", swa_lse)
    heads, lse_heads = scores.shape[-2], swa_lse.shape[-1]
    require(
        all(a == b for a, b in zip(swa_lse.shape[:-1], scores.shape[:-2], strict=True)) and lse_heads % heads == 0,
        "swa_lse",
        lambda: f"have shape {list(scores.shape[:-1])} or a multiple of its heads",
        shape_of(swa_lse),
    )
    return joint(scores.repeat_interleave(lse_heads // heads, -2), swa_lse.to(scores.dtype))


def top_p_chunks(scores: torch.Tensor, indices: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Empties the slots of the chunks that a token can do without: the fewest that hold a share p of the weight stay.

    The weight is the softmax of the scores. A pair that is not there is not computed, so that a token pays for what it
    needs.

    Args:
        scores (Tensor [B, T, R, K]): retrieval scores, -inf in empty slots.
        indices (Tensor [B, T, R, K], int32): chosen chunks.
        p (float): in (0, 1]; 1 keeps all.

    Returns:
        scores and indices, -inf and -1 in the emptied slots. The best chunk stays always; of equal ones the earlier
        slot.

    Raises:
        ValueError, TypeError: tensors of different shapes, or p out of range.

    Example:
        >>> top_p_chunks(torch.tensor([[[[0.0, 2.0, 3.0]]]]), torch.tensor([[[[4, 5, 6]]]]).int(), 0.8)[1].tolist()
        [[[[-1, 5, 6]]]]
    """
    require_tensor("scores", scores, 4)
    require_float("scores", scores)
    require_tensor("indices", indices, 4, scores, torch.int32)
    require(scores.shape == indices.shape, "indices", f"have scores' shape {list(scores.shape)}", shape_of(indices))
    require(scores.shape[3] > 0, "scores", "have a last dimension of at least one slot", shape_of(scores))
    require(0 < p <= 1, "p", "lie in (0, 1]", p)
    if p == 1:
        return scores, indices
    weights, order = softmax(scores.detach().float()).sort(dim=-1, descending=True, stable=True)
    dropped = torch.empty_like(weights, dtype=torch.bool).scatter_(-1, order, weights.cumsum(-1) - weights >= p)
    return scores.masked_fill(dropped, -torch.inf), indices.masked_fill(dropped, -1)
