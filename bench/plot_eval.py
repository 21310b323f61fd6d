"""Plots of trained models, accuracy and bits per token by length, and of the selections that retrieval makes."""

import itertools
import math
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from hsa_tl.bench.compare import grouped, length_label
from hsa_tl.bench.contenders import MODELS
from hsa_tl.bench.plot import GREY, RED, band, grid, interval, length_axis, pyplot, save
from hsa_tl.bench.ruler import WINDOWS, paired
from hsa_tl.model.recipe import load_recipe, recipe_names

TASKS = {
    "s-niah": "S-NIAH", "mk-niah-1": "MK-NIAH 1", "mk-niah-2": "MK-NIAH 2", "mk-niah-3": "MK-NIAH 3",
    "mq-niah": "MQ-NIAH", "vt": "variable tracking", "fwe": "frequent words",
}  # fmt: skip
ATTENTION = {"hsa": "HSA", "full": "full attention", "swa": "sliding window only", "nsa": "NSA", "moba": "MoBA"}
NEEDLES = {
    "s-niah": "S-NIAH", "mq-niah": "MQ-NIAH (6 needles, 2 queries)", "mk-niah-3": "MK-NIAH 3 (all needles)",
    "mq-niah-96": "MQ-NIAH (96 needles, 4 queries)", "s-niah-keys": "S-NIAH, noise of keys",
    "s-niah-all": "S-NIAH, noise of all ids",
}  # fmt: skip
FEWEST = 30  # answers that make a rate
MARKERS = "osPD^vX*"
COLORS = ("#0b6fb8", "#e07b00", "#3aa6a0", "#c2185b", "#9a6fb0", "#444444", "#b08d57")


def model_name(recipe: str) -> str:
    """ "text-tiny-swa" -> "sliding window only (text-tiny-swa)"; a recipe that does not ship is its own name."""
    last = recipe.rpartition("-")[2]
    if last in ATTENTION:
        return f"{ATTENTION[last]} ({recipe})"
    return f"{ATTENTION[load_recipe(recipe).config().attention]} ({recipe})" if recipe in recipe_names() else recipe


def samples_of(rows: list) -> str:
    """ "4" where all rows have 4, else "4 to 100"."""
    counts = [r.samples for r in rows]
    first, last = min(counts), max(counts)
    return f"{first}" if first == last else f"{first} to {last}"


def share_axis(ax, chance: float, label: str | None = None) -> None:
    """Of shares of right answers, with a line at chance, 0 where it is negligible."""
    ax.set_ylim(-0.03, 1.03)
    if chance > 0:
        ax.axhline(chance, color=GREY, linewidth=1, linestyle="--", label=label)


def heat_map(figure, ax, values, label: str, **options) -> None:
    image = ax.imshow(values, vmin=0, vmax=1, origin="upper", **options)
    ax.grid(False)
    figure.colorbar(image, ax=ax, shrink=0.8, label=label)


def _accuracy(ax, x: list[float], points, label: str, color: str) -> None:
    """points: the rows at each x, whose answers count together, with Wilson's interval."""
    counts = [(sum(r.accuracy * r.answers for r in rows), sum(r.answers for r in rows)) for rows in points]
    y = [right / answers for right, answers in counts]
    bars = np.abs(np.transpose([interval(*count) for count in counts]) - y)
    ax.errorbar(x, y, bars, color=color, marker="o", markersize=4, capsize=2, linewidth=1.2, label=label)


