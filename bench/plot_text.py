"""Plots of selections on text, for the demo: how much neighbours share, and which chunks are chosen."""

from pathlib import Path

import torch

from hsa_tl.bench.plot import pyplot, save


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
