"""Plots of a sweep's CSV and of nothing else: time and memory against length, dense attention beside HSA."""

import io
from pathlib import Path

import torch

from hsa_tl.bench import record
from hsa_tl.files import write_atomic

TITLES = {
    "forward": "Forward", "backward": "Backward", "train": "Forward + backward", "prefill": "Retrieval, all tokens",
    "segment": "Retrieval, the last tokens", "retrieve": "Retrieval, one token", "attend": "Attention, one token",
    "decode": "Decode, one token",
}  # fmt: skip
STYLES = {
    "dense": ("#444444", "o"),
    "dense-expanded": ("#9a6fb0", "P"),
    "dense-cudnn": ("#888888", "s"),
    "dense-flash": ("#b08d57", "D"),
    "dense-fa3": ("#7a3e00", "^"),
    "materialise": ("#444444", "s"),
    "hsa-auto": ("#0b6fb8", "o"),
    "hsa-with-retrieval": ("#0b3d66", "v"),
    "retrieve": ("#6aaed6", "x"),
    "hsa-reference": ("#3aa6a0", "s"),
    "hsa-tilelang": ("#c2185b", "^"),
    "hsa-triton": ("#e07b00", "D"),
}
NAMES = {
    "dense": "dense causal (torch SDPA)",
    "dense-expanded": "dense causal (torch SDPA, heads expanded)",
    "hsa-auto": "HSA (auto)",
}


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
    })  # fmt: skip
    return plt


def length_label(T: int) -> str:
    """4096 -> "4K"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if size <= T and T % size == 0:
            return f"{T // size}{unit}"
    return str(T)


def length_axis(ax, lengths: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [length_label(T) for T in lengths])
    ax.minorticks_off()
    ax.set_xlabel("tokens T")


def save(figure, path: Path) -> list[Path]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    pyplot().close(figure)
    return [path]


def _panel(ax, rows: list[record.Row]) -> None:
    for name in (n for n in STYLES if any(r.provider == n for r in rows)):
        line = sorted((r for r in rows if r.provider == name), key=lambda r: r.x)
        color, marker = STYLES[name]
        x = [r.x for r in line]
        ax.plot(x, [r.p50 for r in line], color=color, marker=marker, markersize=4, label=NAMES.get(name, name))
        ax.fill_between(x, [r.p20 for r in line], [r.p80 for r in line], color=color, alpha=0.15, linewidth=0)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    length_axis(ax, sorted({r.x for r in rows}))


def _versus_dense(rows: list[record.Row]) -> str:
    """HSA against dense attention at the longest length that both have."""
    dense = record.fastest_baseline(rows)
    both = [r for r in rows if r.provider == "hsa-auto" and (r.mode, r.x) in dense]
    if not both:
        return ""
    last = max(both, key=lambda r: r.x)
    ratio = dense[last.mode, last.x] / last.p50
    text = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    return f"\nHSA {text} than dense at {length_label(last.x)}"


def plot_speed(csv_path: Path, out_dir: Path, stem: str = "speed") -> list[Path]:
    """One PNG for each case and selection in the CSV: a panel for each mode, and one of memory. Returns the files.

    ValueError: nothing measured in the CSV, or no matplotlib.
    """
    rows = [r for r in record.read_rows(csv_path) if r.p50 is not None and r.metric in ("time", "peak_extra_memory")]
    if not rows:
        raise ValueError(f"csv_path must hold measured rows, got none in {csv_path}")
    plt, paths = pyplot(), []
    groups = sorted({(r.config, r.selection, r.device) for r in rows})
    for config, selection, device in groups:
        mine = [r for r in rows if (r.config, r.selection, r.device) == (config, selection, device)]
        modes = [m for m in TITLES if any(r.mode == m for r in mine)]
        memory = [r for r in mine if r.metric == "peak_extra_memory" and r.mode == modes[-1]]
        figure, axes = plt.subplots(
            1, len(modes) + bool(memory), figsize=(3.6 * (len(modes) + 1), 3.6), squeeze=False, layout="constrained"
        )
        for ax, mode in zip(axes[0], modes, strict=False):
            times = [r for r in mine if r.metric == "time" and r.mode == mode]
            _panel(ax, times)
            ax.set_title(f"{TITLES[mode]}: time{_versus_dense(times)}")
            ax.set_ylabel("ms (median; band p20 to p80)")
        if memory:
            _panel(axes[0][-1], memory)
            axes[0][-1].set_title(f"{TITLES[modes[-1]]}: peak memory\nbeyond the inputs")
            axes[0][-1].set_ylabel("MiB")
        handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        case, dims = config.split(": ", 1)
        figure.suptitle(f"Hierarchical Sparse Attention, {dims}, {selection} selection\n{device}", fontsize=10)
        name = (
            f"{stem}.png"
            if len(groups) == 1
            else f"{stem}-{case}-{selection.replace('=', '')}-{groups.index((config, selection, device))}.png"
        )
        paths += save(figure, out_dir / name)
    return paths


def plot_unions(rows: list[dict], pays_below: float, text_name: str, path: Path) -> list[Path]:
    """Union sizes of neighbouring tokens' selections as a share of tokens * K: text beside chance."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9.5, 4), layout="constrained", width_ratios=(2, 1))
    labels = [f"K = {r['K']}\n{r['selection']}" for r in rows]
    tiles = list(rows[0]["union_share"])
    for i, (n, color) in enumerate(zip(tiles, ("#0b6fb8", "#6aaed6", "#b9d6ec"), strict=False)):
        x = [j + (i - 1) * 0.26 for j in range(len(rows))]
        bars = axes[0].bar(x, [r["union_share"][n] for r in rows], 0.24, color=color, label=f"{n} tokens")
        axes[0].bar_label(bars, [f"{r['union_chunks'][n]:.0f}" for r in rows], fontsize=8)
    line = f"below {pays_below} one walk over the union is cheaper"
    axes[0].axhline(pays_below, color="#c2185b", linewidth=1, linestyle="--", label=line)
    axes[0].set_ylabel("distinct chunks / (tokens x K)")
    axes[0].set_title("Union of neighbouring tokens' chunks (number: chunks)")
    axes[0].legend(loc="upper left", ncols=2)
    axes[0].set_ylim(0, 1.1)
    bars = axes[1].bar(range(len(rows)), [r["overlap"] for r in rows], 0.6, color="#3aa6a0")
    axes[1].bar_label(bars, [f"{r['overlap']:.2f}" for r in rows], fontsize=8)
    axes[1].set_ylim(0, 1.1)
    axes[1].set_ylabel("share of a token's chunks")
    axes[1].set_title("Chosen by its predecessor too")
    for ax in axes:
        ax.set_xticks(range(len(rows)), labels)
        ax.grid(axis="x", visible=False)
    r = rows[0]
    figure.suptitle(
        f"Do neighbouring tokens retrieve the same chunks? {r['tokens']} bytes of {text_name}, {r['chunks']} chunks\n"
        "(over the tokens that see more than K chunks)",
        fontsize=10,
    )
    return save(figure, path)


