"""`hsa-tl eval noise`: which chunks of the context helped a prediction of a trained model, and which hurt it.

The score of a chunk is a gradient, as in context denoising training (2510.05862): what would be added to the loss, to
first order, if no token retrieved the chunk. Three backward passes score all chunks; leaving out each tells the truth.

Shape suffixes: as in hsa_tl.model.hsa.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from hsa_tl.bench import plot_eval, record
from hsa_tl.model.chunk_memory import ChunkMemory
from hsa_tl.model.config import UNLEARNED
from hsa_tl.model.data import Sample
from hsa_tl.model.model import Model
from hsa_tl.terminal import plot_or_say, say, show_table
from hsa_tl.validation import require

SHARES = (1 / 16, 1 / 4, 1.0)
SHOWN = 5  # chunks that helped most, and as many that hurt most


class _Shifted:
    """A memory with `shift` [N] on the scores of its chunks: -inf leaves one out, a gradient at 0 estimates it."""

    def __init__(self, memory: ChunkMemory, shift_N: torch.Tensor):
        self.memory, self.shift_N, self.attend, self.masses = memory, shift_N, memory.attend, memory.masses

    def retrieve(self, q_slc, start, topk: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
        scores_BTRK, indices_BTRK = self.memory.retrieve(q_slc, start, topk, **options)
        scores_BTRK = scores_BTRK + self.shift_N[indices_BTRK.clamp(min=0).long()]
        return scores_BTRK, indices_BTRK.masked_fill(scores_BTRK == -torch.inf, -1)

    def scores(self, q_slc, start, **options) -> torch.Tensor:
        return self.memory.scores(q_slc, start, **options) + self.shift_N


class Prediction:
    """What a model says at some positions of tokens [T], and what each chunk of its memory does to the loss there.

    Args:
        model (Model): with HSA, whose fusion weighs chunks by their scores.
        tokens (array [T]): the context and what follows it.
        targets (array [P]): positions that are predicted, ascending, each from the tokens before it; from 1 on.

    Raises:
        ValueError: another model.
    """

    def __init__(self, model: Model, tokens: np.ndarray, targets: np.ndarray):
        c = model.config
        if model.encoder is None or c.fusion in UNLEARNED:
            raise ValueError(f"model must have HSA that weighs by scores, got {c.attention} with fusion {c.fusion!r}")
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
        self.model, self.keep = model, len(tokens) - int(targets[0]) + 1
        self.at, self.wanted = torch.from_numpy(targets - targets[0]), ids[0, targets]
        with torch.no_grad():
            self.h_BTC, self.first_v_BTHD = model.lower(model.embed(ids))
            self.memory = model.encode(self.h_BTC)
        self.zeros_N = self.memory.landmarks.new_zeros(self.memory.landmarks.shape[1])

    def loss(self, shift_N: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """Bits per target, with `shift` on the scores of the chunks and this share of what reading them gives."""
        memory = _Shifted(self.memory._replace(v=share * self.memory.v), shift_N)
        h_BTC = self.model.upper(self.h_BTC, memory, self.first_v_BTHD, keep=self.keep)
        return F.cross_entropy(self.model.head(h_BTC[0, self.at]), self.wanted) / np.log(2)

    def scores(self, shares: tuple[float, ...] = SHARES) -> np.ndarray:
        """[N], by how many bits per target the loss would rise without a chunk, to first order: above 0 it helped.

        The gradient of a sure prediction vanishes. So it is a mean over shares of what the memory gives, as integrated
        gradients are; (1.0,) is the gradient at the model as it is.
        """
        shift_N = self.zeros_N.clone().requires_grad_()
        loss = sum(self.loss(shift_N, share) for share in shares) / len(shares)
        return -torch.autograd.grad(loss, shift_N)[0].cpu().numpy()

    @torch.no_grad()
    def without(self, chunk: int) -> float:
        """By how many bits per target the loss rises where the slots that retrieved the chunk are empty."""
        shift_N = self.zeros_N.clone()
        shift_N[chunk] = -torch.inf
        return float(self.loss(shift_N) - self.loss(self.zeros_N))


@dataclass(frozen=True)
class NoiseRow:
    """Of one context: the chunks that its prediction read, and of each its score and what leaving it out does.

    loss: bits per target with all of them. needle: the chunk where the answer stands, None in a text. best: that of the
    greatest score. ranks: Spearman's correlation of scores and without, None where all are alike. gradient_best and
    gradient_ranks: of the gradient at the model as it is.
    """

    task: str
    length: int
    sample: int
    chunk_size: int
    targets: int
    loss: float
    needle: int | None
    best: int
    gradient_best: int
    ranks: float | None
    gradient_ranks: float | None
    chunks: list[int]
    scores: list[float]
    without: list[float]


def _ranks(scores, without: list[float]) -> float | None:
    from scipy.stats import spearmanr

    alike = len(set(without)) < 2 or len(set(scores)) < 2
    return None if alike else round(float(spearmanr(scores, without).statistic), 4)


def run_noise(model: Model, task: str, contexts: list[Sample]) -> Iterator[NoiseRow]:
    """A row for each context, whose first answer is predicted.

    ValueError: a context of less than 3 chunks or of which no chunk has a score, or a model that Prediction refuses.
    """
    S = model.config.chunk_size
    for i, context in enumerate(contexts):
        tokens, targets = context.tokens, np.arange(*context.answers[0])
        needle = None if context.needles is None else int(context.needles[0, 1] - 1) // S
        require(len(tokens) >= 3 * S, "lengths", f"be at least 3 chunks of {S} tokens", len(tokens))
        asked = Prediction(model, tokens, targets)
        scores, gradient = asked.scores(), asked.scores((1.0,))
        chunks = np.flatnonzero(scores)
        require(len(chunks) > 0, "model", "weigh several chunks against each other", f"topk {model.config.topk}")
        without = [asked.without(chunk) for chunk in chunks]
        loss = float(asked.loss(asked.zeros_N).detach())
        best = (int(chunks[np.argmax(x[chunks])]) for x in (scores, gradient))
        ranks = (_ranks(x[chunks], without) for x in (scores, gradient))
        rounded = ([round(float(x), 7) for x in found] for found in (scores[chunks], without))
        yield NoiseRow(task, len(tokens), i, S, len(targets), loss, needle, *best, *ranks, chunks.tolist(), *rounded)


def show_noise(console: Console, model: Model, about: dict, contexts: list[tuple[str, list]], out: Path) -> None:
    """Every context in a table and in out/noise.json, which keeps those of other models; the first one chunk by chunk,
    in a table and a picture. contexts: tasks with theirs. about: of the model, with the origin of its rows."""
    rows = [row for task, each in contexts for row in run_noise(model, task, each)]
    record.merge_rows(out / "noise.json", about, map(asdict, rows))
    cells = [
        (r.task, r.length, r.sample, f"{r.loss:.4f}", len(r.chunks), r.best, "" if r.needle is None else r.needle,
         *("" if x is None else f"{x:.2f}" for x in (r.ranks, r.gradient_ranks)))
        for r in rows
    ]  # fmt: skip
    names = ("task", "length", "sample", "bits", "chunks read", "helped most", "needle", "ranks", "of the gradient")
    show_table(console, f"noise of {about['model']}", names, cells, right=tuple(range(1, len(names))))
    first, S = rows[0], rows[0].chunk_size
    tokens = contexts[0][1][0].tokens
    order = np.argsort(first.scores)[::-1]
    cells = [
        (c := first.chunks[i], f"{c * S} to {c * S + S - 1}", f"{first.scores[i]:+.5f}", f"{first.without[i]:+.5f}",
         " ".join(model.tokenizer.decode(tokens[c * S : c * S + S]).split()))
        for i in (*order[:SHOWN], *order[SHOWN:][-SHOWN:])
    ]  # fmt: skip
    title = f"The first context: chunks that helped most and hurt most, in bits per token of {first.targets}"
    show_table(console, title, ("chunk", "tokens", "score", "without it", "text"), cells, right=(0, 2, 3))
    picture = plot_or_say(console, plot_eval.plot_noise, first, about["model"], out / "noise.png")
    say(console, "wrote " + ", ".join(map(str, [out / "noise.json", *picture])))
