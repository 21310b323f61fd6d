"""Prefill in segments and sampling, for one prompt or many of different lengths."""

from collections.abc import Iterator, Sequence

import torch

from hsa_tl.model.cache import Cache

SEGMENT = 4096  # tokens that a prefill reads at once
Prompts = torch.Tensor | Sequence[torch.Tensor | Sequence[int]]


def _rows(model, input_ids: Prompts) -> list[torch.Tensor]:
    device = model.embedding.weight.device
    rows = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in input_ids]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError(f"input_ids must hold prompts of at least one token, got {[list(row.shape) for row in rows]}")
    return rows


@torch.no_grad()
def prefill(model, input_ids: Prompts, cache: Cache | None = None, segment: int = SEGMENT, progress=None):
    """Reads prompts, a tensor [B, T] or a list of any lengths, `segment` tokens at a time, in memory linear in T.

    Returns the logits [B, V] after each prompt's last token, and the cache. All prompts end in the last segment, the
    only one that runs the head and, where the model allows it (see hsa_tl.model.cache), the upper decoder.
    progress: called with the number of tokens of the longest prompt that are read.
    """
    if type(segment) is not int or segment < 1:
        raise ValueError(f"segment must be a positive int, got {segment!r}")
    rows = _rows(model, input_ids)
    total = max(map(len, rows))
    cache = model.new_cache(len(rows), capacity=total) if cache is None else cache
    for begin in range(0, total, segment):
        end = min(begin + segment, total)
        parts = [row[max(0, begin - total + len(row)) : max(0, end - total + len(row))] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        keep = 1 if end == total else 0
        out = model(ids, cache=cache, lengths=[len(part) for part in parts], logits_to_keep=keep)
        if progress is not None:
            progress(end)
    return out.logits[:, -1], cache


def sample(
    logits_BV: torch.Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """[B] tokens: the likeliest at temperature 0; else drawn from the likeliest that together reach top_p."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    p, token = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the likeliest always stays
    return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def stream(
    model, input_ids: Prompts, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
    seed: int | None = None, *, eos_token: int | None = None, segment: int = SEGMENT, cache: Cache | None = None,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Yields the next token of every prompt, int64 [B], as soon as it is known; see `generate`.

    A prompt that has had eos_token gets eos_token from then on; the stream ends when all have. cache: what the prompts
    continue, also after the stream: all tokens but the last are in it.
    """
    for name, value, ok, rule in (
        ("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 0, "be an int from 0 on"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "be finite and at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "be above 0 and at most 1"),
    ):
        if not ok:
            raise ValueError(f"{name} must {rule}, got {value!r}")
    return _stream(model, _rows(model, input_ids), max_new_tokens, temperature, top_p, seed, eos_token, segment, cache)


def _stream(model, rows, max_new_tokens, temperature, top_p, seed, eos_token, segment, cache):
    generator = None
    if seed is not None:
        generator = torch.Generator(rows[0].device).manual_seed(seed)
    done = torch.zeros(len(rows), dtype=torch.bool, device=rows[0].device)
    for i in range(max_new_tokens):
        if i == 0:
            logits, cache = prefill(model, rows, cache, segment)
        else:
            logits = model(token[:, None], cache=cache, logits_to_keep=1).logits[:, -1]  # noqa: F821
        token = sample(logits, temperature, top_p, generator)
        if eos_token is not None:
            token = token.masked_fill(done, eos_token)
            done |= token == eos_token
        yield token
        if eos_token is not None and done.all():
            return


def generate(
    model, input_ids: Prompts, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
    seed: int | None = None, **options,
) -> torch.Tensor | list[torch.Tensor]:  # fmt: skip
    """Prompts and what follows: [B, T + new] for a tensor [B, T], a list of 1-D tensors for a list of prompts.

    max_new_tokens: fewer follow when every prompt has had eos_token; one that had it earlier is filled up with it in a
    tensor, and ends there in a list. temperature: 0 for the likeliest token. top_p: draw from the likeliest tokens that
    together reach this probability. seed: the same tokens every time; None: from torch's global generator. options:
    eos_token, segment (tokens that prefill reads at once, 4096) and cache (see `stream`).
    ValueError: an empty prompt or an argument out of range.
    """
    rows = _rows(model, input_ids)
    tokens = list(stream(model, rows, max_new_tokens, temperature, top_p, seed, **options))
    new = torch.stack(tokens, 1) if tokens else rows[0].new_empty(len(rows), 0)
    if isinstance(input_ids, torch.Tensor):
        return torch.cat([torch.stack(rows), new], 1)
    eos = options.get("eos_token")
    ends = [len(x) if eos is None else int((x != eos).sum()) + int((x == eos).any()) for x in new]
    return [torch.cat([row, x[:end]]) for row, x, end in zip(rows, new, ends, strict=True)]
