"""The results page: tables, verdicts and plots of every device's rows, and nothing that is not in the files."""

import contextlib
import re
from pathlib import Path

from hsa_tl.bench import compare, plot, record
from hsa_tl.bench.compare import length_label
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


def _table(rows: list[Row], mode: str) -> list[str]:
    """A line for each length, a column for each provider of that mode."""
    at = {(r.provider, r.x): r.p50 for r in compare.times(rows) if r.mode == mode}
    memory = {(r.provider, r.x): r.p50 for r in rows if r.metric == "peak_extra_memory" and r.mode == mode and r.p50}
    baseline = compare.fastest_baseline(rows)
    names = sorted({name for name, _ in at}, key=plot.order)

    def cell(name: str, T: int) -> str:
        if (ms := at.get((name, T))) is None:
            return ""
        ratio = f" ({ms / baseline[mode, T]:.2f})" if (mode, T) in baseline else ""
        extra = f", {memory[name, T]:.3g} MiB" if (name, T) in memory else ""
        return f"{ms:.3g}{ratio}{extra}" if ms < 1000 else f"{ms:.0f}{ratio}{extra}"

    lines = [f"| T | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for T in sorted({T for _, T in at}):
        lines.append(f"| {length_label(T)} | {' | '.join(cell(n, T) for n in names)} |")
    return lines


def _partly(rows: list[Row]) -> list[str]:
    """Rows that timed a part of the problem, or another arithmetic, say so in their notes beside the repeats."""
    notes: dict[str, set[str]] = {}
    for r in compare.times(rows):
        for part in r.note.split("; "):
            if not re.fullmatch(r"\d+ repeats|", part) and not part.startswith(record.GPU_STATE[0]):
                notes.setdefault(part, set()).add(f"`{r.provider}`")
    return [f"- {note} ({', '.join(sorted(names))})" for note, names in sorted(notes.items())]


def group_section(group: compare.Group, rows: list[Row], verdicts: dict[str, str], images: list[str]) -> list[str]:
    """Markdown of one group: verdicts by mode first."""
    case, dims = group.config.split(": ", 1)
    titles = compare.modes(rows)
    lines = ["", f"### {TITLES.get(compare.subject(rows), 'Other')}: {case}, {group.selection} selection", "", dims, ""]
    if len(commits := sorted({r.commit for r in rows})) > 1:
        lines += [f"**Rows of several commits, not of one run: {', '.join(commits)}.**", ""]
    lines += [f"- {titles[mode]}: {text}" for mode, text in verdicts.items()]
    for mode, title in titles.items():
        lines += ["", f"{title} (`{mode}`)", "", *_table(rows, mode)]
    if notes := _partly(rows):
        lines += ["", "Notes of these rows:", "", *notes]
    if missing := sorted(compare.missing(rows).items()):
        lines += ["", "Not measured:", "", *(f"- `{name}`, {points}: {note}" for (name, note), points in missing)]
    return [*lines, "", *(f"![{case}]({path})" for path in images)]


def write_page(root: Path) -> list[Path]:
    """root/README.md and each device's plots in root/<device>/. Returns the files.

    ValueError: no folder of root holds benchmark rows, or no matplotlib.
    """
    found: dict[Path, list[Row]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        with contextlib.suppress(ValueError):  # its CSV files are others
            found[folder] = record.read_folder(folder)
    if not found:
        raise ValueError(f"root must hold a folder of benchmark rows for each device, got none in {root}")
    written, lines, losses = [root / "README.md"], [], []
    for folder, rows in found.items():
        files = plot.plot_rows(rows, folder)
        written += [p for paths in files.values() for p in paths]
        lines += [f"## {folder.name}", ""]
        for device in sorted({r.device for r in rows}):
            runs = sorted({(r.versions, r.commit) for r in rows if r.device == device})
            lines += [f"- {device}; commit {commit}; {versions}" for versions, commit in runs]
            roofs = plot.roofs_of(rows, device)
            lines += [f"- measured {r.provider}: {r.p50:.4g} {r.unit} ({r.config})" for r in roofs]
        for group, mine in compare.groups(rows).items():
            titles = compare.modes(mine)
            verdicts = {mode: text for mode in titles if (text := compare.verdict(mine, mode))}
            images = [f"{folder.name}/{p.name}" for p in files.get(group, ()) if p.suffix == ".png"]
            lines += group_section(group, mine, verdicts, images)
            where = f"- {folder.name}, {group.config.split(':')[0]}, {group.selection}"
            losses += [f"{where}, {titles[m].lower()}: {text}" for m, text in verdicts.items() if "loses" in text]
        lines.append("")
    head = [HEAD, "## Where we lose", "", *(losses or ["Nowhere among the rows here."]), ""]
    if (root / "static" / "README.md").is_file():
        head += ["Predicted, not measured: [static](static/README.md).", ""]
    write_atomic(written[0], "\n".join([*head, *lines]).rstrip() + "\n")
    return written
