"""Plots of benchmark rows and of nothing else: time, rates and memory against length, the baselines beside HSA."""

import io
import itertools
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

from hsa_tl.bench import compare, record
from hsa_tl.bench.compare import length_label
from hsa_tl.bench.record import Row
from hsa_tl.files import write_together

# Of each provider: its label, colour and marker.
LOOKS = {
    "dense": ("dense causal (SDPA)", "#444444", "o"),
    "dense-expanded": ("dense causal (SDPA, heads expanded)", "#9a6fb0", "P"),
    "dense-grouped": ("dense (SDPA, heads grouped)", "#9a6fb0", "P"),
    "dense-math": ("dense (SDPA, math)", "#c9a0dc", "X"),
    "dense-cudnn": ("dense (SDPA, cuDNN)", "#888888", "s"),
    "dense-flash": ("dense (SDPA, FlashAttention 2)", "#b08d57", "D"),
    "dense-flex": ("dense (FlexAttention)", "#d9b98a", "d"),
    "dense-fa3": ("dense (FlashAttention 3)", "#7a3e00", "^"),
    "materialise": ("materialised scores + torch.topk", "#444444", "s"),
    "full-attention": ("full attention", "#444444", "o"),
    "full-matched": ("full attention, as many parameters", "#888888", "s"),
    "hsa-auto": ("HSA", "#0b6fb8", "o"),
    "hsa-auto-two-level": ("HSA, retrieval in two levels", "#3aa6a0", "d"),
    "hsa-with-retrieval": ("HSA with its retrieval", "#0b3d66", "v"),
    "hsa": ("HSA", "#0b6fb8", "o"),
    "swa": ("sliding window only", "#9a6fb0", "P"),
    "retrieve": ("HSA's retrieval alone", "#6aaed6", "x"),
    "hsa-reference": ("HSA (PyTorch)", "#3aa6a0", "s"),
    "hsa-tilelang": ("HSA (TileLang)", "#c2185b", "^"),
    "hsa-triton": ("HSA (Triton)", "#e07b00", "D"),
    "ramstorage-triton": ("published HSA (Triton)", "#7cb342", "s"),
    "ramstorage-tilelang": ("published HSA (TileLang)", "#aed581", "s"),
    "hils": ("published HiLS", "#33691e", "p"),
    "selected-auto": ("one softmax over the chosen chunks", "#00838f", "h"),
    "selected-tilelang": ("one softmax over the chosen chunks (TileLang)", "#00acc1", "H"),
    "selected-triton": ("one softmax over the chosen chunks (Triton)", "#80deea", "8"),
    "nsa-fla": ("NSA (flash-linear-attention)", "#c0ca33", "*"),
    "moba": ("published MoBA", "#795548", "X"),
}
STRATEGIES = (("#e57fa5", "<"), ("#8e1246", ">"), ("#f06292", "v"), ("#ad1457", "X"), ("#f8bbd0", "P"))
RATES = {"throughput": ("TFLOP/s", 1e-3), "bandwidth": ("GB/s of least traffic", 1.0)}  # unit, and rows' units in it
SIZE = (7.2, 3.6, 3.3, 0.6)  # of a figure, see grid
GRID_COLUMNS = 3  # panels in a line of a figure
TICKS = 8  # lengths that an axis names, at most one more
RED, GREY, BLACK = "#c2185b", "#888888", "#000000"


def pyplot():
    """matplotlib.pyplot without a display. ValueError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib, which is not installed: pip install 'hsa-tl[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.dpi": 130, "font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10,
        "svg.hashsalt": "hsa-tl", "svg.fonttype": "none",
    })  # fmt: skip
    return plt


def interval(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: sound for few samples and for shares of 0 and 1."""
    z = 1.96
    share, room = right / n, z * z / n
    middle = (share + room / 2) / (1 + room)
    half = math.sqrt(share * (1 - share) * room + room * room / 4) / (1 + room)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def look(provider: str) -> tuple[str, str, str]:
    """Label, colour and marker; of a TileLang strategy by its name, of what is not known its name in black."""
    strategy = provider.removeprefix("hsa-tilelang-")
    if strategy == provider or provider in LOOKS:
        return LOOKS.get(provider, (provider, BLACK, "."))
    return f"HSA (TileLang, {strategy})", *STRATEGIES[zlib.crc32(strategy.encode()) % len(STRATEGIES)]