def _by_length_and_depth(figure, ax, rows: list, task: str) -> None:
    lengths, depths = sorted({r.length for r in rows}), sorted({r.depth for r in rows})
    at = {(r.depth, r.length): r.accuracy for r in rows}
    shares = [[at.get((d, T), float("nan")) for T in lengths] for d in depths]
    heat_map(figure, ax, shares, "share of answers right", cmap="viridis", aspect="auto")
    every = -(-len(lengths) // 8)
    ax.set_xticks(range(len(lengths))[::every], [length_label(T) for T in lengths[::every]])
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
    title = f"{TASKS.get(task, task)}, {min(r.answers for r in rows)} answers each"
    ax.set(xlabel="tokens T", ylabel="depth of the needle", title=title)


def plot_ruler(rows: list, model: str, trained_length: int, chance: float, path: Path) -> list[Path]:
    """Accuracy by length, all depths together, and by depth: a heat map of each task, or lines where T is one.

    rows: RulerRow of one model. chance: of one answer, 0 where it is negligible.
    """
    tasks, lengths = list(dict.fromkeys(r.task for r in rows)), sorted({r.length for r in rows})
    deep = [t for t in tasks if len({r.depth for r in rows if r.task == t}) > 1]
    by_depth, maps = ([], deep) if len(lengths) > 1 else (deep, [])
    figure, (ax, *others) = grid(1 + len(maps), 5.6, 3.7, 3.6, 0.5)
    for other, task in zip(others, maps, strict=True):
        _by_length_and_depth(figure, other, [r for r in rows if r.task == task], task)
    at = attrgetter("depth" if by_depth else "length")
    for i, task in enumerate(by_depth or tasks):
        points = grouped(sorted((r for r in rows if r.task == task), key=at), at)
        scale, shift = (100, 0.8 * (i - (len(deep) - 1) / 2)) if by_depth else (1, 0.0)
        x = [scale * place + shift for place in points]
        _accuracy(ax, x, points.values(), TASKS.get(task, task), COLORS[i % len(COLORS)])
    if by_depth:
        ax.set(xlabel="depth of the needle, %", title=f"by depth, at {length_label(lengths[0])} tokens")
    else:
        length_axis(ax, lengths)
        ax.set_title("by length, all depths together")
    ax.set_ylabel("share of answers right")
    share_axis(ax, chance, f"chance, 1 in {1 / chance:.0f}" if chance else None)
    ax.legend(fontsize=8)
    title = (
        f"RULER of {model_name(model)}, trained at {length_label(trained_length)} tokens at most\n{rows[0].method}, "
        f"{samples_of(rows)} contexts for each length, task and depth; bars: Wilson's 95 % interval"
    )
    return save(figure, path, title)


def plot_lengths(rows: list, chance: float, path: Path, labels: dict[str, str] | None = None) -> list[Path]:
    """Accuracy of lengths.Row against length, a panel for each task: the median of the seeds, with a band from the low
    end of the worst one's Wilson interval to the high end of the best one's. Points of too few answers are left out.

    labels: of models, by default those of `hsa-tl lengths`.
    """
    labels = {model: about.label for model, about in MODELS.items()} if labels is None else labels
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    colors = pyplot().colormaps["tab20"].colors
    tasks, trains = [t for t in NEEDLES if any(r.task == t for r in rows)], sorted({r.train_length for r in rows})
    figure, axes = grid(len(tasks), 0, 4.4, 3.6, 0, sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        mine = sorted((r for r in rows if r.task == task), key=attrgetter("length"))
        for i, (model, label) in enumerate(labels.items()):
            seeds = len({r.seed for r in rows if r.model == model})
            found = (r for r in mine if r.model == model and r.answers >= FEWEST)
            points = grouped(found, attrgetter("length"))
            if not points:
                continue
            ends = [[interval(r.accuracy * r.answers, r.answers) for r in own] for own in points.values()]
            low, high = [min(a for a, _ in x) for x in ends], [max(b for _, b in x) for x in ends]
            middle = [median(r.accuracy for r in own) for own in points.values()]
            look = colors[i], MARKERS[i % len(MARKERS)]
            band(ax, list(points), low, middle, high, f"{label}, {seeds} seed{'s' if seeds > 1 else ''}", *look)
        length_axis(ax, sorted({r.length for r in mine}), trains)
        share_axis(ax, chance)
        ax.set_title(NEEDLES[task])
    axes[0].set_ylabel("share of answers right")
    guess = f"chance is 1 in {1 / chance:.0f} (dashed); " if chance else ""
    title = (
        f"Trained at {' and '.join(map(str, trains))} tokens (dotted); median seed, and the 95 % intervals of all\n"
        f"{guess}{samples_of(rows)} contexts a point, of {FEWEST} answers or more"
    )
    return save(figure, path, title, 3)


def plot_perplexity(rows: list[dict], path: Path) -> list[Path]:
    """Bits per token against context length of write_rows' rows: of each recipe the mean of its seeds, a band of all.

    Beside it, of each recipe whose rows have the bits of as many places at several lengths, the change from its
    shortest length in pairs, whose intervals tell noise from a trend. Without any the axis begins at 0, and bars are of
    the mean.
    """
    at, names = itemgetter("length"), list(dict.fromkeys(r["model"] for r in rows))
    by_model = {name: grouped(sorted(found, key=at), at) for name, found in grouped(rows, itemgetter("model")).items()}
    shown = [name for name in names if not name.endswith(WINDOWS)] or names
    places = {}
    for name in shown:
        counts = {len(r.get("bits") or ()) for found in by_model[name].values() for r in found}
        if len(by_model[name]) > 1 and len(counts) == 1 and max(counts) > 1:
            places[name] = [np.mean([r["bits"] for r in found], 0) for found in by_model[name].values()]
    figure, (left, *right) = grid(2 if places else 1, 7, 5.2, 4.2, 0.6)
    looks = [(color, marker) for marker in MARKERS for color in COLORS]
    for name, (color, marker) in zip(shown, itertools.cycle(looks), strict=False):
        lengths, found = list(by_model[name]), by_model[name].values()
        bits = [[r["bits_per_token"] for r in mine] for mine in found]
        size, seeds = next(iter(found))[0]["parameters"], len({r["seed"] for mine in found for r in mine})
        label = f"{model_name(name)}, {size / 1e6:.2f}M, {seeds} seed{'s' * (seeds > 1)}"
        band(left, lengths, *([f(b) for b in bits] for f in (min, mean, max)), label, color, marker)
        if alone := [r["bits_per_token"] for mine in by_model.get(name + WINDOWS, {}).values() for r in mine]:
            left.axhline(mean(alone), color=color, linewidth=1, linestyle="--")
        if name in places:
            change, error = zip(*(paired(p, places[name][0]) for p in places[name]), strict=True)
            look = {"color": color, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
            right[0].errorbar(lengths, change, [1.96 * e for e in error], **look)
        elif not places:
            bars = [1.96 * mean(r.get("standard_error") or 0.0 for r in mine) for mine in found]
            left.errorbar(lengths, list(map(mean, bits)), bars, fmt="none", capsize=2, color=color)
    trained, windows, last = (sorted({r[name] for r in rows}) for name in ("trained_length", "windows", "tokens"))
    for ax in (left, *right):
        length_axis(ax, sorted({r["length"] for r in rows}), trained)
    for ax in right:
        ax.axhline(0, color=GREY, linewidth=0.8)
        told = "from the shortest, in pairs; bars: 95 % interval over the places"
        ax.set(ylabel="change of bits per token", title=told)
    if not places:
        left.set_ylim(0, 1.1 * max(r["bits_per_token"] for r in rows))
    marks = "dashed: windows alone" if places else "bars: 95 % interval of the mean, where it is known"
    left.set(ylabel="bits per token, lower is better", title=f"mean of the seeds, band of all; {marks}")
    title = (
        f"Held-out text by context, trained at {' and '.join(map(length_label, trained))} tokens (dotted); the last "
        f"{' or '.join(map(str, last))} tokens of {' or '.join(map(str, windows))} places"
    )
    return save(figure, path, title, 3 if places else 2)


def plot_distances(found: dict, path: Path) -> list[Path]:
    """Weight by distance in chunks, bars for each HSA layer, of what `hsa-tl eval selections` writes as JSON."""
    layers, S = found["weight_by_distance"], found["chunk_size"]
    figure, (ax,) = grid(1, 7, 0, 3.8, 0)
    width = 0.8 / len(layers)
    for i, (layer, shares) in enumerate(layers.items()):
        x = [b + (i - (len(layers) - 1) / 2) * width for b in range(len(shares))]
        color = COLORS[i % len(COLORS)]
        bars = ax.bar(x, shares, 0.95 * width, color=color, label=layer)
        ax.bar_label(bars, fmt="%.2f", fontsize=7)
    trained = math.log2(max(2, found["trained_length"] // S)) - 0.5
    if trained < len(shares) - 0.5:
        ax.axvline(trained, color=GREY, linewidth=1, linestyle=":", label="as far as training shows")
    ends = [(2**b - 1, 2 ** (b + 1) - 2) for b in range(len(shares))]
    ax.set_xticks(range(len(shares)), [f"{a}" if a == b else f"{a}-{b}" for a, b in ends], fontsize=7)
    xlabel = f"chunks of {S} tokens between a token's own and the one it reads"
    ax.set(xlabel=xlabel, ylabel="share of the weight", ylim=(0, 1.1))
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8)
    ax.set_title(
        f"How far back does HSA read? {model_name(found['model'])}, seed {found['seed']}\n"
        f"tokens {length_label(found['tokens'] // 2)} to {length_label(found['tokens'])}, top {found['topk']}"
    )
    return save(figure, path)


def plot_noise(row, model: str, path: Path) -> list[Path]:
    """Score of each chunk along the context, and what leaving it out does, of a noise.NoiseRow."""
    figure, (ax,) = grid(1, 7, 0, 3.6, 0)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.vlines(row.chunks, 0, row.scores, color=COLORS[0], linewidth=2.5, label="score, by the gradient")
    ax.plot(row.chunks, row.without, "o", color=COLORS[1], markersize=4, label="measured by leaving it out")
    if row.needle is not None:
        ax.axvline(row.needle, color=GREY, linewidth=1, linestyle=":", label="the needle's chunk")
    ax.set(xlim=(-1, row.length // row.chunk_size), xlabel=f"chunk of {row.chunk_size} tokens")
    ax.set(ylabel="bits per token, helped above 0")
    ax.legend(fontsize=8)
    last = "an answer" if row.needle is not None else f"the last {row.targets} tokens"
    ax.set_title(
        f"Which chunks helped {model_name(model)} predict {last}?\n{row.task}, {length_label(row.length)} tokens, "
        f"{row.loss:.4f} bits per token; chunks that were not read have no mark"
    )
    return save(figure, path)


def plot_unions(rows: list[dict], pays_below: float, text_name: str, path: Path) -> list[Path]:
    """Union sizes of neighbouring tokens' selections as a share of tokens * K: text beside chance."""
    figure, (left, right) = grid(2, 9.5, 0, 4, 0, width_ratios=(2, 1))
    for i, (n, color) in enumerate(zip(rows[0]["union_share"], ("#0b6fb8", "#6aaed6", "#b9d6ec"), strict=False)):
        x = [j + (i - 1) * 0.26 for j in range(len(rows))]
        bars = left.bar(x, [r["union_share"][n] for r in rows], 0.24, color=color, label=f"{n} tokens")
        left.bar_label(bars, [f"{r['union_chunks'][n]:.0f}" for r in rows], fontsize=8)
    line = f"below {pays_below} one walk over the union is cheaper"
    left.axhline(pays_below, color=RED, linewidth=1, linestyle="--", label=line)
    title = "Union of neighbouring tokens' chunks (number: chunks)"
    left.set(ylabel="distinct chunks / (tokens x K)", title=title)
    left.legend(loc="upper left", ncols=2)
    bars = right.bar(range(len(rows)), [r["overlap"] for r in rows], 0.6, color="#3aa6a0")
    right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set(ylabel="share of a token's chunks", title="Chosen by its predecessor too")
    for ax in (left, right):
        ax.set_ylim(0, 1.1)
        ax.set_xticks(range(len(rows)), [f"K = {r['K']}\n{r['selection']}" for r in rows])
        ax.grid(axis="x", visible=False)
    r = rows[0]
    title = (
        f"Do neighbouring tokens retrieve the same chunks? {r['tokens']} bytes of {text_name}, {r['chunks']} chunks\n"
        "(over the tokens that see more than K chunks)"
    )
    return save(figure, path, title)


def plot_chosen(chosen, S: int, files: tuple[tuple[str, int], ...], text_name: str, path: Path) -> list[Path]:
    """chosen [T, K]: a heat map, how many of a chunk's S tokens retrieve each earlier chunk."""
    T, K = chosen.shape
    N = T // S
    column = chosen[: N * S].long()
    cell = (torch.arange(N * S) // S)[:, None] * N + column
    counts = torch.bincount(cell[column >= 0], minlength=N * N).view(N, N)
    share = (counts / S).masked_fill(counts == 0, float("nan"))
    figure, (ax,) = grid(1, 7.4, 0, 6.4, 0)
    label = f"share of the {S} tokens of a chunk that retrieve it"
    heat_map(figure, ax, share.numpy(), label, cmap="viridis_r", interpolation="nearest")
    names, starts = zip(*((name, start / S) for name, start in files if start < N * S), strict=True)
    for at in starts[1:]:
        ax.axhline(at - 0.5, color=RED, linewidth=0.6)
        ax.axvline(at - 0.5, color=RED, linewidth=0.6)
    if len(starts) > 1:
        spans = zip(names, starts, (*starts[1:], N), strict=True)
        wide = [((at + end) / 2, name) for name, at, end in spans if end - at > N * len(name) / 95]
        top = ax.secondary_xaxis("top")
        top.set_xticks([middle for middle, _ in wide], [name for _, name in wide], fontsize=7)
        top.tick_params(length=0)
    legend = "\nred: borders of files" if len(starts) > 1 else ""
    ax.set(xlabel=f"retrieved chunk ({S} bytes each)", ylabel="chunk of the retrieving tokens")
    ax.set_title(f"Which chunks do tokens retrieve? {T} bytes of {text_name}, K = {K}{legend}", pad=22)
    return save(figure, path)