def plot_chosen(chosen, S: int, files: tuple[tuple[str, int], ...], text_name: str, path: Path) -> list[Path]:
    """chosen [T, K]: a heat map, how many of a chunk's S tokens retrieve each earlier chunk."""
    T, K = chosen.shape
    N = T // S
    counts = torch.zeros(N, N + 1)
    row = (torch.arange(N * S) // S)[:, None].expand(-1, K)
    column = chosen[: N * S].long()
    counts.index_put_((row, torch.where(column < 0, N, column)), torch.ones(1), accumulate=True)
    share = (counts[:, :N] / S).masked_fill(counts[:, :N] == 0, float("nan"))
    figure, ax = pyplot().subplots(figsize=(7.4, 6.4), layout="constrained")
    image = ax.imshow(share.numpy(), cmap="viridis_r", vmin=0, vmax=1, interpolation="nearest", origin="upper")
    figure.colorbar(image, ax=ax, shrink=0.8, label=f"share of the {S} tokens of a chunk that retrieve it")
    borders = [(name, start / S) for name, start in files if start < N * S]
    for _, at in borders[1:]:
        ax.axhline(at - 0.5, color="#c2185b", linewidth=0.6)
        ax.axvline(at - 0.5, color="#c2185b", linewidth=0.6)
    ends = [at for _, at in borders[1:]] + [N]
    if len(borders) > 1:
        wide = [
            (name, (at + end) / 2)
            for (name, at), end in zip(borders, ends, strict=True)
            if end - at > N * len(name) / 95
        ]
        top = ax.secondary_xaxis("top")
        top.set_xticks([m for _, m in wide], [name for name, _ in wide], fontsize=7)
        top.tick_params(length=0)
    legend = "\nred: borders of files" if len(borders) > 1 else ""
    ax.grid(False)
    ax.set_xlabel(f"retrieved chunk ({S} bytes each)")
    ax.set_ylabel("chunk of the retrieving tokens")
    ax.set_title(f"Which chunks do tokens retrieve? {T} bytes of {text_name}, K = {K}{legend}", pad=22)
    return save(figure, path)
