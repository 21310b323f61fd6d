"""Fusion weights: named functions from retrieval scores to the weights of the chosen chunks (OPERATOR: w[t, k])."""

import torch


def _softmax(scores: torch.Tensor, *extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """exp(scores) and each exp(extra) over their common sum; -inf scores give 0, also when nothing is finite."""
    top = scores.amax(-1, keepdim=True)
    for x in extra:
        top = torch.maximum(top, x)
    top = torch.where(torch.isfinite(top), top, 0.0).detach()
    # The inner where keeps -inf out of exp, whose gradient would be 0 * nan.
    filled = scores > -torch.inf
    e = torch.where(filled, torch.exp(torch.where(filled, scores, top) - top), 0.0)
    rest = [torch.where(x > -torch.inf, torch.exp(torch.where(x > -torch.inf, x, top) - top), 0.0) for x in extra]
    total = e.sum(-1, keepdim=True) + sum(rest)
    total = torch.where(total > 0, total, 1.0)
    return e / total, *(x / total for x in rest)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = exp(s[k]) / sum_j exp(s[j]) over the filled slots."""
    return _softmax(scores)[0]


def softmax1(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = exp(s[k]) / (exp(0) + sum_j exp(s[j])): a token may attend to nothing."""
    return _softmax(scores, torch.zeros_like(scores[..., :1]))[0]


def stick_breaking(scores: torch.Tensor) -> torch.Tensor:
    """w[k] = sigmoid(s[k]) * prod_{j > k} (1 - sigmoid(s[j])): the nearest chunk (last slot) breaks the stick first."""
    filled = scores > -torch.inf
    s = torch.where(filled, scores, 0.0)
    log_take = torch.nn.functional.logsigmoid(s)
    log_leave = torch.where(filled, torch.nn.functional.logsigmoid(-s), 0.0)
    later = log_leave.flip(-1).cumsum(-1).flip(-1) - log_leave
    return torch.where(filled, torch.exp(log_take + later), 0.0)


def joint(scores: torch.Tensor, swa_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w[k] = exp(s[k]) / (exp(lse) + sum_j exp(s[j])) and the window's exp(lse) / (the same sum)."""
    weights, window = _softmax(scores, swa_lse[..., None])
    return weights, window[..., 0]


KINDS = {"softmax": softmax, "softmax1": softmax1, "stick_breaking": stick_breaking, "joint": joint}
