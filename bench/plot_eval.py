"""Plots of `hsa-tl eval`: accuracy by length and by depth with its uncertainty, and bits per token by context."""

from pathlib import Path

from hsa_tl.bench.plot import grid, interval, length_axis, length_label, pyplot, save
from hsa_tl.model.recipe import load_recipe, recipe_names

TASKS = {
    "s-niah": "S-NIAH", "mk-niah-1": "MK-NIAH 1", "mk-niah-2": "MK-NIAH 2", "mk-niah-3": "MK-NIAH 3",
    "mq-niah": "MQ-NIAH", "vt": "variable tracking", "fwe": "frequent words",
}  # fmt: skip
ATTENTION = {"hsa": "HSA", "full": "full attention", "swa": "sliding window only", "nsa": "NSA-style"}
COLORS = ("#0b6fb8", "#e07b00", "#3aa6a0", "#c2185b", "#9a6fb0", "#444444", "#b08d57")


def model_name(recipe: str) -> str:
    """ "text-tiny-swa" -> "sliding window only (text-tiny-swa)"; a recipe that does not ship is its own name."""
    last = recipe.rpartition("-")[2]
    if last in ATTENTION:
        return f"{ATTENTION[last]} ({recipe})"
    return f"{ATTENTION[load_recipe(recipe).config().attention]} ({recipe})" if recipe in recipe_names() else recipe


def _accuracy(ax, points: list[tuple[float, list]], label: str, color: str, shift: float = 0.0) -> None:
    """points: (x, rows); the rows' answers together, with Wilson's 95 % interval. shift: of x, not to hide others."""
    x, y, below, above = [], [], [], []
    for at, rows in points:
        n = sum(r.answers for r in rows)
        right = sum(r.accuracy * r.answers for r in rows)
        low, high = interval(right, n)
        x.append(at + shift)
        y.append(right / n)
        below.append(right / n - low)
        above.append(high - right / n)
    ax.errorbar(x, y, (below, above), color=color, marker="o", markersize=4, capsize=2, linewidth=1.2, label=label)


def _finish(ax, chance: float) -> None:
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("share of answers right")
    if chance > 0:
        ax.axhline(chance, color="#888888", linewidth=1, linestyle="--", label=f"chance, 1 in {1 / chance:.0f}")
    ax.legend(fontsize=8)


def _heat_map(figure, ax, rows: list, task: str) -> None:
    lengths, depths = sorted({r.length for r in rows}), sorted({r.depth for r in rows})
    at = {(r.depth, r.length): r.accuracy for r in rows}
    grid = [[at.get((d, T), float("nan")) for T in lengths] for d in depths]
    image = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
    every = -(-len(lengths) // 8)
    ax.set_xticks(range(len(lengths))[::every], [length_label(T) for T in lengths[::every]])
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
    ax.grid(False)
    ax.set_xlabel("tokens T")
    ax.set_ylabel("depth of the needle")
    ax.set_title(f"{TASKS.get(task, task)}, {min(r.answers for r in rows)} answers each")
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of answers right")


def plot_ruler(rows: list, model: str, trained_length: int, chance: float, path: Path) -> list[Path]:
    """Accuracy by length, all depths together, and by depth: a heat map of each task, or lines where T is one.

    rows: RulerRow of one model. chance: of one answer, 0 where it is negligible.
    """
    tasks = list(dict.fromkeys(r.task for r in rows))
    lengths = sorted({r.length for r in rows})
    deep = [t for t in tasks if len({r.depth for r in rows if r.task == t}) > 1]
    panels = (["length"] if len(lengths) > 1 or not deep else []) + (
        deep if len(lengths) > 1 else ["depth"] * bool(deep)
    )
    figure, axes = grid(len(panels), 5.6, 3.7, 3.6, 0.5)
    for ax, panel in zip(axes, panels, strict=True):
        if panel in deep:
            _heat_map(figure, ax, [r for r in rows if r.task == panel], panel)
            continue
        for i, task in enumerate(tasks if panel == "length" else deep):
            mine = [r for r in rows if r.task == task]
            x_of = (lambda r: r.length) if panel == "length" else (lambda r: 100 * r.depth)
            points = [(x, [r for r in mine if x_of(r) == x]) for x in sorted(set(map(x_of, mine)))]
            shift = 0.0 if panel == "length" else 0.8 * (i - (len(deep) - 1) / 2)
            _accuracy(ax, points, TASKS.get(task, task), COLORS[i % len(COLORS)], shift)
        if panel == "length":
            length_axis(ax, lengths)
            ax.set_title("by length, all depths together")
        else:
            ax.set_xlabel("depth of the needle, %")
            ax.set_title(f"by depth, at {length_label(lengths[0])} tokens")
        _finish(ax, chance)
    samples = sorted({r.samples for r in rows})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    figure.suptitle(
        f"RULER of {model_name(model)}, trained at {length_label(trained_length)} tokens at most\n{rows[0].method}, "
        f"{count} contexts for each length, task and depth; bars: Wilson's 95 % interval", fontsize=10,
    )  # fmt: skip
    return save(figure, path)


def plot_perplexity(rows: list[dict], path: Path) -> list[Path]:
    """Bits per token against context length, a line for each run of write_rows' rows; from 0: noise is no trend."""
    figure, ax = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    for i, (name, seed) in enumerate(dict.fromkeys((r["model"], r["seed"]) for r in rows)):
        mine = sorted((r for r in rows if (r["model"], r["seed"]) == (name, seed)), key=lambda r: r["length"])
        label = f"{model_name(name)}, {mine[0]['parameters'] / 1e6:.2f}M, seed {seed}"
        bars = [1.96 * (r.get("standard_error") or 0.0) for r in mine]
        x, y = [r["length"] for r in mine], [r["bits_per_token"] for r in mine]
        color = COLORS[i % len(COLORS)]
        ax.errorbar(x, y, bars if any(bars) else None, marker="o", markersize=4, capsize=2, color=color, label=label)
    for trained in sorted({r["trained_length"] for r in rows}):
        ax.axvline(trained, color="#888888", linewidth=0.8, linestyle=":")
    length_axis(ax, sorted({r["length"] for r in rows}))
    ax.set_ylim(0, 1.1 * max(r["bits_per_token"] for r in rows))
    ax.set_ylabel("bits per token, lower is better")
    ax.legend(fontsize=8)
    windows, last = (sorted({r[name] for r in rows}) for name in ("windows", "tokens"))
    bars = (
        "bars: 95 % interval of the mean"
        if any(r.get("standard_error") for r in rows)
        else "the rows have no intervals"
    )
    trained = " and ".join(length_label(T) for T in sorted({r["trained_length"] for r in rows}))
    ax.set_title(
        f"Perplexity of held-out text by context; trained at {trained} tokens (dotted)\nthe last "
        f"{' or '.join(map(str, last))} tokens of {' or '.join(map(str, windows))} places; {bars}"
    )
    return save(figure, path)
