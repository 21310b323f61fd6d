"""Prefill in segments and sampling, for one prompt or many of different lengths."""

import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral

import torch

from hsa_tl.model.cache import Cache
from hsa_tl.validation import require, require_int, require_integers

SEGMENT = 4096  # tokens that a prefill reads at once
Prompts = torch.Tensor | Sequence[torch.Tensor | Sequence[int]]


def _rows(model, input_ids: Prompts, cache: Cache | None = None) -> list[torch.Tensor]:
    """The prompts. One may be empty where the cache has a token that nobody read."""
    device, rows = model.embedding.weight.device, []
    if isinstance(input_ids, str):
        raise TypeError("input_ids must be token ids, got a str: use model.tokenizer.encode(text)")
    for row in input_ids:
        row = torch.as_tensor(row, device=device)
        row = row.long() if not row.numel() else row  # an empty list has no type
        rows.append(require_integers("input_ids", row, 0, model.config.vocab_size))
    least = 1 if cache is None or cache.unread is None else 0
    if not rows or any(row.ndim != 1 or len(row) < least for row in rows):
        got = [list(row.shape) for row in rows[:4]]
        raise ValueError(f"input_ids must hold prompts of at least one token, [B, T] or a list of 1-D ones, got {got}")
    return rows


@torch.no_grad()
def prefill(
    model, input_ids: Prompts, cache: Cache | None = None, segment: int = SEGMENT, progress=None, room: int = 0
):  # fmt: skip
    """Reads prompts, a tensor [B, T] or a list of any lengths, `segment` tokens at a time, in memory linear in T.

    Returns the logits [B, V] after each prompt's last token, and the cache. All prompts end in the last segment, the
    only one that runs the head and, where the model allows it (see hsa_tl.model.cache), the upper decoder.
    A token of the cache that nobody read comes first. progress: called with the number of tokens of the longest prompt
    that are read. room: tokens more that a new cache reserves: each slab that it grows by costs every token some calls.
    """
    require_int("segment", segment, 1)
    rows = _rows(model, input_ids, cache)
    if cache is not None and cache.unread is not None:
        require(len(rows) == len(cache.unread), "input_ids", f"hold {len(cache.unread)} prompts", len(rows))
        rows = [torch.cat(x) for x in zip(cache.unread, rows, strict=True)]
    total = max(map(len, rows))
    cache = model.new_cache(len(rows), capacity=total + room) if cache is None else cache
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
    logits_BV: torch.Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None,
    top_k: int = 0,
) -> torch.Tensor:  # fmt: skip
    """[B] tokens: the likeliest at temperature 0; else drawn from the likeliest that together reach top_p.

    top_k: from so many at most; 0: any number.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    p, token = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
        p = p / p.sum(-1, keepdim=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the likeliest always stays
    return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def penalize(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with those of seen tokens divided by the penalty, or multiplied where they are negative (CTRL)."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _steps(
    model, input_ids, max_new_tokens, temperature, top_p, seed, *, top_k: int = 0, repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (), eos_token: int | None = None, segment: int = SEGMENT, cache: Cache | None = None,
) -> Iterator[tuple[torch.Tensor, list[bool]]]:  # fmt: skip
    """Checks all at once; then tokens [B], and of which prompts they are: those that have not ended before."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    V, tokenizer = model.config.vocab_size, model.tokenizer
    is_token = isinstance(eos_token, Integral) and 0 <= eos_token < V  # a tensor would equal no token that is drawn
    for name, value, ok, rule in (
        ("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 0, "be an int from 0 on"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "be finite and at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "be above 0 and at most 1"),
        ("top_k", top_k, type(top_k) is int and top_k >= 0, "be an int from 0 on, 0 for any number"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "be finite and above 0"),
        ("eos_token", eos_token, eos_token is None or is_token, f"be a token, 0 to {V - 1}"),
        ("stop", stop, all(isinstance(s, str) and s for s in stop), "be strings of at least one character"),
        ("stop", stop, not stop or tokenizer is not None, "go to a model with a tokenizer (model.tokenizer)"),
    ):
        require(ok, name, rule, repr(value))
    for name, value, none in (("top_p", top_p, 1), ("top_k", top_k, 0), ("seed", seed, None)):
        if temperature == 0 and value != none:
            warnings.warn(f"{name} is ignored at temperature 0, got {value}", stacklevel=3)
    rows = _rows(model, input_ids, cache)
    filler = eos_token if eos_token is not None else getattr(tokenizer, "end", None) or 0
    new: list[list[int]] = [[] for _ in rows]  # the last tokens of each, whose text may hold a stop string:
    ends = {eos_token, *(tokenizer.special(s) for s in stop)}
    most = 8 + max((len(s.encode()) for s in stop), default=0)  # one may be a byte, and some have no text

    def ended(tokens: torch.Tensor) -> list[bool]:
        for row, token in zip(new, tokens.tolist(), strict=True):
            row.append(token)
            del row[:-most]
        texts = [tokenizer.decode(row) if stop else "" for row in new]
        return [row[-1] in ends or any(s in x for s in stop) for row, x in zip(new, texts, strict=True)]

    def steps(cache):
        device = rows[0].device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        alive, unread, token = [True] * len(rows), [None] * len(rows), None
        seen = torch.zeros(len(rows), V, dtype=torch.bool, device=device)
        for mine, row in zip(seen, rows, strict=True):
            mine[row] = True
        if not max_new_tokens and cache is not None:
            prefill(model, rows, cache, segment)
        for _ in range(max_new_tokens):
            if token is None:
                logits, cache = prefill(model, rows, cache, segment, room=min(max_new_tokens, SEGMENT))
            else:  # what has ended is read no further
                lengths = None if all(alive) else [int(x) for x in alive]
                logits = model(token[:, None], cache=cache, lengths=lengths, logits_to_keep=1).logits[:, -1]
            if repetition_penalty != 1:
                logits = penalize(logits, seen, repetition_penalty)
            token = sample(logits, temperature, top_p, generator, top_k)
            if not all(alive):
                token = token.masked_fill(~torch.tensor(alive, device=device), filler)
            seen.scatter_(1, token[:, None], True)
            unread = [x if on else old for x, old, on in zip(token.split(1), unread, alive, strict=True)]
            cache.unread, now = unread, alive
            if eos_token is not None or stop:
                alive = [on and not over for on, over in zip(alive, ended(token), strict=True)]
            yield token, now
            if not any(alive):
                return

    return steps(cache)


