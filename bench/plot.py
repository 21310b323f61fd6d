"""Plots of benchmark rows and of nothing else: time, rates and memory against length, the baselines beside HSA."""

import io
import itertools
import math
from pathlib import Path

from hsa_tl.bench import compare, record
from hsa_tl.bench.record import Row
from hsa_tl.files import write_together

TITLES = {
    "forward": "Forward", "backward": "Backward", "train": "Forward + backward", "prefill": "Retrieval, all tokens",
    "segment": "Retrieval, the last tokens", "retrieve": "Retrieval, one token", "attend": "Attention, one token",
    "decode": "Decode, one token", "step": "Training step", "read": "Prefill", "generate": "Generation, one token",
}  # fmt: skip
STYLES = {
    "dense": ("#444444", "o"),
    "dense-expanded": ("#9a6fb0", "P"),
    "dense-grouped": ("#9a6fb0", "P"),
    "dense-math": ("#c9a0dc", "X"),
    "dense-cudnn": ("#888888", "s"),
    "dense-flash": ("#b08d57", "D"),
    "dense-flex": ("#d9b98a", "d"),
    "dense-fa3": ("#7a3e00", "^"),
    "materialise": ("#444444", "s"),
    "full-attention": ("#444444", "o"),
    "swa": ("#9a6fb0", "P"),
    "hsa-auto": ("#0b6fb8", "o"),
    "hsa-auto-two-level": ("#3aa6a0", "d"),
    "hsa-with-retrieval": ("#0b3d66", "v"),
    "hsa": ("#0b6fb8", "o"),
    "retrieve": ("#6aaed6", "x"),
    "hsa-reference": ("#3aa6a0", "s"),
    "hsa-tilelang": ("#c2185b", "^"),
    "hsa-tilelang-token": ("#e57fa5", "<"),
    "hsa-tilelang-union": ("#8e1246", ">"),
    "hsa-tilelang-chunk": ("#f06292", "v"),
    "hsa-triton": ("#e07b00", "D"),
    "ramstorage-triton": ("#7cb342", "s"),
    "ramstorage-tilelang": ("#aed581", "s"),
    "hils": ("#33691e", "p"),
    "nsa-fla": ("#c0ca33", "*"),
}
OTHER = ("#000000", ".")
NAMES = {
    "dense": "dense causal (SDPA)",
    "dense-expanded": "dense causal (SDPA, heads expanded)",
    "dense-grouped": "dense (SDPA, heads grouped)",
    "dense-math": "dense (SDPA, math)",
    "dense-cudnn": "dense (SDPA, cuDNN)",
    "dense-flash": "dense (SDPA, FlashAttention 2)",
    "dense-flex": "dense (FlexAttention)",
    "dense-fa3": "dense (FlashAttention 3)",
    "materialise": "materialised scores + torch.topk",
    "full-attention": "full attention",
    "swa": "sliding window only",
    "hsa": "HSA",
    "hsa-auto": "HSA",
    "hsa-auto-two-level": "HSA, retrieval in two levels",
    "hsa-with-retrieval": "HSA with its retrieval",
    "hsa-reference": "HSA (PyTorch)",
    "hsa-tilelang": "HSA (TileLang)",
    "hsa-tilelang-token": "HSA (TileLang, a token a CTA)",
    "hsa-tilelang-union": "HSA (TileLang, union of chunks)",
    "hsa-tilelang-chunk": "HSA (TileLang, a chunk a CTA)",
    "hsa-triton": "HSA (Triton)",
    "retrieve": "HSA's retrieval alone",
    "ramstorage-triton": "published HSA (Triton)",
    "ramstorage-tilelang": "published HSA (TileLang)",
    "hils": "published HiLS",
    "nsa-fla": "NSA (flash-linear-attention)",
}
GRID_COLUMNS = 3  # panels in a line of a figure
TICKS = 8  # lengths that an axis names, at most one more


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


