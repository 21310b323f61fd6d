"""Finds the anchors by which a converted model guesses where its attention goes: `hsa-tl landmarks`.

    recalls = add_landmarks(Path("out/smol"), Path("book.txt").read_bytes())

Nothing is trained: an anchor is a query that the layer asked in an ordinary text, see hsa_tl.model.selected.Landmarks.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hsa_tl.model import checkpoint, pretrained
from hsa_tl.model.attention import rotate
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.convert import write
from hsa_tl.model.model import Model
from hsa_tl.model.selected import Landmarks, chooser_of, scores
from hsa_tl.model.train import reconfigure
from hsa_tl.validation import require

BY = ("mass", "landmark", "mean")
ASKED = 256  # tokens of a context whose queries are looked at, in every layer


def _read(model: Model, tokens: Sequence[int], rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, reading the tokens: queries [1, t, A, D] of these rows at the capped distance, and all keys."""
    found = []

    def look(layer, arguments):
        x, _, first_v = arguments[:3]
        q, k, _, _ = layer.attention.project(x, first_v_BTHD=first_v)
        rule, q = layer.attention.rule, q[:, rows]
        at = torch.tensor([rule.window], device=q.device)
        found.append((rotate(q, at, rule.theta), k))

    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(layer.register_forward_pre_hook(look))
        model(torch.tensor([list(tokens)], device=model.embedding.weight.device), logits_to_keep=1)
    return found