def order(provider: str) -> tuple:
    """Key that sorts providers as LOOKS has them."""
    known = list(LOOKS)
    return (known.index(provider) if provider in LOOKS else len(known), provider)


def length_ticks(lengths: list[int]) -> list[int]:
    """Those of the lengths, ascending, whose labels do not collide; the longest is one."""
    kept = lengths[-1:]
    for T in reversed(lengths[:-1]):
        if kept[0] / T >= (lengths[-1] / lengths[0]) ** (1 / TICKS) * 0.999:
            kept.insert(0, T)
    return kept


def length_axis(ax, lengths: list[int], trained: Iterable[int] = ()) -> None:
    """Of lengths, with dotted lines at those of training."""
    ax.set_xscale("log", base=2)
    ticks = length_ticks(lengths)
    ax.set_xticks(ticks, [length_label(T) for T in ticks])
    ax.minorticks_off()
    ax.set_xlabel("tokens T")
    for T in trained:
        ax.axvline(T, color=GREY, linewidth=0.8, linestyle=":")


def save(figure, path: Path, title: str = "", legend: int = 0) -> list[Path]:
    """path, a PNG, and the same as SVG beside it. title: above all axes. legend: columns of one for all, below them."""
    if legend:
        handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=legend)
    if title:
        figure.suptitle(title, fontsize=10)
    files = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
        files[path.with_suffix(f".{kind}")] = buffer.getvalue()
    write_together(files)
    pyplot().close(figure)
    return list(files)