class Generation:
    """How a model writes on: the methods of `hsa_tl.model.Model` for it."""

    tokenizer = None  # what hsa_tl.model.load puts there

    def generate(self, input_ids, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed=None, **more):
        """Prompts and what follows them.

        Args:
            input_ids (Tensor [B, T], or list of prompts): tokens; prompts of a list may differ in length.
            max_new_tokens (int): fewer follow when every prompt has ended. One that ended earlier is filled up with
                eos_token (or the tokenizer's end) in a tensor, and ends there in a list.
            temperature (float): 0 takes the likeliest token. Default: 0.
            top_p (float): draw from the likeliest tokens that together reach this probability. Default: 1.
            seed (int): gives the same tokens every time. Default: None, torch's global generator.
            more: top_k (int): draw from so many of the likeliest at most. repetition_penalty (float): divides the
                logits of tokens of these prompts and of what follows. eos_token (int): ends a prompt. stop (str or
                list of str): one in the new text ends a prompt; needs `tokenizer`. segment (int): tokens that the
                prefill reads at once, 4096. cache: what the prompts continue; it goes on where this call ends, its
                last token included.

        Returns:
            Tensor [B, T + new] for a tensor, a list of 1-D tensors for a list.

        Raises:
            ValueError: an empty prompt, or an argument out of range. UserWarning: one that has no effect.
        """
        rows = _rows(self, input_ids, more.get("cache"))
        steps = list(_steps(self, rows, max_new_tokens, temperature, top_p, seed, **more))
        new = torch.stack([token for token, _ in steps], 1) if steps else rows[0].new_empty(len(rows), 0)
        if isinstance(input_ids, torch.Tensor):
            return torch.cat([torch.stack(rows), new], 1)
        ends = [sum(now[b] for _, now in steps) for b in range(len(rows))]
        return [torch.cat([row, x[:end]]) for row, x, end in zip(rows, new, ends, strict=True)]

    def stream(self, input_ids, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed=None, **more):
        """`generate`, one token of every prompt at a time.

        Args:
            input_ids, max_new_tokens, temperature, top_p, seed, more: as for `generate`.

        Returns:
            Iterator of tensors [B] int64, each as soon as it is known; it ends when all prompts have.

        Raises:
            ValueError: an empty prompt, or an argument out of range.
        """
        steps = _steps(self, input_ids, max_new_tokens, temperature, top_p, seed, **more)
        return (token for token, _ in steps)