def length_label(T: int) -> str:
    """4096 -> "4K", 1300 -> "1.3K"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if size <= T:
            return f"{T / size:.3g}{unit}"
    return str(T)


def interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % by default: sound for few samples and for shares of 0 and 1."""
    share, room = right / n, z * z / n
    middle = (share + room / 2) / (1 + room)
    half = math.sqrt(share * (1 - share) * room + room * room / 4) / (1 + room)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def length_ticks(lengths: list[int]) -> list[int]:
    """Those of the lengths, ascending, whose labels do not collide; the longest is one."""
    kept = lengths[-1:]
    for T in reversed(lengths[:-1]):
        if kept[0] / T >= (lengths[-1] / lengths[0]) ** (1 / TICKS) * 0.999:
            kept.insert(0, T)
    return kept


def length_axis(ax, lengths: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ticks = length_ticks(lengths)
    ax.set_xticks(ticks, [length_label(T) for T in ticks])
    ax.minorticks_off()
    ax.set_xlabel("tokens T")


def save(figure, path: Path) -> list[Path]:
    """path, a PNG, and the same as SVG beside it."""
    files = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
        files[path.with_suffix(f".{kind}")] = buffer.getvalue()
    write_together(files)
    pyplot().close(figure)
    return list(files)


def _panel(ax, rows: list[Row], scale: float = 1.0) -> None:
    known = [n for n in STYLES if any(r.provider == n for r in rows)]
    for name in [*known, *sorted({r.provider for r in rows} - set(known))]:
        line = sorted((r for r in rows if r.provider == name), key=lambda r: r.x)
        color, marker = STYLES.get(name, OTHER)
        x = [r.x for r in line]
        y = [[v * scale for v in (r.p20, r.p50, r.p80)] for r in line]
        ax.plot(x, [v[1] for v in y], color=color, marker=marker, markersize=4, label=NAMES.get(name, name))
        ax.fill_between(x, [v[0] for v in y], [v[2] for v in y], color=color, alpha=0.15, linewidth=0)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if any(r.p50 > 0 for r in rows):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    length_axis(ax, sorted({r.x for r in rows}))


def _beside_baseline(ax, rows: list[Row], mode: str) -> str:
    """Marks the crossover; a line that compares at the longest length that both have."""
    name, ratio = compare.ratios(rows, mode)
    if not ratio:
        return ""
    at = compare.crossover(ratio)
    if at is not None:
        ax.axvline(at, color="#c2185b", linewidth=1, linestyle=":")
        ax.annotate(
            f"crossover {length_label(round(at))}", (at, 0.02), xycoords=("data", "axes fraction"), rotation=90,
            ha="right", va="bottom", fontsize=7, color="#c2185b",
        )  # fmt: skip
    last = max(ratio)
    text = f"{1 / ratio[last]:.1f}x faster" if ratio[last] <= 1 else f"{ratio[last]:.1f}x slower"
    return f"\n{NAMES.get(name, name)}: {text} at {length_label(last)}"


def grid(count: int, least: float, width: float, height: float, more: float):
    """A figure and its `count` axes, GRID_COLUMNS in a line; inches: least and each one's width, height, and more."""
    columns = min(GRID_COLUMNS, count)
    lines = -(-count // columns)
    size = (max(least, width * columns), height * lines + more)
    figure, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def _figure(panels: list[tuple], group: compare.Group, path: Path) -> list[Path]:
    """panels: (rows, title, ylabel, scale, decorate(ax) -> more title)."""
    figure, axes = grid(len(panels), 7.2, 3.6, 3.3, 0.6)
    for ax, (rows, title, ylabel, scale, decorate) in zip(axes, panels, strict=True):
        _panel(ax, rows, scale)
        ax.set_title(title + decorate(ax))
        ax.set_ylabel(ylabel)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    dims = group.config.split(": ", 1)[-1]
    figure.suptitle(f"Hierarchical Sparse Attention, {dims}, {group.selection} selection\n{group.device}", fontsize=10)
    return save(figure, path)


def _roof(ax, roofs: list[Row], metric: str, scale: float) -> str:
    """A line at the best measured rate of this device: a matrix product, a copy."""
    best = max((r for r in roofs if r.metric == metric), key=lambda r: r.p50, default=None)
    if best is not None:
        ax.axhline(best.p50 * scale, color="#000000", linewidth=1, linestyle="--")
        ax.annotate(
            f"{best.provider}, measured", (0.02, best.p50 * scale), xycoords=("axes fraction", "data"),
            va="bottom", fontsize=7,
        )  # fmt: skip
    return ""


def roofs_of(rows: list[Row], device: str) -> list[Row]:
    """Rows of the roofline suite: a matrix product's throughput, a copy's bandwidth."""
    wanted = {("matmul", "throughput"), ("copy", "bandwidth")}
    return [
        r for r in rows
        if r.kernel == "roofline" and r.device == device and (r.provider, r.metric) in wanted and r.p50
    ]  # fmt: skip


def plot_group(rows: list[Row], group: compare.Group, roofs: list[Row], out_dir: Path, stem: str) -> list[Path]:
    """Files of one group: STEM (time by mode and memory) and STEM-rates (TFLOP/s and GB/s by mode), PNG and SVG."""
    rows = [r for r in rows if r.p50 is not None]
    modes = [m for m in TITLES if any(r.mode == m and r.metric == "time" for r in rows)]

    def of(metric: str, mode: str) -> list[Row]:
        return [r for r in rows if r.metric == metric and r.mode == mode]

    def nothing(ax) -> str:
        return ""

    panels = [
        (of("time", m), f"{TITLES[m]}: time", "ms (median; band p20 to p80)", 1.0,
         lambda ax, m=m: _beside_baseline(ax, rows, m)) for m in modes
    ]  # fmt: skip
    last = next((m for m in reversed(modes) if of("peak_extra_memory", m)), None)
    if last:
        title = f"{TITLES[last]}: peak memory\nbeyond the inputs"
        panels.append((of("peak_extra_memory", last), title, "MiB", 1.0, nothing))
    paths = _figure(panels, group, out_dir / f"{stem}.png")
    rates = [
        (of(metric, m), TITLES[m], unit, 1e-3 if metric == "throughput" else 1.0,
         lambda ax, metric=metric: _roof(ax, roofs, metric, 1e-3 if metric == "throughput" else 1.0))
        for m in modes for metric, unit in (("throughput", "TFLOP/s"), ("bandwidth", "GB/s of least traffic"))
        if of(metric, m)
    ]  # fmt: skip
    return paths + (_figure(rates, group, out_dir / f"{stem}-rates.png") if rates else [])


def plot_rows(rows: list[Row], out_dir: Path, stem: str = "speed") -> dict[compare.Group, list[Path]]:
    """The files of every group of the rows: STEM alone for one group, with case and selection in the name for more.

    ValueError: nothing measured, or no matplotlib.
    """
    pyplot()
    found = compare.groups(r for r in rows if r.kernel != "roofline")
    found = {g: mine for g, mine in found.items() if compare.times(mine)}
    if not found:
        raise ValueError("rows must hold a measured time, got none")
    out: dict[compare.Group, list[Path]] = {}
    for group, mine in found.items():
        case = group.config.split(": ", 1)[0]
        what = compare.subject(mine)
        name = stem if len(found) == 1 else f"{stem}-{what}-{case}-{group.selection.replace('=', '')}"
        taken = {p.stem for paths in out.values() for p in paths}
        name += f"-{len(taken)}" if name in taken else ""
        out[group] = plot_group(mine, group, roofs_of(rows, group.device), out_dir, name)
    return out


def plot_speed(csv_path: Path, out_dir: Path, stem: str = "speed") -> list[Path]:
    """plot_rows of a CSV file: the files."""
    return [p for paths in plot_rows(record.read_rows(csv_path), out_dir, stem).values() for p in paths]


def plot_loss(lines: list[dict], title: str, path: Path) -> list[Path]:
    """Loss by step, and the validation's, of a training run's log."""
    figure, ax = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
        points = [(x["step"] + 1, x[name]) for x in lines if x.get(name) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=label)
    for before, after in itertools.pairwise(lines):
        if before["stage"] != after["stage"]:
            ax.axvline(after["step"], color="#888888", linewidth=0.8, linestyle=":")
    ax.set_xlabel("steps")
    ax.set_ylabel("loss, nats per token")
    ax.set_title(title)
    ax.legend()
    return save(figure, path)
