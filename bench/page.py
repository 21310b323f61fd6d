"""The results page: tables, verdicts and plots of every device's rows, and nothing that is not in the files."""

from pathlib import Path

from hsa_tl.bench import compare, plot, record
from hsa_tl.bench.record import Row
from hsa_tl.files import write_atomic

TITLES = {
    "attention": "Attention", "retrieval": "Retrieval of a prefill", "decode": "Decode", "model": "The whole model",
}  # fmt: skip
HEAD = """# Results

Written by `hsa-tl plot --page` from the CSV files beside it; `hsa-tl bench` writes those. Milliseconds, median of the
repeats, providers in turns in one process; in brackets the ratio to the fastest baseline of that row (above 1: slower).
Spread, rates and every refused or missing point are in the files. Peak memory is what one call adds, measured.
"""


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(rows: list[Row], mode: str) -> list[str]:
    """A line for each length, a column for each provider of that mode."""
    timed = [r for r in compare.times(rows) if r.mode == mode]
    order = list(plot.STYLES)
    names = sorted({r.provider for r in timed}, key=lambda n: (order.index(n) if n in order else len(order), n))
    baseline = compare.fastest_baseline(rows)
    memory = {(r.provider, r.x): r.p50 for r in rows if r.metric == "peak_extra_memory" and r.mode == mode and r.p50}
    at = {(r.provider, r.x): r.p50 for r in timed}
    lines = [f"| T | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for T in sorted({r.x for r in timed}):
        cells = []
        for n in names:
            if (n, T) not in at:
                cells.append("")
                continue
            ratio = f" ({at[n, T] / baseline[mode, T]:.2f})" if (mode, T) in baseline else ""
            extra = f", {memory[n, T]:.3g} MiB" if (n, T) in memory else ""
            cells.append(f"{_ms(at[n, T])}{ratio}{extra}")
        lines.append(f"| {plot.length_label(T)} | {' | '.join(cells)} |")
    return lines


def _missing(rows: list[Row]) -> list[str]:
    """What has no time, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r.metric == "time" and r.p50 is None:
            reasons.setdefault((r.provider, r.note), []).append(f"{r.mode} {plot.length_label(r.x)}")
    return [f"- `{name}`, {', '.join(at)}: {note}" for (name, note), at in sorted(reasons.items())]


def _partly(rows: list[Row]) -> list[str]:
    """Rows that timed a part of the problem, or another arithmetic, say so in their notes behind the repeats."""
    notes: dict[str, list[str]] = {}
    for r in compare.times(rows):
        for part in r.note.split("; ")[1:]:
            if not part.startswith(record.GPU_STATE[0]):
                notes.setdefault(part, []).append(r.provider)
    return [f"- {note} ({', '.join(f'`{n}`' for n in sorted(set(names)))})" for note, names in sorted(notes.items())]


def group_section(group: compare.Group, rows: list[Row], images: list[str]) -> list[str]:
    """Markdown of one group: verdicts first."""
    case, dims = group.config.split(": ", 1)
    lines = [f"### {TITLES.get(compare.subject(rows), 'Other')}: {case}, {group.selection} selection", "", dims, ""]
    if len(commits := sorted({r.commit for r in rows})) > 1:
        lines += [f"**Rows of several commits, not of one run: {', '.join(commits)}.**", ""]
    modes = [m for m in plot.TITLES if any(r.mode == m for r in compare.times(rows))]
    verdicts = [(m, compare.verdict(rows, m, plot.length_label)) for m in modes]
    lines += [f"- {plot.TITLES[m]}: {v}" for m, v in verdicts if v]
    for mode in modes:
        lines += ["", f"{plot.TITLES[mode]} (`{mode}`)", "", *_table(rows, mode)]
    if notes := _partly(rows):
        lines += ["", "Notes of these rows:", "", *notes]
    if missing := _missing(rows):
        lines += ["", "Not measured:", "", *missing]
    lines += ["", *(f"![{case}]({path})" for path in images)]
    return lines


def _folders(root: Path) -> list[Path]:
    """Folders of root whose CSV files are benchmark rows."""
    out = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        try:
            record.read_folder(folder)
        except ValueError:
            continue
        out.append(folder)
    return out


def write_page(root: Path) -> list[Path]:
    """root/README.md and each device's plots in root/<device>/. Returns the files.

    ValueError: no folder of root holds benchmark rows, or no matplotlib.
    """
    folders, written, lines = _folders(root), [], [HEAD]
    if not folders:
        raise ValueError(f"root must hold a folder of benchmark rows for each device, got none in {root}")
    losses = []
    for folder in folders:
        rows = record.read_folder(folder)
        found = compare.groups(r for r in rows if r.kernel != "roofline")
        files = plot.plot_rows(rows, folder)
        written += [p for paths in files.values() for p in paths]
        lines += [f"## {folder.name}", ""]
        for device in sorted({r.device for r in rows}):
            mine = [r for r in rows if r.device == device]
            for versions, commit in sorted({(r.versions, r.commit) for r in mine}):
                lines.append(f"- {device}; commit {commit}; {versions}")
            for roof in plot.roofs_of(rows, device):
                lines.append(f"- measured {roof.provider}: {roof.p50:.4g} {roof.unit} ({roof.config})")
        for group, mine in found.items():
            images = [f"{folder.name}/{p.name}" for p in files.get(group, ()) if p.suffix == ".png"]
            lines += ["", *group_section(group, mine, images)]
            for mode in plot.TITLES:
                text = compare.verdict(mine, mode, plot.length_label)
                if "loses" in text:
                    case = group.config.split(":")[0]
                    losses.append(f"- {folder.name}, {case}, {group.selection}, {plot.TITLES[mode].lower()}: {text}")
        lines.append("")
    where = ["## Where we lose", "", *(losses or ["Nowhere among the rows here."]), ""]
    if (root / "static" / "README.md").is_file():
        where += ["Predicted, not measured: [static](static/README.md).", ""]
    write_atomic(root / "README.md", "\n".join([lines[0], *where, *lines[1:]]).rstrip() + "\n")
    return [root / "README.md", *written]