def grid(count: int, least: float, width: float, height: float, more: float, **options):
    """A figure and its `count` axes, GRID_COLUMNS in a line; inches: least and each one's width, height, and more."""
    columns = min(GRID_COLUMNS, count)
    lines = -(-count // columns)
    size = (max(least, width * columns), height * lines + more)
    figure, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def band(ax, x: list, low: list, middle: list, high: list, label: str, color: str, marker: str) -> None:
    """A line with a band around it."""
    ax.plot(x, middle, color=color, marker=marker, markersize=4, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _draw(ax, rows: list[Row], ylabel: str, scale: float = 1.0) -> None:
    """A line for each provider, by length."""
    from matplotlib.ticker import LogLocator

    lines = compare.grouped(sorted(rows, key=lambda r: r.x), lambda r: r.provider)
    for name in sorted(lines, key=order):
        values = ([scale * getattr(r, q) for r in lines[name]] for q in ("p20", "p50", "p80"))
        band(ax, [r.x for r in lines[name]], *values, *look(name))
    if any(r.p50 > 0 for r in rows):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
    length_axis(ax, sorted({r.x for r in rows}))
    ax.set_ylabel(ylabel)


def _beside_baseline(ax, rows: list[Row], mode: str) -> str:
    """Marks the crossover; a line that compares at the longest length that both have."""
    name, ratio = compare.ratios(rows, mode)
    if not ratio:
        return ""
    at = compare.crossover(ratio)
    if at is not None:
        ax.axvline(at, color=RED, linewidth=1, linestyle=":")
        ax.annotate(
            f"crossover {length_label(round(at))}", (at, 0.02), xycoords=("data", "axes fraction"), rotation=90,
            ha="right", va="bottom", fontsize=7, color=RED,
        )  # fmt: skip
    last = max(ratio)
    text = f"{1 / ratio[last]:.1f}x faster" if ratio[last] <= 1 else f"{ratio[last]:.1f}x slower"
    return f"\n{look(name)[0]}: {text} at {length_label(last)}"


def _roof(ax, roofs: list[Row], metric: str, scale: float) -> None:
    """A line at the best measured rate of this device: a matrix product, a copy."""
    best = max((r for r in roofs if r.metric == metric), key=lambda r: r.p50, default=None)
    if best is not None:
        at = best.p50 * scale
        ax.axhline(at, color=BLACK, linewidth=1, linestyle="--")
        where = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 7}
        ax.annotate(f"{best.provider}, measured", (0.02, at), **where)


def roofs_of(rows: list[Row], device: str) -> list[Row]:
    """Rows of the roofline suite: a matrix product's throughput, a copy's bandwidth."""
    wanted = {("roofline", device, "matmul", "throughput"), ("roofline", device, "copy", "bandwidth")}
    return [r for r in rows if (r.kernel, r.device, r.provider, r.metric) in wanted and r.p50]


def plot_group(rows: list[Row], group: compare.Group, roofs: list[Row], out_dir: Path, stem: str) -> list[Path]:
    """Files of one group: STEM (time by mode and memory) and STEM-rates (TFLOP/s and GB/s by mode), PNG and SVG."""
    titles, dims = compare.modes(rows), group.config.split(": ", 1)[-1]
    title = f"Hierarchical Sparse Attention, {dims}, {group.selection} selection\n{group.device}"
    of = compare.grouped((r for r in rows if r.p50 is not None), lambda r: (r.metric, r.mode))
    memory = [m for m in titles if ("peak_extra_memory", m) in of][-1:]
    figure, axes = grid(len(titles) + len(memory), *SIZE)
    for ax, m in zip(axes, titles, strict=False):
        _draw(ax, of["time", m], "ms (median; band p20 to p80)")
        ax.set_title(f"{titles[m]}: time" + _beside_baseline(ax, rows, m))
    for m in memory:
        _draw(axes[-1], of["peak_extra_memory", m], "MiB")
        axes[-1].set_title(f"{titles[m]}: peak memory\nbeyond the inputs")
    paths = save(figure, out_dir / f"{stem}.png", title, 3)
    rates = [(m, metric) for m in titles for metric in RATES if (metric, m) in of]
    if not rates:
        return paths
    figure, axes = grid(len(rates), *SIZE)
    for ax, (m, metric) in zip(axes, rates, strict=True):
        unit, scale = RATES[metric]
        _draw(ax, of[metric, m], unit, scale)
        ax.set_title(titles[m])
        _roof(ax, roofs, metric, scale)
    return paths + save(figure, out_dir / f"{stem}-rates.png", title, 3)


def plot_rows(rows: list[Row], out_dir: Path) -> dict[compare.Group, list[Path]]:
    """The files of every group of the rows: "speed" for one group, with case and selection in the name for more.

    ValueError: nothing measured, or no matplotlib.
    """
    pyplot()
    found = {group: mine for group, mine in compare.groups(rows).items() if compare.times(mine)}
    if not found:
        raise ValueError("rows must hold a measured time, got none")
    out: dict[compare.Group, list[Path]] = {}
    for group, mine in found.items():
        case = group.config.split(": ", 1)[0]
        name = f"speed-{compare.subject(mine)}-{case}-{group.selection.replace('=', '')}"
        name = "speed" if len(found) == 1 else name
        taken = {p.stem for paths in out.values() for p in paths}
        name += f"-{len(taken)}" if name in taken else ""
        out[group] = plot_group(mine, group, roofs_of(rows, group.device), out_dir, name)
    return out


def plot_speed(csv_path: Path, out_dir: Path) -> list[Path]:
    """plot_rows of a CSV file: the files."""
    return [p for paths in plot_rows(record.read_rows(csv_path), out_dir).values() for p in paths]


def plot_loss(lines: list[dict], title: str, path: Path) -> list[Path]:
    """Loss by step, and the validation's, of a training run's log."""
    figure, ax = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
        points = [(x["step"] + 1, x[name]) for x in lines if x.get(name) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=label)
    for before, after in itertools.pairwise(lines):
        if before["stage"] != after["stage"]:
            ax.axvline(after["step"], color=GREY, linewidth=0.8, linestyle=":")
    ax.set(xlabel="steps", ylabel="loss, nats per token", title=title)
    ax.legend()
    return save(figure, path)