def _recalls(attention, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[BY, H, G, t]: the share of a query head's attention to all chunks that the topk chosen chunks hold."""
    rule, H = attention.rule, k.shape[2]
    S = rule.chunk_size
    visible = (rows + 1 - rule.window - rule.sinks) // S
    N = int(visible.max())
    k = k[:, rule.sinks : rule.sinks + N * S]
    hidden = torch.arange(N, device=k.device) >= visible[:, None]  # [t, N]
    mass = scores(q, k).unflatten(-1, (N, S)).logsumexp(-1).masked_fill(hidden, -torch.inf)  # [1, H, G, t, N]
    share, found = mass.softmax(-1), []
    for name in BY:
        score, chooser = mass.amax(2), chooser_of(name, attention.landmarks)
        if chooser is not None:
            score = torch.einsum("bthe,bnhe->bhtn", chooser.ask(q, H), chooser.of(k, S))
        chosen = score.masked_fill(hidden, -torch.inf).topk(rule.topk, -1).indices[:, :, None]
        found.append(share.gather(-1, chosen.expand(*share.shape[:-1], -1)).sum(-1)[0])
    return torch.stack(found)


@torch.no_grad()
def find_landmarks(
    model: Model, contexts: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], *, anchors: int = 64,
    tolerance: float = 0.4, seed: int = 0,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Gives a model of attention "selected" landmarks, in place; its selection is "landmark" afterwards.

    Args:
        model (Model): of attention "selected", whose topk is a number above 0.
        contexts (sequences of token ids): ordinary texts, which are read with the exact mass.
        held_out (sequences of token ids): others to judge by, so long that a token chooses.
        anchors (int): M of each key/value head. Default: 64.
        tolerance (float): a key/value head that would miss more of the recall by exact mass, in the worst twentieth of
            the tokens, keeps the exact mass, see `ModelConfig.exact_heads`: it copies, which a mean over tokens hides.
            Default: 0.4.
        seed (int): of the tokens and the queries that are taken. Default: 0.

    Returns:
        dict: for "mass", "landmark" and "mean" the recall on held_out, [layers][H]: the share of a query head's
        attention to all chunks that the chosen ones hold, 0 in a layer that chooses none; "landmark" before any head is
        made exact.

    Raises:
        ValueError: a model of another attention or topk; contexts of too few queries; a text that is too short.
    """
    c = model.config
    if c.attention != "selected" or c.topk in (0, "all"):
        raise ValueError(f"model must be of attention selected with a topk, got {c.attention} and topk {c.topk}")
    queries = sum(min(ASKED, len(x)) for x in contexts) * (c.heads // c.kv_heads)
    require(queries >= anchors, "contexts", f"ask at least anchors = {anchors} queries", queries)
    first = c.sinks + c.window + (c.topk + 1) * c.chunk_size - 1  # token that sees more chunks than it takes
    if (shortest := min(map(len, held_out), default=0)) <= first:
        raise ValueError(f"held_out must be of more than {first} tokens, got {shortest}")
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device

    def draw(first: int, last: int) -> torch.Tensor:
        return first + torch.randperm(last - first, generator=generator)[:ASKED].to(device)

    reconfigure(model, replace(c, selection="mass"))
    read = [_read(model, tokens, draw(0, len(tokens))) for tokens in contexts]
    for layer, parts in zip(model.layers, zip(*read, strict=True), strict=True):
        q = torch.cat([q[0].unflatten(1, (c.kv_heads, -1)) for q, _ in parts]).transpose(0, 1).flatten(1, 2)
        landmarks = Landmarks(c.kv_heads, c.head_dim, anchors)
        landmarks.anchors.copy_(q[:, torch.randperm(q.shape[1], generator=generator)[:anchors]])
        layer.attention.landmarks = landmarks.to(q)
    judged: list[list[torch.Tensor]] = [[] for _ in model.layers]
    for tokens in held_out:
        rows = draw(first, len(tokens))
        for layer, found, parts in zip(model.layers, _read(model, tokens, rows), judged, strict=True):
            parts.append(_recalls(layer.attention, *found, rows))
    shares = torch.stack([torch.cat(parts, -1) for parts in judged], 1)  # [BY, layers, H, G, t]
    missed = (shares[0] - shares[1]).amax(2).sort(-1, descending=True).values
    worst = missed[..., : max(1, missed.shape[-1] // 20)].mean(-1)
    exact_heads = tuple((worst > tolerance).flatten().nonzero().flatten().tolist())
    reconfigure(model, replace(c, anchors=anchors, selection="landmark", exact_heads=exact_heads))
    return {name: x.tolist() for name, x in zip(BY, shares.mean((-2, -1)), strict=True)}


def add_landmarks(
    run: Path, text: bytes, *, anchors: int = 64, contexts: int = 2, length: int = 4096, tolerance: float = 0.4,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, list[list[float]]]]:  # fmt: skip
    """Gives a converted run landmarks, see `find_landmarks`; its checkpoint is replaced.

    Args:
        run (Path): a run of `hsa-tl convert`.
        text (bytes): UTF-8, of `contexts` + 1 parts of at least `length` tokens. A piece of the last one judges.
        anchors, tolerance: of `find_landmarks`. Default: 64, 0.4.
        contexts (int): pieces of the text whose queries are looked at. Default: 2.
        length (int): tokens of a piece. Default: 4096.
        seed (int): of pieces and queries. Default: 0.

    Returns:
        (ModelConfig, dict): the run's; and what `find_landmarks` returns.

    Raises:
        ValueError: a run of another kind; a text that is too short; what `find_landmarks` refuses.
    """
    model, found = pretrained.load(run), checkpoint.latest(run)
    require(found.recipe["source"] is not None, "run", "be one that hsa-tl convert wrote", run)
    tokens = model.tokenizer.encode(text)
    part = len(tokens) // (contexts + 1)
    require(part >= length, "text", f"hold {contexts + 1} times length = {length} tokens", len(tokens))
    rng = random.Random(seed)
    starts = [i * part + rng.randrange(part - length + 1) for i in range(contexts + 1)]
    *pieces, judge = (tokens[start : start + length] for start in starts)
    recalls = find_landmarks(model, pieces, [judge], anchors=anchors, tolerance=tolerance, seed=seed)
    write(run, model, found.recipe["name"], found.recipe["source"])
    return model.config, recalls
